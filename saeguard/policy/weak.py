"""Policies whose features, by their own evidence, catch nothing, or whose clamp is too strong."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from typing import Protocol

from saeguard.features.edit_norm import Clamped, Edit, edit_of
from saeguard.features.reading import Reading
from saeguard.features.weakness import (
    Measured,
    no_better_than_random,
    unmeasured,
    unseen,
    weaknesses,
)
from saeguard.policy.load import locate
from saeguard.policy.types import Policy
from saeguard.yaml_files.findings import Finding, Level, show
from saeguard.yaml_files.reader import Loc


class Part(Measured, Clamped, Protocol):
    """A feature, loaded or as written in its file."""


class Parts(Protocol):
    """A feature set, loaded or as written in its file."""

    @property
    def features(self) -> Mapping[str, Part]:
        """Its features by name."""

    @property
    def status(self) -> str:
        """`published` if nothing was measured, ranges included."""


def weak(
    policy: Policy, of: Parts, may_enforce: Collection[str] = (), *, review: bool = False
) -> Iterator[Finding]:
    """Yield a finding for each reason for which a policy would guard nothing, or too roughly.

    A weak feature is an error if the policy is enforced, unless the policy accepts it; a warning
    otherwise. What is accepted is a note.

    Args:
        policy: over the set; features that the set lacks are passed over.
        of: the set.
        may_enforce: ids of shadow policies that requests may have enforced.
        review: also point at `accept_weak` where nothing is weak, which matters to the author only.
    """
    enforced = policy.mode == "enforce" or policy.id in may_enforce
    found = False
    for name, selection in policy.detect.items():
        feature = of.features.get(selection.feature)
        if feature is None or of.status == "published":
            continue
        window = policy.window
        mean = selection.over.kind == "whole"
        reading = Reading(window.k, window.n or 0, window.last, mean)
        reasons = list(weaknesses(feature, selection.above, reading.words))
        beyond = "" if reasons else unseen(feature, selection.above)
        if beyond:
            found = True
            level: Level = "warning" if policy.accept_weak is None else "note"
            message = f"{show(selection.feature)}: {beyond}"
            here: Loc = ("detect", name, "above")
            yield replace(locate(policy).error("weak-feature", message, here), level=level)
        for reason in reasons:
            found = True
            yield _weak(policy, enforced, name, f"{show(selection.feature)}: {reason}")
        alike = no_better_than_random(feature.evidence)
        if alike:
            message = f"{show(selection.feature)}: {alike}"
            at: Loc = ("detect", name, "feature")
            yield replace(locate(policy).error("weak-feature", message, at), level="warning")
    yield from _unmeasured(policy, of, enforced)
    if review and policy.accept_weak is not None and not found:
        message = "no feature and no threshold of the policy is weak; remove the key"
        finding = locate(policy).error("weak-feature", message, ("accept_weak",), at_key=True)
        yield replace(finding, level="note")
    edit = clamp_edit(policy, of)
    if edit is not None and edit.norm > edit.residual:
        message = (
            f"{edit.in_words}: an edit as long as the residual replaces it, and the text falls "
            "apart; choose a smaller one"
        )
        finding = locate(policy).error("strong-edit", message, ("clamp",), at_key=True)
        yield replace(finding, level="warning")


def clamp_edit(policy: Policy, of: Parts) -> Edit | None:
    """Return the norms of a policy's clamp, None if it has none or they were not measured."""
    if policy.clamp is None or any(name not in of.features for name in policy.clamp.features):
        return None
    clamped = [of.features[name] for name in policy.clamp.features]
    return edit_of(policy.clamp.how, policy.clamp.amount, clamped)


def _unmeasured(policy: Policy, of: Parts, enforced: bool) -> Iterator[Finding]:
    wanted = dict.fromkeys(s.feature for s in policy.detect.values())
    names = [n for n in wanted if n in of.features and unmeasured(of.features[n].evidence)]
    if enforced and names:
        message = (
            f"not measured on labelled texts: {', '.join(names)}, so nothing shows what they "
            "catch; run `saeguard features calibrate --labelled`"
        )
        finding = locate(policy).error("weak-feature", message, ("detect",), at_key=True)
        yield replace(finding, level="note")


def _weak(policy: Policy, enforced: bool, selection: str, reason: str) -> Finding:
    here: Loc = ("detect", selection, "above")
    document = locate(policy)
    if policy.accept_weak is not None:
        message = f"{reason}; accepted: {policy.accept_weak}"
        return replace(document.error("weak-feature", message, here), level="note")
    remedy = "find a better feature, or calibrate on more texts"
    if enforced:
        message = (
            f"{reason}; the policy would guard nothing: {remedy}, write mode: shadow, or state "
            "in accept_weak why it may be enforced all the same"
        )
        return document.error("weak-feature", message, here)
    message = f"{reason}; {remedy} before the policy is enforced"
    return replace(document.error("weak-feature", message, here), level="warning")
