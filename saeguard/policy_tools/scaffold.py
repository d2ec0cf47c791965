"""The text of a new policy and of its tests, with TODO marks for its owner to replace."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from typing import Literal, NamedTuple, TypeAlias

from saeguard.features.reading import PEAK, Reading
from saeguard.policy.types import Scope

REVIEW = timedelta(days=180)
MOST_SO_FAR = "max of the request"

Combine: TypeAlias = Literal["token", "request", "any"]
COMBINED: dict[Combine, str] = {
    "token": "all of them at one and the same token",
    "request": "each of them somewhere in the request, at whatever tokens",
    "any": "one of them is enough",
}
"""How several features make one condition, and what that asks of a text."""

POLICY = """\
# yaml-language-server: $schema={schema}
schema: saeguard.policy/v1
id: {id}
title: {title}
owner: {owner}
severity: medium                # low | medium | high | critical
mode: shadow                    # shadow reports, enforce acts; stay in shadow until it is measured
action: flag                    # log | flag | clamp | stop
on_error: allow                 # allow | stop
scope: {scope:<24} # prompt | output | both
feature_set: {feature_set}
rationale: {rationale}
falsepositives:
  - "TODO: harmless texts that will match"
review_by: {review_by}
detect:
{detect}
condition: {condition}
for: {window:<26} # 3 of 8 tokens asks for more than one
"""

TESTS = """\
# yaml-language-server: $schema={schema}
schema: saeguard.test/v1
policy: {id}
cases:
  - name: it shows
    prompt_tokens: {before}
    shares:
{high}
    expect: match
    first_token: {first}
  - name: nearly, but no more than the threshold
    prompt_tokens: {before}
    shares:
{low}
    expect: no_match
"""

APART = """\
  - name: {name}
    prompt_tokens: {prompt}
    shares:
{apart}
    expect: {expect}
"""

ELSEWHERE = """\
  - name: only the {where} shows it
    prompt_tokens: {prompt}
    shares:
{high}
    expect: no_match
"""

WITHOUT = """\
  - name: all but {feature}
    prompt_tokens: {prompt}
    shares:
{shares}
    expect: no_match
"""

RECORDED = """\
  - name: {name}
    recording: {file}
    recorded_text: {text}
    expect: {expect}
