"""Several features in a new policy: how they may be combined, and what each way matches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from saeguard.cli.inputs import judge_corpus, judgeable, open_corpus
from saeguard.errors import InputError
from saeguard.features.reading import PEAK
from saeguard.policy.load import parse_policy
from saeguard.policy_tools.scaffold import COMBINED, Combine, Draft, draft

if TYPE_CHECKING:
    from saeguard.cli.feature_folder import FeatureSets


def which_is_meant(features: Sequence[str], counts: Mapping[Combine, str]) -> str:
    """Return the question how several features are to be combined.

    Args:
        features: that were asked for.
        counts: how many texts of a corpus match, by way to combine; empty without a corpus.
    """
    names = " and ".join(features)
    lines = [f"--combine: {names} can be combined in {len(COMBINED)} ways; say which is meant:"]
    for way, words in COMBINED.items():
        matches = f" ({counts[way]} match)" if way in counts else ""
        lines.append(f"  --combine {way:8} {words}{matches}")
    if not counts:
        lines.append("--corpus with texts that should match counts how many do in each way")
    return "\n".join(lines)


def check_combined(wanted: Draft) -> None:
    """Refuse `--combine request` for a reading that the calibration did not measure.

    Raises:
        InputError: one strong token would be enough, or count at the end, unlike in calibration.
    """
    reading = wanted.reading
    if (
        wanted.combine == "request"
        and len(wanted.thresholds) > 1
        and not reading.mean
        and (reading != PEAK)
    ):
        raise InputError(
            f"--combine request: the features were calibrated for `for: {reading.window}`, and the "
            "maximum of the request passes by one token; calibrate with --for '1 of 1 tokens', or "
            "use --combine token or any"
        )


def matching(
    wanted: Draft, sets: FeatureSets, corpus: Path, model: Path | None, feature_sets: Path
) -> dict[Combine, str]:
    """Return how many texts of a corpus match, by way to combine the features.

    Raises:
        InputError: the corpus cannot be read, or the features are not calibrated.
    """
    policies = []
    for way in COMBINED:
        text, _ = draft(replace(wanted, combine=way), "", datetime.now(UTC).date())
        policy, _ = parse_policy(Path(f"{wanted.id}.yaml"), text.encode())
        assert policy is not None
        policies.append(policy)
    ready, notes = judgeable(policies, sets)
    if notes:
        raise InputError(f"--corpus: the features of {wanted.feature_set} are not calibrated, so "
             "no text can be judged; leave it out")  # fmt: skip
    recording = open_corpus(corpus, ready, model, feature_sets)
    judged = judge_corpus(ready, sets, recording)
    return {
        way: f"{sum(v[i].outcome == 'match' for v in judged)} of {len(judged)} texts"
        for i, way in enumerate(COMBINED)
    }
