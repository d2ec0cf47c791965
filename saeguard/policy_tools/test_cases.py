"""Test files: `NAME.test.yaml` beside a policy, with cases that must match and must not.

A case gives its tokens in one of three ways, the quickest first: as traces of shares, as a text of
a recording beside the file, or as a text for a model to read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from saeguard.policy.files import TEST_SUFFIX
from saeguard.policy.types import Policy
from saeguard.policy_tools.test_case_schema import CaseFile, CaseSection
from saeguard.policy_tools.traces import TraceError, trace
from saeguard.yaml_files.findings import Finding, did_you_mean, show
from saeguard.yaml_files.raw import read_bytes
from saeguard.yaml_files.reader import Document, FileKind, Loc, read_document
from saeguard.yaml_files.validate import merged, shape

KIND = FileKind("test")


@dataclass(frozen=True, slots=True)
class Trace:
    """Tokens given by the shares they have."""

    prompt_tokens: int
    shares: Mapping[str, list[float]]
    """Per feature of the policy, one share per token."""
    roles: tuple[str, ...] = ()
    """The role of each token of the prompt."""


@dataclass(frozen=True, slots=True)
class Recorded:
    """A text of a recording."""

    path: Path
    text: str
    """Which of the recording's texts."""


@dataclass(frozen=True, slots=True)
class PlainText:
    """A text for a model to read."""

    prompt: str | tuple[tuple[str, str], ...]
    """A text, or the role and content of each message."""
    completion: str


@dataclass(frozen=True, slots=True)
class Case:
    """One text and the verdict that a policy must reach on it."""

    name: str
    given: Trace | Recorded | PlainText
    expect: Literal["match", "no_match"]
    first_token: int | None
    matched_tokens: int | None
    todo: bool
    """Whether it is known not to hold yet."""
    line: int
    """The line in which the case starts."""


def cases_path(policy: Path) -> Path:
    """Return the path of a policy file's tests."""
    return policy.with_name(policy.name.removesuffix(".yaml") + TEST_SUFFIX)


def policy_path(cases: Path) -> Path:
    """Return the path of the policy file that a test file belongs to."""
    return cases.with_name(cases.name.removesuffix(TEST_SUFFIX) + ".yaml")


def missing_tests(policy: Policy) -> Finding:
    """Return the finding that a policy has no tests."""
    name = cases_path(policy.path).name
    message = f"the policy has no tests; write {name} beside it"
    return Finding(policy.path, 0, 0, "test-missing", message)


def read_cases(path: Path, policy: Policy) -> tuple[tuple[Case, ...], list[Finding]]:
    """Return the cases of a test file, or everything that is wrong with it."""
    raw = read_bytes(path, KIND)
    if isinstance(raw, Finding):
        return (), [raw]
    document = read_document(path, raw, KIND)
    if document.data is None:
        return (), list(document.errors)
    content, misshapen = shape(CaseFile, document)
    if content is None or document.errors:
        return (), merged(document, misshapen)
    errors = [*_whole(document, content, policy)]
    cases = []
    for i, section in enumerate(content.cases):
        case, found = _case(document, section, policy, ("cases", i))
        errors += found
        if case:
            cases.append(case)
    return (() if errors else tuple(cases)), errors


def _whole(document: Document, content: CaseFile, policy: Policy) -> Iterator[Finding]:
    if content.policy != policy.id:
        message = f"the policy beside this file is {show(policy.id)}; write that id"
        yield document.error("test-policy", message, ("policy",))
    expected = {case.expect for case in content.cases if not case.todo}
    for missing in sorted({"match", "no_match"} - expected):
        message = f"expected a case with expect: {missing} that must pass, found none; add one"
        yield document.error("test-cases", message, ("cases",), at_key=True)
    names: set[str] = set()
    for i, case in enumerate(content.cases):
        if case.name in names:
            message = "a case with this name is above; rename one of them"
            yield document.error("duplicate-name", message, ("cases", i, "name"))
        names.add(case.name)


def _case(
    document: Document, section: CaseSection, policy: Policy, loc: Loc
) -> tuple[Case | None, list[Finding]]:
    errors = [*_ways(document, section, loc)]
    given: Trace | Recorded | PlainText
    if section.shares is not None:
        given, found = _trace(document, section, section.shares, policy, loc)
        errors += found
    elif section.recording is not None:
        given = Recorded(document.path.with_name(section.recording), section.recorded_text or "")
        if not given.path.is_file():
            message = f"there is no {section.recording} beside this file; make it with "
            message += "`saeguard policy record`"
            errors.append(document.error("test-recording", message, (*loc, "recording")))
    else:
        messages = tuple((m.role, m.content) for m in section.messages or ())
        given = PlainText(messages or section.prompt or "", section.completion or "")
    errors += _expectations(document, section, given, loc)
    if errors:
        return None, errors
    case = Case(
        name=section.name,
        given=given,
        expect=section.expect,
        first_token=section.first_token,
        matched_tokens=section.matched_tokens,
        todo=section.todo,
        line=document.values[loc].line,
    )
    return case, []


def _ways(document: Document, section: CaseSection, loc: Loc) -> Iterator[Finding]:
    """Yield findings if a case does not give its tokens in exactly one of the three ways."""
    ways = {
        "shares": ("shares", "prompt_tokens", "roles"),
        "recording": ("recording", "recorded_text"),
        "text": ("prompt", "messages", "completion"),
    }
    used = {
        way: [key for key in keys if getattr(section, key) is not None]
        for way, keys in ways.items()
    }
    given = [way for way, keys in used.items() if keys]
    if len(given) != 1:
        what = "a case gives its tokens in one way: shares with prompt_tokens, recording with "
        what += "recorded_text, or a text by prompt or messages, completion"
        yield document.error("test-kind", what, loc)
        return
    missing = [key for key in ways[given[0]] if key not in used[given[0]] and key != "roles"]
    if given != ["text"]:
        for key in missing:
            message = f'{used[given[0]][0]} needs the key "{key}"; add it'
            yield document.error("test-kind", message, loc)
    elif {"prompt", "messages"} <= set(used["text"]):
        message = "there are both prompt and messages; keep one of them"
        yield document.error("test-kind", message, (*loc, "messages"), at_key=True)


def _trace(
    document: Document,
    section: CaseSection,
    written: Mapping[str, str],
    policy: Policy,
    loc: Loc,
) -> tuple[Trace, list[Finding]]:
    errors: list[Finding] = []
    features = sorted({selection.feature for selection in policy.detect.values()})
    shares: dict[str, list[float]] = {}
    length = 0
    for feature, text in written.items():
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
    quiet = [0.0] * length
    by_feature = {feature: shares.get(feature, quiet) for feature in features}
    prompt = section.prompt_tokens or 0
    roles: list[str] = ["user"] * prompt
    if section.roles is not None:
        roles = [r for run in section.roles.split(", ") for r in _run(run)]
        if len(roles) != prompt:
            message = f"these are {len(roles)} tokens, the prompt has {prompt}"
            errors.append(document.error("test-trace", message, (*loc, "roles")))
    return Trace(prompt, by_feature, tuple(roles)), errors


def _run(text: str) -> list[str]:
    times, role = text.split(" ")
    return [role] * int(times)


def _expectations(
    document: Document, section: CaseSection, given: Trace | Recorded | PlainText, loc: Loc
) -> Iterator[Finding]:
    length = 0
    if isinstance(given, Trace):
        length = max(map(len, given.shares.values()), default=0)
        if length and given.prompt_tokens > length:
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
