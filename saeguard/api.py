"""The functions that a program needs to judge texts without vLLM; `import saeguard` offers them.

Paths may be strings. Every error is a `saeguard.SaeguardError`, whose text says what was found,
where, and what to do. Torch and Transformers are imported when they are needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from saeguard.policy.load import load_policies as _load_policies

if TYPE_CHECKING:
    from saeguard.features.types import FeatureSet
    from saeguard.guard.verdict import Verdict
    from saeguard.guard.watchlist import WatchList
    from saeguard.hf.model import Dtype, LanguageModel
    from saeguard.policy.types import Policy

StrPath: TypeAlias = str | PathLike[str]
Chat: TypeAlias = Sequence[tuple[str, str]]
"""The role and the content of each message."""


def load_policies(path: StrPath) -> tuple[Policy, ...]:
    """Read a policy file, or every policy file below a folder.

    Raises:
        PolicyErrors: every mistake in the files.
    """
    return _load_policies(Path(path))


def load_feature_set(path: StrPath) -> FeatureSet:
    """Read a feature-set file, and check that its SAE checkpoint is the pinned one.

    Raises:
        FeatureSetError: the file is wrong, or the checkpoint is another one.
    """
    from saeguard.features.load import load_feature_set as load  # noqa: PLC0415 - imports torch

    return load(Path(path))


def build_watchlist(policies: Sequence[Policy], feature_sets: Sequence[FeatureSet]) -> WatchList:
    """Compile policies, over the feature sets that they name, into what the model is watched for.

    Raises:
        WatchListError: a feature set or feature is missing, or the policies do not go together.
    """
    from saeguard.guard.build_watchlist import build_watchlist as build  # noqa: PLC0415 - as above

    return build(policies, {features.id: features for features in feature_sets})


def load_watchlist(policies: StrPath, feature_sets: StrPath) -> WatchList:
    """Read and compile what a server with these folders would serve.

    Policies whose features are still a template are left out, as a server leaves them out.

    Args:
        policies: a policy file or a folder of them.
        feature_sets: the folder of feature sets.

    Raises:
        PolicyErrors, FeatureSetError, WatchListError: files are wrong, or do not go together.
        SourceError: no policy is left.
    """
    from saeguard.reload.policy_source import Source, load  # noqa: PLC0415 - as above

    return load(Source(Path(policies), Path(feature_sets))).watchlist


def load_model(model: StrPath, *, dtype: Dtype = "float32", device: str = "cpu") -> LanguageModel:
    """Load a Hugging Face model and its tokenizer.

    Args:
        model: a folder, or a name on the hub, which is downloaded.
        dtype: of its weights.
        device: as torch names it, or `auto`.

    Raises:
        ModelError: it is no causal language model with safetensors weights.
        ModelFolderError: it is neither a folder nor known to the hub.
        HubError: the hub cannot be reached, and its cache lacks the model.
    """
    from saeguard.hf.model import load_model as load  # noqa: PLC0415 - as above
    from saeguard.hf.model_folder import model_folder  # noqa: PLC0415

    return load(model_folder(Path(model), ""), dtype=dtype, device=device)


def judge(
    model: LanguageModel, watchlist: WatchList, prompt: str | Chat, completion: str = ""
) -> tuple[Verdict, ...]:
    """Run the model over one text, and return one verdict for each policy.

    Args:
        model: of `load_model`.
        watchlist: of `build_watchlist` or `load_watchlist`.
        prompt: plain text, or the messages of a chat, which the model's chat template renders.
        completion: the answer to the prompt.

    Raises:
        ModelFitError: the feature sets were made for another model.
        RolesError: a policy's scope is a role, which this chat template does not let one find.
        TextError: the text has no token, or the chat template refuses the messages.
    """
    from saeguard.hf.scan import scan as run  # noqa: PLC0415 - as above
    from saeguard.hf.texts import make_text  # noqa: PLC0415

    _check_fit(model, watchlist)
    text = make_text("text", model.tokenizer, prompt, completion)
    ((_, verdicts),) = run(model, watchlist, [text])
    return tuple(verdicts)


def scan(
    model: LanguageModel, watchlist: WatchList, path: StrPath
) -> Iterator[tuple[str, tuple[Verdict, ...]]]:
    """Yield the id of each text in a JSON-lines file, with one verdict for each policy.

    The shortest text comes first. The lines are those of `saeguard scan`.

    Raises:
        ModelFitError, RolesError: as `judge`.
        TextError: a line of the file is wrong.
    """
    from saeguard.hf.scan import scan as run  # noqa: PLC0415 - as above
    from saeguard.hf.texts import read_texts  # noqa: PLC0415

    _check_fit(model, watchlist)
    texts = read_texts(Path(path), model.tokenizer)
    for i, verdicts in run(model, watchlist, texts):
        yield texts[i].id, tuple(verdicts)


def judge_recording(
    policies: Sequence[Policy], feature_sets: StrPath, recording: StrPath
) -> Iterator[tuple[str, tuple[Verdict, ...]]]:
    """Yield the id of each recorded text, with one verdict for each policy; no model is needed.

    Args:
        policies: of `load_policies`.
        feature_sets: the folder of feature sets.
        recording: a file that `saeguard policy record` made.

    Raises:
        FeatureSetError: a feature set is missing or wrong.
        RecordingError: the file is not a recording, or lacks a feature that a policy reads.
    """
    from saeguard.features.files import read_feature_set_file  # noqa: PLC0415 - as above
    from saeguard.policy_tools.explanation import judge_recorded  # noqa: PLC0415
    from saeguard.policy_tools.recording import read_recording  # noqa: PLC0415

    names = {policy.feature_set for policy in policies}
    sets = {name: read_feature_set_file(Path(feature_sets, f"{name}.yaml")) for name in names}
    recorded = read_recording(Path(recording))
    verdicts = judge_recorded(policies, sets, recorded, range(len(recorded.ids)))
    for id_, of_text in zip(recorded.ids, verdicts, strict=True):
        yield id_, tuple(of_text)


def _check_fit(model: LanguageModel, watchlist: WatchList) -> None:
    from saeguard.features.model_fit import check_fit  # noqa: PLC0415 - as above

    for made_for in watchlist.models:
        check_fit(made_for, model.shape, at="the watch list")
