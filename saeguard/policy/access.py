"""The access file: tenants by API key, and which policies apply to which requests.

The operator writes the file. A request chooses nothing in it: its API key determines the tenant,
the engine determines the model or adapter, and a request may ask only for more enforcement, and
only if the file allows it.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

from pydantic import Field, StringConstraints

from saeguard.policy.errors import PolicyErrors
from saeguard.policy.schema import ShortText
from saeguard.policy.types import Policy
from saeguard.yaml_files.findings import Finding, did_you_mean, show
from saeguard.yaml_files.raw import read_bytes
from saeguard.yaml_files.reader import Document, FileKind, read_document
from saeguard.yaml_files.section import FORMS, Section
from saeguard.yaml_files.validate import merged, shape

KIND = FileKind("access")
How = Literal["only", "enforce", "may_enforce"]
KEY_SHA256 = r"^[a-f0-9]{64}$"  # spelt unlike the pattern of other digests: its own advice
FORMS[KEY_SHA256] = "64 hexadecimal digits, as `printf %s KEY | sha256sum` prints them"


class TenantSection(Section):
    """One tenant."""

    keys_sha256: list[Annotated[str, StringConstraints(pattern=KEY_SHA256)]] = Field(
        min_length=1, max_length=1000, description="SHA-256 of each API key, in hexadecimal."
    )


class RuleSection(Section):
    """How some policies apply to some requests."""

    policies: list[ShortText] = Field(
        min_length=1, description="Ids of policies; `*` stands for any characters."
    )
    tenants: list[ShortText] = Field(
        default=[], description="Tenants whose requests the rule covers; empty: all requests."
    )
    models: list[ShortText] = Field(
        default=[],
        description="Served names of models or LoRA adapters; empty: any.",
    )
    how: How = Field(
        description="only: the policies apply to no other requests. enforce: shadow policies are "
        "enforced for these. may_enforce: these may ask to have shadow policies enforced."
    )


class AccessFile(Section):
    """An access file: tenants, and which policies apply to which requests."""

    schema_: Literal["saeguard.access/v1"] = Field(
        alias="schema", description="The version of this format."
    )
    tenants: dict[ShortText, TenantSection] = Field(
        default={}, description="Tenants by name; requests with another key have none."
    )
    rules: list[RuleSection] = Field(default=[], max_length=1000)


def matches(policy: str, patterns: Iterable[str]) -> bool:
    """Return whether a policy id matches a pattern, in which `*` stands for any characters."""
    return any(fnmatchcase(policy, pattern) for pattern in patterns)


@dataclass(frozen=True, slots=True)
class Rule:
    """How some policies apply to some requests; see `RuleSection`."""

    policies: tuple[str, ...]
    tenants: frozenset[str]
    models: frozenset[str]
    how: How

    def names(self, policy: str) -> bool:
        """Return whether the rule names a policy."""
        return matches(policy, self.policies)

    def covers(self, tenant: str | None, model: str) -> bool:
        """Return whether the rule covers a request."""
        return (not self.tenants or tenant in self.tenants) and (
            not self.models or model in self.models
        )


@dataclass(frozen=True, slots=True)
class Access:
    """The content of an access file."""

    keys: tuple[tuple[bytes, str], ...] = ()
    """SHA-256 of an API key, and the tenant it belongs to."""
    tenants: frozenset[str] = frozenset()
    rules: tuple[Rule, ...] = ()
    path: Path | None = None

    def tenant(self, key_sha256: bytes | None) -> str | None:
        """Return the tenant of a key, None if it has none; takes equally long for any key."""
        found = None
        for known, tenant in self.keys:
            if hmac.compare_digest(known, key_sha256 or b""):
                found = tenant
        return found

    def may_ask(self, tenant: str | None, model: str) -> frozenset[str]:
        """Return ids, some with `*`, of the policies that a request may ask to have enforced."""
        rules = [r for r in self.rules if r.how == "may_enforce" and r.covers(tenant, model)]
        return frozenset(name for rule in rules for name in rule.policies)

    def ever_enforced(self, policies: Iterable[str]) -> frozenset[str]:
        """Return the policies that are enforced for some request whatever their mode."""
        rules = [r for r in self.rules if r.how != "only"]
        return frozenset(p for p in policies if any(rule.names(p) for rule in rules))


UNRESTRICTED = Access()
"""No tenants; every policy applies to every request."""


class Decision(NamedTuple):
    """Which policies of a watch list apply to a request and act on it, in their order."""

    applies: tuple[bool, ...]
    enforced: tuple[bool, ...]
    waived: Mapping[int, str]
    """By policy: id of the exception that waives its action."""


def key_digest(key: str) -> bytes:
    """Return the digest of an API key; keys are compared by digest."""
    return hashlib.sha256(key.encode()).digest()


def decide(
    policies: Sequence[Policy],
    access: Access,
    *,
    tenant: str | None,
    model: str,
    asked: frozenset[str],
    may_enforce: frozenset[str],
    today: date,
) -> Decision:
    """Return which policies apply to a request, and which of them act.

    Args:
        policies: of one watch list.
        access: the content of the operator's access file.
        tenant: of the request, None if it is not known.
        model: name of the model or adapter that serves it.
        asked: shadow policies that it asks to have enforced; those not allowed are ignored.
        may_enforce: shadow policies that any request may have enforced.
        today: exceptions hold up to and including their last day.
    """
    allowed = may_enforce | access.may_ask(tenant, model)
    applies, enforced, waived = [], [], {}
    for i, policy in enumerate(policies):
        rules = [rule for rule in access.rules if rule.names(policy.id)]
        here = [rule for rule in rules if rule.covers(tenant, model)]
        only = {rule.how for rule in rules} >= {"only"}
        holds = not only or any(rule.how == "only" for rule in here)
        acts = (
            policy.mode == "enforce"
            or (policy.id in asked and matches(policy.id, allowed))
            or any(rule.how == "enforce" for rule in here)
        )
        exception = exception_of(policy, tenant, today)
        if holds and acts and exception is not None:
            waived[i] = exception
        applies.append(holds)
        enforced.append(holds and acts and exception is None)
    return Decision(tuple(applies), tuple(enforced), waived)


def exception_of(policy: Policy, tenant: str | None, today: date) -> str | None:
    """Return the exception that waives a policy's action for a tenant on a day, if there is one."""
    for exception in policy.exceptions:
        if exception.tenant == tenant and today <= exception.expires:
            return exception.id
    return None


