"""`saeguard policy record`: the feature values of some texts, to judge policies on later."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from saeguard.cli.options import FEATURE_SETS, FeatureSetsOption, ModelOption, existing_file
from saeguard.errors import InputError


def verb(
    texts: Annotated[
        Path,
        typer.Argument(
            help="JSON lines with an id, and a text or a prompt and completion.",
            callback=existing_file,
        ),
    ],
    model: ModelOption,
    out: Annotated[Path, typer.Option(help="Recording to write, a .safetensors file.")],
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="Name of a feature set. Repeatable. Default: all made for the model."
        ),
    ] = None,
    feature_sets: FeatureSetsOption = FEATURE_SETS,
    with_text: Annotated[
        bool,
        typer.Option("--with-text", help="Keep the text of each token, so that explain shows it."),
    ] = False,
) -> None:
    """Record the value of every feature at every token of some texts; by default without the text.

    Exit codes: 0, 2 a file, the model or the command is wrong, 3 a package is missing.
    """
    from saeguard.cli.feature_folder import read_feature_sets

    if out.suffix != ".safetensors":  # by which the other tools tell it from texts
        raise InputError(f"--out: {out}: name a file that ends in .safetensors")
    sets = read_feature_sets(feature_sets)
    if not sets.known:
        raise InputError(f"{feature_sets}: found no feature set that can be used")
    unknown = [name for name in set_ or () if name not in sets.known]
    if unknown:
        known = ", ".join(sorted(sets.known))
        raise InputError(f"there is no feature set {', '.join(unknown)}; there are: {known}")
    from saeguard.features.model_fit import misfit
    from saeguard.hf.model import load_model, load_tokenizer
    from saeguard.hf.texts import read_texts
    from saeguard.policy_tools.record_features import record_features
    from saeguard.policy_tools.recording import write_recording

    tokenizer = load_tokenizer(model)
    read = read_texts(texts, tokenizer)
    if not read:
        raise InputError(f"{texts}: the file holds no text")
    lm = load_model(model, tokenizer)
    of_model = [
        name for name, known in sorted(sets.known.items()) if not misfit(known.model, lm.shape)
    ]
    names = set_ or of_model
    if not names:
        raise InputError(
            f"no feature set in {feature_sets} is made for {model}, which is {lm.hidden_size} "
            f"wide and has {len(lm.layers)} layers; name one with --set"
        )
    files = [feature_sets / f"{name}.yaml" for name in names]
    recording = record_features(lm, files, read, path=out, with_text=with_text)
    write_recording(recording, out)
    typer.echo(
        f"{len(recording.ids)} texts, {len(recording.evaluable)} tokens, "
        f"{len(recording.definitions)} features written to {out}"
    )
