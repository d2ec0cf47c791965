"""Read what the policy tools judge: policies, and recordings or texts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING

from saeguard.cli.options import ModelOptions, check_file
from saeguard.errors import InputError

if TYPE_CHECKING:
    from saeguard.cli.feature_folder import FeatureSets
    from saeguard.guard.verdict import Verdict
    from saeguard.hf.model import LanguageModel
    from saeguard.policy.types import Policy
    from saeguard.policy_tools.recording import Recording
    from saeguard.yaml_files.findings import Finding


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
) -> tuple[tuple[Policy, ...], list[Finding]]:
    """Return the policies whose features are calibrated, and a note on each of the others.

    Raises:
        PolicyErrors: a policy names a feature or feature set that does not exist.
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
    """Return a line that names the policies that were not judged; no line if there are none."""
    if not ids:
        return []
    policies = f"{len(ids)} policies are" if len(ids) > 1 else "1 policy is"
    return [f"{policies} not judged, because the features are templates: {', '.join(ids)}"]


def approximations(policies: Iterable[Policy], sets: FeatureSets) -> dict[str, str]:
    """Return how well thresholds agree with TopK ranks, by the name of the feature set.

    Args:
        policies: those that are judged.
        sets: hold every feature set that the policies name.
    """
    from saeguard.policy.lint import stand_ins_read

    found = ((p.feature_set, stand_ins_read(p, sets.known[p.feature_set])) for p in policies)
    return {
        name: read.in_words for name, read in sorted(found, key=itemgetter(0)) if read is not None
    }


def approximate_lines(found: Mapping[str, str]) -> list[str]:
    """Return a line for each feature set, with the words of a server's start-up log."""
    return [f"feature set {name}: TopK latents are {text}" for name, text in found.items()]


def open_corpus(
    path: Path,
    policies: Iterable[Policy],
    model: Path | None,
    feature_sets: Path,
    options: ModelOptions = ModelOptions(),  # noqa: B008 - immutable
) -> Recording:
    """Return the recording at `path`, or record the texts at `path` with `model`.

    Args:
        path: `.safetensors`, or JSON lines.
        policies: their feature sets are recorded.
        model: folder of a Hugging Face model; needed for JSON lines.
        feature_sets: folder of feature sets.
        options: how the model is loaded.

    Raises:
        InputError: the file cannot be read, or holds texts and no model was given.
    """
    from saeguard.policy_tools.recording import read_recording

    check_file(path)
    if path.suffix == ".safetensors":
        return read_recording(path)
    if model is None:
        raise InputError(
            f"{path}: these are texts; give the --model that reads them, or a recording that "
            "`saeguard policy record` made"
        )
    from saeguard.hf.model import load_model, load_tokenizer
    from saeguard.hf.texts import read_texts
    from saeguard.policy_tools.record_features import record_features

    tokenizer = load_tokenizer(model)
    texts = read_texts(path, tokenizer)
    if not texts:
        raise InputError(f"{path}: the file holds no text")
    lm = load_model(model, tokenizer, **options._asdict())
    names = sorted({policy.feature_set for policy in policies})
    files = [feature_sets / f"{name}.yaml" for name in names]
    return record_features(lm, files, texts, path=path, with_text=True)


def judge_corpus(
    policies: Sequence[Policy], sets: FeatureSets, recording: Recording
) -> list[Sequence[Verdict]]:
    """Return one verdict per policy for every text of a recording."""
    from saeguard.policy_tools.explanation import judge_recorded

    return list(judge_recorded(policies, sets.known, recording, range(len(recording.ids))))


def load_after(
    model: Path,
    texts: Sequence[Path],
    options: ModelOptions = ModelOptions(),  # noqa: B008 - immutable
) -> LanguageModel:
    """Load a model after checking every file of texts, since weights take long to load."""
    from saeguard.hf.corpus import read_outputs
    from saeguard.hf.model import load_model, load_tokenizer

    tokenizer = load_tokenizer(model)
    for path in texts:
        read_outputs(path, tokenizer)
    return load_model(model, tokenizer, **options._asdict())