def load_access(path: Path) -> Access:
    """Read an access file.

    Raises:
        PolicyErrors: everything that is wrong with it, with line and column.
    """
    raw = read_bytes(path, KIND)
    if isinstance(raw, Finding):
        raise PolicyErrors([raw])
    document = read_document(path, raw, KIND)
    content, errors = shape(AccessFile, document) if document.data is not None else (None, [])
    errors = merged(document, errors)
    if content is not None:
        errors += _senseless(content, document)
    if errors or content is None:
        raise PolicyErrors(errors)
    return Access(
        keys=tuple(
            (bytes.fromhex(key), name)
            for name, tenant in content.tenants.items()
            for key in tenant.keys_sha256
        ),
        tenants=frozenset(content.tenants),
        rules=tuple(
            Rule(tuple(r.policies), frozenset(r.tenants), frozenset(r.models), r.how)
            for r in content.rules
        ),
        path=path,
    )


def _senseless(content: AccessFile, document: Document) -> list[Finding]:
    errors = []
    owner: dict[str, str] = {}
    for name, tenant in content.tenants.items():
        for i, key in enumerate(tenant.keys_sha256):
            if owner.setdefault(key, name) != name:
                message = f"this key is {show(owner[key])}'s already; a key has one tenant"
                loc = ("tenants", name, "keys_sha256", i)
                errors.append(document.error("not-allowed", message, loc))
    for i, rule in enumerate(content.rules):
        for j, name in enumerate(rule.tenants):
            if name not in content.tenants:
                known = ", ".join(content.tenants) or "none"
                message = (
                    f"there is no tenant {show(name)}; "
                    f"{did_you_mean(name, content.tenants)}known: {known}"
                )
                errors.append(document.error("not-allowed", message, ("rules", i, "tenants", j)))
        if rule.how == "only" and not rule.tenants and not rule.models:
            message = "`how: only` needs tenants or models; without them the rule has no effect"
            errors.append(document.error("missing-key", message, ("rules", i)))
    return errors


def check_against(access: Access, policies: Sequence[Policy]) -> None:
    """Check that an access file and a set of policies name the same policies and tenants.

    A rule for a missing policy, or an exception for a missing tenant, would silently do nothing.

    Raises:
        PolicyErrors: names the file, what was found and what is known.
    """
    ids = sorted({p.id for p in policies})
    errors = []
    if access.path is not None:
        for pattern in (name for rule in access.rules for name in rule.policies):
            if not any(fnmatchcase(policy, pattern) for policy in ids):
                message = f"no policy is named {show(pattern)}; loaded: {', '.join(ids)}"
                errors.append(Finding(access.path, 0, 0, "not-allowed", message))
    for policy in policies:
        for exception in policy.exceptions:
            if exception.tenant not in access.tenants:
                known = ", ".join(sorted(access.tenants)) or "none"
                message = (
                    f"exception {show(exception.id)} is for tenant {show(exception.tenant)}, which "
                    f"the server's access file does not name; known: {known}. Set saeguard.access "
                    "to a file that maps API keys to tenants, or remove the exception"
                )
                errors.append(Finding(policy.path, 0, 0, "not-allowed", message))
    if errors:
        raise PolicyErrors(errors)
