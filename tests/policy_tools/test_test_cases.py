"""Test files of policies."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from saeguard.policy_tools.test_cases import (
    Case,
    PlainText,
    Recorded,
    Trace,
    cases_path,
    policy_path,
    read_cases,
)
from saeguard.policy_tools.traces import TraceError, trace
from saeguard.yaml_files.findings import Finding
from tests.policy.example import policy

CASES = """\
schema: saeguard.test/v1
policy: unsafe-code.shell-injection
cases:
  - name: fires
    prompt_tokens: 2
    shares:
      shell_exec: 0x2 0.9x3 0
      string_built: 0x2 0.9x4
    expect: match
    first_token: 4
    matched_tokens: 2
  - name: stays quiet
    prompt_tokens: 2
    shares: {shell_exec: 0.1 0.2x5}
    expect: no_match
"""


def read(folder: Path, *changes: tuple[str, str]) -> tuple[tuple[Case, ...], list[Finding]]:
    """Read the test file above with changes."""
    text = CASES
    for old, new in changes:
        assert old in text, old
        text = text.replace(old, new, 1)
    path = folder / "p.test.yaml"
    path.write_text(text)
    return read_cases(path, policy(folder))


def test_read(tmp_path: Path) -> None:
    """Traces are unfolded, and features left out are quiet."""
    cases, errors = read(tmp_path)

    assert errors == []
    assert cases == (
        Case(
            name="fires",
            given=Trace(
                prompt_tokens=2,
                shares={
                    "shell_exec": [0, 0, 0.9, 0.9, 0.9, 0],
                    "string_built": [0, 0, 0.9, 0.9, 0.9, 0.9],
                },
                roles=("user", "user"),
            ),
            expect="match",
            first_token=4,
            matched_tokens=2,
            todo=False,
            line=4,
        ),
        Case(
            name="stays quiet",
            given=Trace(
                prompt_tokens=2,
                shares={"shell_exec": [0.1, 0.2, 0.2, 0.2, 0.2, 0.2], "string_built": [0] * 6},
                roles=("user", "user"),
            ),
            expect="no_match",
            first_token=None,
            matched_tokens=None,
            todo=False,
            line=12,
        ),
    )


@pytest.mark.parametrize(
    ("old", "new", "place", "message"),
    [
        (
            "policy: unsafe-code.shell-injection",
            "policy: other",
            "2:9 test-policy",
            'the policy beside this file is "unsafe-code.shell-injection"; write that id',
        ),
        (
            "expect: no_match",
            "expect: match",
            "3:1 test-cases",
            "expected a case with expect: no_match that must pass, found none; add one",
        ),
        (
            "expect: match\n    first_token: 4\n    matched_tokens: 2",
            "expect: no_match",
            "3:1 test-cases",
            "expected a case with expect: match that must pass, found none; add one",
        ),
        (
            "name: stays quiet",
            "name: fires",
            "12:11 duplicate-name",
            "a case with this name is above; rename one of them",
        ),
        (
            "string_built: 0x2",
            "string_bilt: 0x2",
            "8:7 unknown-feature",
            (
                'the policy does not look at "string_bilt"; did you mean "string_built"? '
                "it looks at: shell_exec, string_built"
            ),
        ),
        (
            "string_built: 0x2 0.9x4",
            "string_built: 0x2 0.9x5",
            "8:21 test-trace",
            "this trace has 7 tokens, the one before it has 6; give all of a case the same number",
        ),
        (
            "0x2 0.9x3 0",
            "0x2 0.9*3 0",
            "7:23 test-trace",
            'found "0.9*3"; write a share, or share x tokens: 0.9 or 0.9x3',
        ),
        (
            "prompt_tokens: 2",
            "prompt_tokens: 7",
            "5:20 test-expectation",
            "the prompt is longer than the whole text of 6 tokens",
        ),
        (
            "first_token: 4",
            "first_token: 6",
            "10:18 test-expectation",
            "the text has only 6 tokens, counted from 0",
        ),
        (
            "    expect: no_match",
            "    expect: no_match\n    first_token: 3",
            "16:5 test-expectation",
            "first_token goes with expect: match only; remove it",
        ),
        (
            "{shell_exec: 0.1 0.2x5}",
            "{shell_exec: 0x6}",
            "14:26 ambiguous-value",
            (
                "found 0x6 without quotes: YAML readers disagree on this number; write it in "
                "plain decimals such as 0.5 or 12, or put it in quotes if it is text"
            ),
        ),
        (
            "    expect: no_match",
            "    expect: no_match\n    todo: true",
            "3:1 test-cases",
            "expected a case with expect: no_match that must pass, found none; add one",
        ),
        (
            "    prompt_tokens: 2\n    shares: {shell_exec: 0.1 0.2x5}\n",
            "",
            "12:5 test-kind",
            (
                "a case gives its tokens in one way: shares with prompt_tokens, recording with "
                "recorded_text, or a text by prompt or messages, completion"
            ),
        ),
        (
            "    prompt_tokens: 2\n    shares: {shell_exec",
            "    completion: x\n    shares: {shell_exec",
            "12:5 test-kind",
            (
                "a case gives its tokens in one way: shares with prompt_tokens, recording with "
                "recorded_text, or a text by prompt or messages, completion"
            ),
        ),
        (
            "    prompt_tokens: 2\n    shares: {shell_exec",
            "    shares: {shell_exec",
            "12:5 test-kind",
            'shares needs the key "prompt_tokens"; add it',
        ),
        (
            "    prompt_tokens: 2\n    shares: {shell_exec: 0.1 0.2x5}\n",
            "    prompt: a\n    messages: [{role: user, content: a}]\n",
            "14:5 test-kind",
            "there are both prompt and messages; keep one of them",
        ),
        (
            "    prompt_tokens: 2\n    shares: {shell_exec: 0.1 0.2x5}\n",
            "    recording: p.safetensors\n    recorded_text: t\n",
            "13:16 test-recording",
            ("there is no p.safetensors beside this file; make it with `saeguard policy record`"),
        ),
        (
            "    prompt_tokens: 2\n    shares: {shell_exec: 0.1 0.2x5}\n",
            "    recording: ../p.safetensors\n    recorded_text: t\n",
            "13:16 bad-name",
            (
                'found "../p.safetensors"; write the name of a file beside this one, such as '
                "shell-command.safetensors"
            ),
        ),
        ("expect: no_match", "expects: no_match", "15:5 unknown-key", None),
        ("expect: no_match", "expect: nomatch", "15:13 not-allowed", None),
        ("prompt_tokens: 2", "prompt_tokens: -1", "5:20 out-of-range", None),
        ("prompt_tokens: 2", "prompt_tokens: two", "5:20 wrong-type", None),
    ],
)
def test_mistakes(tmp_path: Path, old: str, new: str, place: str, message: str | None) -> None:
    """Each mistake is found where it stands."""
    cases, errors = read(tmp_path, (old, new))

    told = {f"{e.line}:{e.column} {e.code}": e.message for e in errors}
    assert cases == ()
    assert place in told
    assert message in {told[place], None}


def test_three_tiers(tmp_path: Path) -> None:
    """Tokens come as shares, from a recording beside the file, or from a text."""
    (tmp_path / "p.safetensors").write_bytes(b"")
    more = """\
  - {name: recorded, recording: p.safetensors, recorded_text: t, expect: match, todo: true}
  - {name: said, messages: [{role: user, content: hi}], completion: rm, expect: no_match}
  - {name: plain, prompt: hi, expect: no_match}
