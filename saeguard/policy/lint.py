"""Check loaded policies against what they refer to: feature sets, the engine, the calendar."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Protocol

from saeguard.features.feature_template import is_template
from saeguard.features.schema import FeatureSetFile, layers_read
from saeguard.features.topk_thresholds import Approximation, approximation
from saeguard.policy.errors import PolicyErrors
from saeguard.policy.load import locate
from saeguard.policy.published import acts_on_published
from saeguard.policy.types import Policy
from saeguard.policy.weak import weak
from saeguard.yaml_files.codes import Code
from saeguard.yaml_files.findings import Finding, Level, did_you_mean, show
from saeguard.yaml_files.reader import Loc

TO_DO = "TODO"
"""Starts a text that `saeguard policy new` left for its owner."""


class Clampable(Protocol):
    """A feature, loaded or as written in its file."""

    @property
    def clamp(self) -> Collection[object]:
        """The latents to edit, if it names any."""


class Features(Protocol):
    """A feature set, loaded or as written in its file, or the template of one."""

    @property
    def features(self) -> Mapping[str, Clampable]:
        """Its features by name."""


def resolve(
    policies: Iterable[Policy],
    feature_sets: Mapping[str, Features],
    *,
    templates: Mapping[str, Features] | None = None,
    today: date | None = None,
) -> tuple[Finding, ...]:
    """Return findings: errors for what does not fit, warnings for dates that have passed, notes.

    Args:
        policies: what `load_policies` returned.
        feature_sets: by the name that policies use.
        templates: those without calibrated features, likewise.
        today: for tests; the present day in UTC.
    """
    today = today or datetime.now(UTC).date()
    open_ = templates or {}
    return tuple(
        finding
        for policy in policies
        for findings in (
            _features(policy, {**feature_sets, **open_}),
            [uncalibrated(policy)] if policy.feature_set in open_ else (),
            _dates(policy, today),
            _forgeable(policy),
            _to_do(policy),
        )
        for finding in findings
    )


def uncalibrated(policy: Policy) -> Finding:
    """Return the finding that a feature set is a template: an error if the policy is enforced."""
    features = ", ".join(dict.fromkeys(s.feature for s in policy.detect.values()))
    message = (
        f"the feature set {show(policy.feature_set)} is a template: find and calibrate {features} "
        "in your model, and name your own feature set here"
    )
    if policy.mode == "enforce":
        message += "; until then the policy cannot be enforced, write mode: shadow"
        return _at(policy, "not-calibrated", message, ("feature_set",))
    message += "; until then the policy is tested but not served"
    return _at(policy, "not-calibrated", message, ("feature_set",), level="note")


def leave_out_templates(
    policies: Sequence[Policy], feature_sets: Path
) -> tuple[tuple[Policy, ...], tuple[Finding, ...]]:
    """Return the policies that can be served, and a note on each whose features are a template.

    Args:
        policies: as they were loaded.
        feature_sets: the folder of feature sets.

    Raises:
        PolicyErrors: an enforced policy has a template, so it would seem to guard and look at
            nothing.
    """
    names = {policy.feature_set for policy in policies}
    open_ = {name for name in names if is_template(feature_sets / f"{name}.yaml")}
    notes = [uncalibrated(policy) for policy in policies if policy.feature_set in open_]
    errors = [note for note in notes if note.level == "error"]
    if errors:
        raise PolicyErrors(errors)
    return tuple(policy for policy in policies if policy.feature_set not in open_), tuple(notes)


def of_feature_set(policy: Policy, document: FeatureSetFile) -> Iterator[Finding]:
    """Yield findings about what a policy does with its feature set.

    Args:
        policy: over the set.
        document: the set's file.
    """
    acting = acts_on_published(policy, document.status)
    if acting is not None:
        yield acting
    yield from _seen_by_clamp(policy, document)
    yield from weak(policy, document, review=True)
    stand_ins = stand_ins_read(policy, document)
    if stand_ins is not None:
        message = (
            f"TopK latents of {show(policy.feature_set)} are {stand_ins.in_words}; "
            "`saeguard features calibrate --topk exact` ranks them exactly"
        )
        yield _at(policy, "approximate-topk", message, ("feature_set",), level="warning")


def _seen_by_clamp(policy: Policy, document: FeatureSetFile) -> Iterator[Finding]:
    """Yield a finding for each feature that a clamp cannot see, because it reads another layer."""
    if policy.action != "clamp" or document.sae is None:
        return
    for name, selection in policy.detect.items():
        part = document.features.get(selection.feature)
        if part is None or part.probe is None:
            continue
        layers = layers_read(part.probe, document.sae)
        if layers != (document.sae.layer,):
            message = (
                f"{show(selection.feature)} is a probe on layer {', '.join(map(str, layers))}, but "
                f"the clamp edits layer {document.sae.layer} and sees nothing else; detect by "
                "features of that layer, or use another action"
            )
            yield _at(policy, "clamp-layer", message, ("detect", name, "feature"))


def stand_ins_read(policy: Policy, document: FeatureSetFile) -> Approximation | None:
    """Return the thresholds that replace ranks, None if the policy reads no such latent.

    Args:
        policy: over the set; its probes need none.
        document: the set's file.
    """
    measured = None if document.sae is None else document.sae.topk_measured
    clamped = policy.clamp.features if policy.clamp else ()
    names = [*(s.feature for s in policy.detect.values()), *clamped]
    read = [document.features[name] for name in names if name in document.features]
    if measured is None or not any(part.detect or part.clamp for part in read):
        return None
    return approximation(measured)


def _to_do(policy: Policy) -> Iterator[Finding]:
    """Yield a finding for each text that is still TODO: errors if the policy is enforced."""
    texts = (policy.title, policy.owner, policy.rationale, *policy.falsepositives)
    if not any(text.startswith(TO_DO) for text in texts):
        return
    document = locate(policy)
    level: Level = "error" if policy.mode == "enforce" else "warning"
    for loc in document.values:
        text = document.at(loc)
        if isinstance(text, str) and text.startswith(TO_DO):
            what = text.removeprefix(TO_DO).strip(" :") or "fill this in"
            yield _at(policy, "to-do", f"still to do: {what}", loc, level=level)


def _features(policy: Policy, feature_sets: Mapping[str, Features]) -> Iterator[Finding]:
    found = feature_sets.get(policy.feature_set)
    if found is None:
        name = policy.feature_set
        last = name.removesuffix(".yaml").rpartition("/")[2]  # of a path
        hint = did_you_mean(name, feature_sets) or did_you_mean(last, feature_sets)
        known = (
            f"there are: {', '.join(sorted(feature_sets))}" if feature_sets else "none was found"
        )
        message = f"there is no feature set {show(name)}; {hint}{known}"
        yield _at(policy, "unknown-feature-set", message, ("feature_set",))
        return
    wanted: list[tuple[str, Loc]] = [
        (s.feature, ("detect", name, "feature")) for name, s in policy.detect.items()
    ]
    clamped = policy.clamp.features if policy.clamp else ()
    wanted += [(feature, ("clamp", "features", i)) for i, feature in enumerate(clamped)]
    for feature, loc in wanted:
        if feature not in found.features:
            hint = did_you_mean(feature, found.features)
            known = ", ".join(sorted(found.features)[:20])
            message = (
                f"the feature set {show(policy.feature_set)} has no feature {show(feature)}; "
                f"{hint}there are: {known}"
            )
            yield _at(policy, "unknown-feature", message, loc)
        elif loc[0] == "clamp" and not found.features[feature].clamp:
            able = [name for name, f in found.features.items() if f.clamp]
            message = (
                f"the feature {show(feature)} names no latents to clamp; "
                f"those that do: {', '.join(sorted(able)) or 'none'}"
            )
            yield _at(policy, "no-clamp-latents", message, loc)


def _dates(policy: Policy, today: date) -> Iterator[Finding]:
    for i, exception in enumerate(policy.exceptions):
        if exception.expires < today:
            message = f"the exception has expired; remove it, or ask {exception.owner}"
            loc = ("exceptions", i, "expires")
            yield _at(policy, "exception-expired", message, loc, level="warning")
    if policy.review_by and policy.review_by < today:
        message = f"the day has passed; ask {policy.owner} to review the policy and set a new one"
        yield _at(policy, "review-due", message, ("review_by",), level="warning")


def _forgeable(policy: Policy) -> Iterator[Finding]:
    """Yield a note if the caller of the API can move a text out of an enforced policy's scope."""
    if policy.mode == "enforce" and policy.scope == "user":
        message = (
            "the caller of the API can forge the end of the user's message, and the policy does "
            "not see what follows; if evasion matters, use scope: prompt"
        )
        yield _at(policy, "forgeable-turn", message, ("scope",), level="note")
    if policy.mode == "enforce" and policy.scope == "output":
        message = (
            "the caller of the API can send what was written back, as a finished message or a "
            "plain prompt, for more of it; the policy does not look there; if evasion matters, "
            "use scope: both"
        )
        yield _at(policy, "text-in-pieces", message, ("scope",), level="note")


def _at(policy: Policy, code: Code, message: str, loc: Loc, *, level: Level = "error") -> Finding:
    return replace(locate(policy).error(code, message, loc), level=level)
