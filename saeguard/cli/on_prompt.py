"""What the verbs that read a prompt share: options, loading, and facts of latents for tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from saeguard.cli.options import ModelOptions, existing_file, sae_and_set
from saeguard.errors import InputError

if TYPE_CHECKING:
    from saeguard.features.types import FeatureSet
    from saeguard.hf.model import LanguageModel
    from saeguard.hf.on_prompt import OnPrompt
    from saeguard.latents.index import Index
    from saeguard.sae import SaeInfo

IndexOption = Annotated[
    Path | None,
    typer.Option("--index", help="Index that `features index` made.", callback=existing_file),
]
CompletionOption = Annotated[
    str, typer.Option("--completion", help="What of the answer is there already.")
]


@dataclass(frozen=True, slots=True)
class Loaded:
    """The model, its SAE, and what names and explains its latents."""

    lm: LanguageModel
    info: SaeInfo
    features: FeatureSet | None
    index: Index | None

    def read(self, prompt: str, completion: str = "") -> OnPrompt:
        """Read a prompt, as a user message if the model has a chat template."""
        from saeguard.hf.on_prompt import on_prompt
        from saeguard.hf.texts import make_turn

        text = make_turn("--prompt", self.lm.tokenizer, prompt, completion)
        return on_prompt(self.lm, self.info, self.features, text)

    def named(self, rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return rows with `features`, and with the likelier tokens of their latents.

        Args:
            rows: each with `latent`.
        """
        return named(rows, self.features, self.index)

    @property
    def facts(self) -> dict[str, Any]:
        """What a report is of."""
        return {
            "model": self.lm.name,
            "sae": {"sha256": self.info.sha256, "layer": self.info.layer},
        }


def load_all(
    model: Path,
    sae: Path | None,
    set_: Path | None,
    index: Path | None,
    options: ModelOptions,
) -> Loaded:
    """Load what the options name, the model last.

    Raises:
        InputError: options are missing, or the model, the SAE and the index do not go together.
    """
    from saeguard.features.model_fit import sae_misfit
    from saeguard.hf.model import check_model, load_model

    info, features = sae_and_set(sae, set_)
    opened = open_index(index, info)
    lm = load_model(model, **options._asdict())
    if features is not None:
        check_model(lm, features)
    misfit = sae_misfit(info.d_in, info.layer, lm.shape)
    if misfit:
        raise InputError(f"--model: {model}: {misfit}; name the model that it was trained on")
    return Loaded(lm, info, features, opened)


def open_index(path: Path | None, info: SaeInfo) -> Index | None:
    """Open an index and check that it is of an SAE; None without a path."""
    if path is None:
        return None
    from saeguard.latents.index import Index

    index = Index(path)
    index.check_sae(info)
    return index


def named(
    rows: Iterable[dict[str, Any]], features: FeatureSet | None, index: Index | None
) -> list[dict[str, Any]]:
    """Return rows with the names of features that use their latents, and with likelier tokens."""
    from saeguard.cli.fired import named as names_of

    names = {} if features is None else names_of(features)
    out = []
    for row in rows:
        latent = row["latent"]
        more: dict[str, Any] = {"features": list(names.get(latent, []))}
        if index is not None:
            more["tokens"] = [piece for piece, _ in index.lens(latent)[0]]
        out.append(row | more)
    return out


def latent_option(latents: Sequence[int], info: SaeInfo) -> None:
    """Check that latents exist.

    Raises:
        InputError: one does not.
    """
    for latent in latents:
        if not 0 <= latent < info.d_sae:
            raise InputError(f"there is no latent {latent}; the SAE has 0 to {info.d_sae - 1}")
