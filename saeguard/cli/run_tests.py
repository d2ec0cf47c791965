"""Run the cases of test files: on traces, on recordings, and on texts that a model reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from saeguard.cli.options import ModelOptions
from saeguard.guard.scopes import ROLES
from saeguard.policy.types import Policy
from saeguard.policy_tools.explanation import Explanation, explain, explain_trace
from saeguard.policy_tools.nearest import in_short
from saeguard.policy_tools.recording import Recording, RecordingError, read_recording
from saeguard.policy_tools.test_cases import Case, PlainText, Recorded, Trace
from saeguard.policy_tools.test_results import Result, compare

if TYPE_CHECKING:
    from saeguard.cli.feature_folder import FeatureSets

NO_SETS = "no folder of feature sets to judge it with; give --feature-sets"


def run_cases(
    cases: Sequence[tuple[Policy, Case]],
    sets: FeatureSets | None,
    model: Path | None,
    feature_sets: Path,
    options: ModelOptions = ModelOptions(),  # noqa: B008 - immutable
) -> list[Result]:
    """Return the result of each case, in their order.

    Args:
        cases: each with its policy.
        sets: the feature sets; needed for recordings and texts.
        model: folder of a Hugging Face model; if None, cases with texts are skipped.
        feature_sets: the folder that `sets` was read from.
        options: how the model is loaded.
    """
    known = sets.known if sets else {}
    said = [(p, c) for p, c in cases if isinstance(c.given, PlainText) and p.feature_set in known]
    read = _read_texts(said, model, feature_sets, options) if model and said else None
    recordings: dict[Path, Recording] = {}
    results = []
    for policy, case in cases:
        match case.given:
            case Trace():
                results.append(run(policy, case))
            case PlainText() if model is None:
                results.append(Result(policy, case, None, "skipped", "needs a model"))
            case Recorded() | PlainText():
                results.append(_recorded(policy, case, sets, recordings, read))
    return results


def run(policy: Policy, case: Case) -> Result:
    """Judge a case that spells out its shares."""
    assert isinstance(case.given, Trace)
    shares = {feature: np.asarray(trace) for feature, trace in case.given.shares.items()}
    roles = np.array([ROLES.index(role) for role in case.given.roles], np.uint8)
    return explained(policy, case, explain_trace(policy, shares, case.given.prompt_tokens, roles))


def explained(policy: Policy, case: Case, found: Explanation) -> Result:
    """Return the result of a case that was judged; a failure names what decided its verdict."""
    result = compare(policy, case, found.verdict)
    if result.status not in {"failed", "todo"}:
        return result
    return replace(result, complaint=f"{result.complaint}; {in_short(found)}")


def _recorded(
    policy: Policy,
    case: Case,
    sets: FeatureSets | None,
    recordings: dict[Path, Recording],
    read: Recording | None,
) -> Result:
    """Judge a case whose shares are in a recording; a case that cannot be judged fails."""

    def failed(why: str) -> Result:
        return Result(policy, case, None, "todo" if case.todo else "failed", why)

    if sets is None:
        return failed(NO_SETS)
    if policy.feature_set in sets.templates:
        return failed(f"the features of {policy.feature_set} are not calibrated, so only shares "
                      "can be judged")  # fmt: skip
    if policy.feature_set not in sets.known:
        return failed(
            f"the feature set {policy.feature_set} is missing or wrong, see `saeguard check`"
        )
    try:
        if isinstance(case.given, Recorded):
            path = case.given.path
            if path not in recordings:
                recordings[path] = read_recording(path)
            recording, text = recordings[path], recordings[path].text(case.given.text)
        else:
            assert read is not None
            recording, text = read, read.text(_name(policy, case))
        found = explain(policy, sets.known, recording, text)
    except RecordingError as error:
        return failed(str(error))
    return explained(policy, case, found)


def _read_texts(
    cases: Sequence[tuple[Policy, Case]], model: Path, feature_sets: Path, options: ModelOptions
) -> Recording:
    """Record the texts of `cases`."""
    from saeguard.hf.model import load_model
    from saeguard.hf.texts import make_text
    from saeguard.policy_tools.record_features import record_features

    lm = load_model(model, **options._asdict())
    texts = [
        make_text(_name(policy, case), lm.tokenizer, case.given.prompt, case.given.completion)
        for policy, case in cases
        if isinstance(case.given, PlainText)
    ]
    names = sorted({policy.feature_set for policy, _ in cases})
    files = [feature_sets / f"{name}.yaml" for name in names]
    return record_features(lm, files, texts, path=model)


def _name(policy: Policy, case: Case) -> str:
    return f"{policy.path}:{case.line}"
