"""Read policy files into policies, or into a list of everything that is wrong with them."""

from __future__ import annotations

import hashlib
import json
from datetime import date
from pathlib import Path
from typing import Any, TypeAlias, get_args

from saeguard.policy.consistency import sense
from saeguard.policy.errors import PolicyErrors
from saeguard.policy.files import find_files, is_test
from saeguard.policy.schema import ClampSection, PolicyFile
from saeguard.policy.types import Clamp, Edit, Exception_, Policy, Selection
from saeguard.yaml_files.findings import Finding
from saeguard.yaml_files.raw import read_bytes
from saeguard.yaml_files.reader import Document, read_document
from saeguard.yaml_files.validate import merged, shape

Cache: TypeAlias = dict[tuple[Path, bytes], tuple[Policy | None, list[Finding]]]
"""Results of earlier reads, by path and SHA-256 of the content."""


def load_policies(path: Path, cache: Cache | None = None) -> tuple[Policy, ...]:
    """Read a policy file, or every policy file below a folder.

    Files are `*.yaml`; `*.test.yaml` and names that start with a dot are left out. An id may
    be used twice: once in shadow and once enforced.

    Raises:
        PolicyErrors: everything that is wrong with any of the files. No content raises any
            other exception.
    """
    policies, errors = read_policies(path, cache=cache)
    if errors:
        raise PolicyErrors(errors)
    return policies


def read_policies(
    *paths: Path, cache: Cache | None = None
) -> tuple[tuple[Policy, ...], list[Finding]]:
    """Return the policies that could be read, and findings about the others.

    Args:
        paths: files and folders.
        cache: files of earlier calls; afterwards it holds those of this call.
    """
    before = {} if cache is None else dict(cache)
    now: Cache = {}
    errors: list[Finding] = []
    policies: dict[tuple[str, str], Policy] = {}
    for path in paths:
        files, found = find_files(path)
        errors += found
        files = [file for file in files if not is_test(file)]
        if not files and not found:
            message = "expected policies here, found none; write NAME.yaml files, or check the path"
            errors.append(Finding(path, 0, 0, "no-policies", message))
        for file in files:
            policy, found = _read_again(file, before, now)
            errors += found
            if policy:
                first = policies.setdefault((policy.id, policy.mode), policy)
                errors += [_duplicate(policy, first)] if first.path != policy.path else []
    if cache is not None:
        cache.clear()
        cache.update(now)
    return tuple(policies.values()), errors


def _read_again(file: Path, before: Cache, now: Cache) -> tuple[Policy | None, list[Finding]]:
    raw = read_bytes(file)
    if isinstance(raw, Finding):
        return None, [raw]
    key = file, hashlib.sha256(raw).digest()
    now[key] = before.get(key) or parse_policy(file, raw)
    return now[key]


def _duplicate(policy: Policy, first: Policy) -> Finding:
    message = (
        f"{first.path} has this id and mode already; rename one of them, or set one to "
        "mode: shadow and the other to mode: enforce"
    )
    return locate(policy).error("duplicate-id", message, ("id",))


def parse_policy(path: Path, raw: bytes) -> tuple[Policy | None, list[Finding]]:
    """Return the policy in a file's content, or everything that is wrong with it."""
    document = read_document(path, raw)
    if document.data is None:
        return None, list(document.errors)
    content, misshapen = shape(PolicyFile, document)
    condition, senseless = sense(document)
    errors = merged(document, (*misshapen, *senseless))
    if errors or content is None or condition is None:
        return None, errors
    policy = Policy(
        id=content.id,
        title=content.title,
        owner=content.owner,
        severity=content.severity,
        mode=content.mode,
        action=content.action,
        on_error=content.on_error,
        scope=content.scope,
        uncached=content.uncached,
        feature_set=content.feature_set,
        rationale=content.rationale,
        falsepositives=tuple(content.falsepositives),
        review_by=content.review_by,
        detect={name: Selection(s.feature, s.above, s.over) for name, s in content.detect.items()},
        condition=condition.expr,
        window=content.for_,
        keep=content.keep,
        clamp=_clamp(content.clamp) if content.clamp else None,
        exceptions=tuple(
            Exception_(e.id, e.reason, e.owner, e.expires, e.tenant) for e in content.exceptions
        ),
        path=path,
        digest=digest(document.data),
        sample=content.sample,
        message=content.message,
        accept_weak=content.accept_weak,
    )
    return policy, []


def _clamp(section: ClampSection) -> Clamp:
    edits: tuple[Edit, ...] = get_args(Edit)
    how = next(edit for edit in edits if getattr(section, edit) is not None)
    amount = 0.0 if how == "ablate" else float(getattr(section, how))
    return Clamp(tuple(section.features), amount, how, section.when)


def locate(policy: Policy) -> Document:
    """Read the policy's file again, for the positions in it.

    Positions are needed only for findings, so policies do not carry them. If the file has changed
    in the meantime, findings point at the file as a whole.
    """
    raw = read_bytes(policy.path)
    if not isinstance(raw, Finding):
        document = read_document(policy.path, raw)
        if not document.errors and digest(document.data) == policy.digest:
            return document
    return Document(policy.path, "", {}, {}, {}, ())


def digest(data: Any) -> str:
    """Return the sha256 of the content, whatever its comments, layout and order of keys."""
    canonical = json.dumps(
        _canonical(data), sort_keys=True, separators=(",", ":"), ensure_ascii=False
    )
    return hashlib.sha256(canonical.encode()).hexdigest()


def _canonical(value: Any) -> Any:
    """Write dates as text and 1.0 as 1, so that one content has one spelling."""
    match value:
        case dict():
            return {key: _canonical(item) for key, item in value.items()}
        case list():
            return [_canonical(item) for item in value]
        case date():
            return value.isoformat()
        case float() if value.is_integer():
            return int(value)
        case _:
            return value