"""

    cases, errors = read(tmp_path, ("    expect: no_match\n", f"    expect: no_match\n{more}"))

    assert [error.render() for error in errors] == []
    assert [case.given for case in cases[2:]] == [
        Recorded(tmp_path / "p.safetensors", "t"),
        PlainText((("user", "hi"),), "rm"),
        PlainText("hi", ""),
    ]
    assert [case.todo for case in cases] == [False, False, True, False, False]


@given(
    st.lists(
        st.tuples(st.decimals(-99, 99, allow_nan=False, places=2), st.integers(1, 20)), min_size=1
    )
)
def test_traces(runs: list[tuple[float, int]]) -> None:
    """A trace is as long as its runs together, and keeps their values."""
    text = " ".join(f"{value}x{times}" for value, times in runs)

    assert trace(text) == [float(value) for value, times in runs for _ in range(times)]


@given(st.text(alphabet="0123456789.x -e", max_size=20))
def test_traces_are_read_or_refused(text: str) -> None:
    """Anything else is refused at an offset within the text."""
    offset = 0
    try:
        assert trace(text)
    except TraceError as error:
        offset = error.offset

    assert 0 <= offset <= len(text)


def test_paths() -> None:
    """Policy and tests find each other by name."""
    assert cases_path(Path("a/b.c.yaml")) == Path("a/b.c.test.yaml")
    assert policy_path(Path("a/b.c.test.yaml")) == Path("a/b.c.yaml")
