"""The text of a new policy and of its tests, with TODO marks for its owner to replace."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import date, timedelta

REVIEW = timedelta(days=180)

POLICY = """\
# yaml-language-server: $schema={schema}
schema: saeguard.policy/v1
id: {id}
title: "TODO: what it watches for, in one line"
owner: "TODO: who answers for it, such as safety@example.com"
severity: medium                # low | medium | high | critical
mode: shadow                    # shadow reports, enforce acts; stay in shadow until it is measured
action: flag                    # log | flag | clamp | stop
on_error: allow                 # allow | stop
scope: output                   # prompt | output | both
feature_set: {feature_set}
rationale: "TODO: what fires, and why that matters"
falsepositives:
  - "TODO: harmless texts that will match"
review_by: {review_by}
detect:
{detect}
condition: {condition}
for: 1 of 1 tokens              # 3 of 8 tokens asks for more than one
"""

TESTS = """\
# yaml-language-server: $schema={schema}
schema: saeguard.test/v1
policy: {id}
cases:
  - name: it shows
    prompt_tokens: 4
    shares:
{high}
    expect: match
    first_token: 6
  - name: nearly, but no more than the threshold
    prompt_tokens: 4
    shares:
{low}
    expect: no_match
  - name: only the prompt shows it
    prompt_tokens: 8
    shares:
{prompt}
    expect: no_match
"""


def draft(
    id_: str, feature_set: str, thresholds: Mapping[str, float], schema: str, today: date
) -> tuple[str, str]:
    """Return a policy that watches for every one of some features, and its tests.

    Args:
        id_: of the policy.
        feature_set: by the name that policies use.
        thresholds: share above which each feature holds.
        schema: path of the folder with the JSON Schemas, from the policy's folder.
        today: the day of review is half a year later.
    """
    names = {feature: feature.lower() for feature in thresholds}
    detect = "\n".join(
        f"  {names[feature]}: {{feature: {feature}, above: {above:g}}}"
        for feature, above in thresholds.items()
    )
    policy = POLICY.format(
        schema=f"{schema}saeguard.policy.v1.json",
        id=id_,
        feature_set=feature_set,
        review_by=(today + REVIEW).isoformat(),
        detect=detect,
        condition=" and ".join(names.values()),
    )

    def traces(pattern: str, factor: float) -> str:
        return "\n".join(
            f"      {feature}: {pattern.format(round(above * factor, 4))}"
            for feature, above in thresholds.items()
        )

    tests = TESTS.format(
        schema=f"{schema}saeguard.test.v1.json",
        id=id_,
        high=traces("0x6 {:g}x3 0x5", 1.5),
        low=traces("0x4 {:g}x10", 1.0),
        prompt=traces("0x2 {:g}x6 0x6", 1.5),
    )
    return policy, tests
