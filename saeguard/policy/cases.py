"""Test files: `NAME.test.yaml` beside a policy, with cases that must match and must not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from saeguard.policy.errors import PolicyError, did_you_mean, show
from saeguard.policy.files import TEST_SUFFIX, read_bytes
from saeguard.policy.schema import FeatureName, PolicyId, Section, ShortText
from saeguard.policy.shape import shape
from saeguard.policy.traces import MAX_TOKENS, TraceError, trace
from saeguard.policy.types import Policy
from saeguard.policy.yamlmarks import Document, Loc, read_document

Tokens = Annotated[int, Field(ge=0, le=MAX_TOKENS)]


class CaseSection(Section):
    """One text, as the shares that its tokens have."""

    name: ShortText = Field(description="What the text is, or what the case shows.")
    prompt_tokens: Tokens = Field(description="How many of the tokens are the prompt.")
    shares: dict[FeatureName, str] = Field(
        min_length=1,
        description="Per feature one share per token: 0x4 0.9x3 0. All of one length; a feature "
        "of the policy that is left out is 0 throughout.",
    )
    expect: Literal["match", "no_match"] = Field(description="The verdict.")
    first_token: Tokens | None = Field(
        default=None, description="Position of the first match, counted from 0."
    )
    matched_tokens: Tokens | None = Field(
        default=None, description="At how many tokens the policy is on, those kept on included."
    )


class CaseFile(Section):
    """The tests of one policy."""

    schema_: Literal["saeguard.test/v1"] = Field(
        alias="schema", description="The version of this format."
    )
    policy: PolicyId = Field(description="The id of the policy in the file beside this one.")
    cases: list[CaseSection] = Field(
        min_length=2, max_length=500, description="At least one match and one no_match."
    )


@dataclass(frozen=True, slots=True)
class Case:
    """One text and the verdict that a policy must reach on it."""

    name: str
    prompt_tokens: int
    shares: Mapping[str, list[float]]
    """Per feature of the policy, one share per token."""
    expect: Literal["match", "no_match"]
    first_token: int | None
    matched_tokens: int | None
    line: int
    """Where the case starts in its file."""


def cases_path(policy: Path) -> Path:
    """Return where the tests of a policy file belong."""
    return policy.with_name(policy.name.removesuffix(".yaml") + TEST_SUFFIX)


def policy_path(cases: Path) -> Path:
    """Return which policy file a test file belongs to."""
    return cases.with_name(cases.name.removesuffix(TEST_SUFFIX) + ".yaml")


def read_cases(path: Path, policy: Policy) -> tuple[tuple[Case, ...], list[PolicyError]]:
    """Return the cases of a test file, or everything that is wrong with it."""
    raw = read_bytes(path)
    if isinstance(raw, PolicyError):
        return (), [raw]
    document = read_document(path, raw)
    if document.data is None:
        return (), list(document.errors)
    content, misshapen = shape(CaseFile, document)
    if content is None or document.errors:
        wrong_already = {(error.line, error.column) for error in document.errors}
        follow = [e for e in misshapen if (e.line, e.column) not in wrong_already]
        return (), [*document.errors, *follow]
    errors = [*_whole(document, content, policy)]
    cases = []
    for i, section in enumerate(content.cases):
        case, found = _case(document, section, policy, ("cases", i))
        errors += found
        if case:
            cases.append(case)
    return (() if errors else tuple(cases)), errors


def _whole(document: Document, content: CaseFile, policy: Policy) -> Iterator[PolicyError]:
    if content.policy != policy.id:
        message = f"the policy beside this file is {show(policy.id)}; write that id"
        yield document.error("test-policy", message, ("policy",))
    expected = {case.expect for case in content.cases}
    for missing in sorted({"match", "no_match"} - expected):
        message = f"there is no case with expect: {missing}; add one"
        yield document.error("test-cases", message, ("cases",), at_key=True)
    names: set[str] = set()
    for i, case in enumerate(content.cases):
        if case.name in names:
            message = "a case with this name is above; rename one of them"
            yield document.error("duplicate-name", message, ("cases", i, "name"))
        names.add(case.name)


def _case(
    document: Document, section: CaseSection, policy: Policy, loc: Loc
) -> tuple[Case | None, list[PolicyError]]:
    errors: list[PolicyError] = []
    features = sorted({selection.feature for selection in policy.detect.values()})
    shares: dict[str, list[float]] = {}
    length = 0
    for feature, text in section.shares.items():
        at = (*loc, "shares", feature)
        if feature not in features:
            hint = did_you_mean(feature, features)
            message = (
                f"the policy does not look at {show(feature)}; {hint}it looks at: "
                f"{', '.join(features)}"
            )
            errors.append(document.error("unknown-feature", message, at, at_key=True))
            continue
        try:
            shares[feature] = trace(text)
        except TraceError as error:
            found = document.error("test-trace", str(error), at, offset=error.offset)
            errors.append(found)
            continue
        length = length or len(shares[feature])
        if len(shares[feature]) != length:
            message = (
                f"this trace has {len(shares[feature])} tokens, the one before it has {length}; "
                "give all of a case the same number"
            )
            errors.append(document.error("test-trace", message, at))
    errors += _expectations(document, section, length, loc)
    if errors:
        return None, errors
    quiet = [0.0] * length
    case = Case(
        name=section.name,
        prompt_tokens=section.prompt_tokens,
        shares={feature: shares.get(feature, quiet) for feature in features},
        expect=section.expect,
        first_token=section.first_token,
        matched_tokens=section.matched_tokens,
        line=document.values[loc].line,
    )
    return case, []


def _expectations(
    document: Document, section: CaseSection, length: int, loc: Loc
) -> Iterator[PolicyError]:
    if length and section.prompt_tokens > length:
        message = f"the prompt is longer than the whole text of {length} tokens"
        yield document.error("test-expectation", message, (*loc, "prompt_tokens"))
    for key in ("first_token", "matched_tokens"):
        value = getattr(section, key)
        if value is not None and section.expect == "no_match":
            message = f"{key} goes with expect: match only; remove it"
            yield document.error("test-expectation", message, (*loc, key), at_key=True)
        elif value is not None and length and value >= length + (key == "matched_tokens"):
            message = f"the text has only {length} tokens, counted from 0"
            yield document.error("test-expectation", message, (*loc, key))
