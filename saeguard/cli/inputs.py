"""What the policy tools judge on: recordings, or texts that a model reads first."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from saeguard.cli.failures import BAD_INPUT, model_told, must_be_there, stop, told

if TYPE_CHECKING:
    from saeguard.cli.feature_folder import FeatureSets
    from saeguard.guard.verdict import Verdict
    from saeguard.policy.errors import PolicyError
    from saeguard.policy.types import Policy
    from saeguard.policy_tools.recording import Recording

ModelOption = Annotated[
    Path | None,
    typer.Option("--model", help="Folder of a Hugging Face model, where texts have to be read."),
]


def read_all(paths: Sequence[Path]) -> tuple[Policy, ...]:
    """Return the policies at `paths`.

    Raises:
        PolicyErrors: everything that is wrong with any of them.
    """
    from saeguard.policy.errors import PolicyErrors
    from saeguard.policy.load import read_policies

    policies, errors = read_policies(*paths)
    if errors:
        raise PolicyErrors(errors)
    return policies


def judgeable(
    policies: Iterable[Policy], sets: FeatureSets
) -> tuple[tuple[Policy, ...], list[PolicyError]]:
    """Return the policies whose features are calibrated, and a note on each of the others.

    Raises:
        PolicyErrors: a policy names a feature that there is not.
    """
    from saeguard.policy.errors import PolicyErrors
    from saeguard.policy.lint import resolve, uncalibrated

    policies = tuple(policies)
    wanted = {policy.feature_set for policy in policies}
    wrong = [error for name in wanted for error in sets.broken.get(name, ())]
    known = [policy for policy in policies if policy.feature_set not in sets.broken]
    wrong += [
        finding
        for finding in resolve(known, sets.known, templates=sets.templates)
        if finding.level == "error"
    ]
    if wrong:
        raise PolicyErrors(wrong)
    notes = [uncalibrated(policy) for policy in policies if policy.feature_set in sets.templates]
    return tuple(p for p in policies if p.feature_set in sets.known), notes


def not_judged(ids: Sequence[str]) -> list[str]:
    """Return a line on the policies that could not be judged, none where there are none."""
    if not ids:
        return []
    policies = f"{len(ids)} policies are" if len(ids) > 1 else "1 policy is"
    return [f"{policies} not judged, as the features are templates: {', '.join(ids)}"]


def approximations(policies: Iterable[Policy], sets: FeatureSets) -> dict[str, str]:
    """Return how well thresholds stand for ranks, by the feature sets of which policies read them.

    Args:
        policies: that are judged.
        sets: those that they name are known.
    """
    from saeguard.policy.lint import stand_ins_read

    found = ((p.feature_set, stand_ins_read(p, sets.known[p.feature_set])) for p in policies)
    return {name: read.told for name, read in sorted(found, key=itemgetter(0)) if read is not None}


def approximate_told(found: Mapping[str, str]) -> list[str]:
    """Return a line on each feature set, as at a server's start."""
    return [f"feature set {name}: TopK latents are {told}" for name, told in found.items()]


def open_corpus(
    path: Path, policies: Iterable[Policy], model: Path | None, feature_sets: Path
) -> Recording:
    """Return the recording at `path`, or that of the texts at `path`, read by `model` now.

    Args:
        path: `.safetensors`, or JSON lines.
        policies: whose feature sets are wanted.
        model: folder of a Hugging Face model, for JSON lines.
        feature_sets: folder.

    Raises:
        typer.Exit: the file cannot be read, or there is no model to read it with.
    """
    from saeguard.policy_tools.recording import read_recording

    must_be_there(path)
    if path.suffix == ".safetensors":
        with told():
            return read_recording(path)
    if model is None:
        stop(f"{path}: these are texts; give the --model that reads them, or a recording that "
             "`saeguard policy record` made", BAD_INPUT)  # fmt: skip
    with model_told():
        from saeguard.hf.model import load_model, load_tokenizer
        from saeguard.hf.texts import read_texts
        from saeguard.policy_tools.record_features import record_features

        tokenizer = load_tokenizer(model)
        texts = read_texts(path, tokenizer)
        if not texts:
            stop(f"{path}: there is no text in it", BAD_INPUT)
        lm = load_model(model, tokenizer)
        names = sorted({policy.feature_set for policy in policies})
        files = [feature_sets / f"{name}.yaml" for name in names]
        return record_features(lm, files, texts, path=path, with_text=True)


def judge_corpus(
    policies: Sequence[Policy], sets: FeatureSets, recording: Recording
) -> list[Sequence[Verdict]]:
    """Return one verdict per policy for every text of a recording."""
    from saeguard.policy_tools.explanation import judge_recorded

    with told():
        return list(judge_recorded(policies, sets.known, recording, range(len(recording.ids))))