"""


class Recorded(NamedTuple):
    """A test case on a recorded text."""

    name: str
    file: str
    """Of the recording, beside the test file."""
    text: str
    expect: str


@dataclass(frozen=True, slots=True)
class Draft:
    """What a new policy watches for, and how."""

    id: str
    feature_set: str
    """By the name that policies use."""
    thresholds: Mapping[str, float]
    """Share above which each feature holds."""
    scope: Scope = "output"
    reading: Reading = PEAK
    """What the policy writes as `for` and `over`."""
    combine: Combine = "token"
    """Which of the features have to hold, and whether at one token; see `COMBINED`."""
    title: str = "TODO: what it watches for, in one line"
    owner: str = "TODO: who answers for it, such as safety@example.com"
    rationale: str = "TODO: what fires, and why that matters"
    recorded: Sequence[Recorded] = ()


def draft(wanted: Draft, schema: str, today: date) -> tuple[str, str]:
    """Return a policy that watches for some features, and its tests.

    Args:
        wanted: the policy.
        schema: path of the folder with the JSON Schemas, from the policy's folder.
        today: the day of review is half a year later.
    """
    over = wanted.reading.over
    if len(wanted.thresholds) > 1 and wanted.combine == "request":
        over = over or MOST_SO_FAR
    over = f", over: {over}" if over else ""
    names = {feature: feature.lower() for feature in wanted.thresholds}
    detect = "\n".join(
        f"  {names[feature]}: {{feature: {feature}, above: {above:g}{over}}}"
        for feature, above in wanted.thresholds.items()
    )
    policy = POLICY.format(
        schema=f"{schema}saeguard.policy.v1.json",
        id=wanted.id,
        title=json.dumps(wanted.title),
        owner=json.dumps(wanted.owner),
        rationale=json.dumps(wanted.rationale),
        scope=wanted.scope,
        feature_set=wanted.feature_set,
        review_by=(today + REVIEW).isoformat(),
        detect=detect,
        condition=_condition(list(names.values()), wanted.combine),
        window=wanted.reading.window,
    )
    return policy, _tests(wanted, schema)


def _condition(names: Sequence[str], combine: Combine) -> str:
    if combine == "any" and len(names) > 1:
        return f"any of ({', '.join(names)})"
    return " and ".join(names)


def _apart(wanted: Draft, before: int, length: int) -> str:
    """Return a test case whose features are strong, each at a token of its own.

    With `combine: token` no token shows them all, and the case says so. No case if the calibrated
    reading compares means or the last token, for which it does not matter which token is strong.
    """
    if len(wanted.thresholds) == 1 or wanted.reading.last or wanted.reading.n > 1:
        return ""
    if wanted.combine == "any":
        shown = dict.fromkeys([next(iter(wanted.thresholds))], 0)
        name, expect = "one feature alone", "match"
    else:
        shown = {feature: i for i, feature in enumerate(wanted.thresholds)}
        together = wanted.combine == "token"
        name = "every feature shows, but never two at one token"
        expect = "no_match" if together else "match"
    lines = [
        f"      {feature}: 0x{before + i} {round(wanted.thresholds[feature] * 1.5, 4):g} "
        f"0x{length - before - i - 1}"
        for feature, i in shown.items()
    ]
    prompt = length if wanted.scope == "prompt" else 4
    return APART.format(name=name, prompt=prompt, apart="\n".join(lines), expect=expect)


def _without(wanted: Draft, prompt: int, length: int) -> str:
    """Return for each feature a test case in which the others are strong to the end, and it is not.

    No case if one feature is enough.
    """
    if len(wanted.thresholds) == 1 or wanted.combine == "any":
        return ""
    cases = []
    for quiet in wanted.thresholds:
        shares = "\n".join(
            f"      {feature}: 0x4 "
            + (f"0x{length}" if feature == quiet else f"{round(above * 3, 4):g}x{length}")
            for feature, above in wanted.thresholds.items()
        )
        cases.append(WITHOUT.format(feature=quiet, prompt=prompt, shares=shares))
    return "".join(cases)


def _tests(wanted: Draft, schema: str) -> str:
    """Return test cases whose tokens in scope show the features, nearly do, or do not."""
    k = wanted.reading.k
    before, high = 6, k + 2

    def traces(pattern: str, factor: float) -> str:
        return "\n".join(
            f"      {feature}: {pattern.format(round(above * factor, 4))}"
            for feature, above in wanted.thresholds.items()
        )

    passing = traces(f"0x{before} {{:g}}x{high} 0x5", 1.5)
    shown, first = passing, before + k - 1
    if wanted.reading.last:  # strong to the end, and in the mean of all
        shown, first = traces(f"0x{before} {{:g}}x{high + 5}", 3.0), before + high + 4
    # As many tokens as there are, if the policy looks at the prompt; none past its first four else.
    prompt = before + high + 5 if wanted.scope == "prompt" else 4
    # A mean of shares at the threshold may round to just above it.
    nearly = 0.99 if wanted.reading.over else 1.0
    text = TESTS.format(
        schema=f"{schema}saeguard.test.v1.json",
        id=wanted.id,
        before=prompt,
        first=first,
        high=shown,
        low=traces(f"0x4 {{:g}}x{high + 7}", nearly),
    )
    text += _apart(wanted, before, before + high + 5 + len(wanted.thresholds))
    text += _without(wanted, prompt, high + 7)
    if wanted.scope != "both":
        where, tokens = ("answer", 4) if wanted.scope == "prompt" else ("prompt", before + high)
        text += ELSEWHERE.format(where=where, prompt=tokens, high=passing)
    for case in wanted.recorded:
        text += RECORDED.format(
            name=json.dumps(case.name),
            file=case.file,
            text=json.dumps(case.text),
            expect=case.expect,
        )
    return text
