"""`saeguard policy record`: keep what a model shows on some texts, to judge policies on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from saeguard.cli.failures import BAD_INPUT, model_told, must_be_there, stop, told
from saeguard.cli.feature_folder import FEATURE_SETS, FeatureSetsOption


def verb(
    texts: Annotated[
        Path, typer.Argument(help="JSON lines: id, and text, or prompt with completion.")
    ],
    model: Annotated[Path, typer.Option(help="Folder of a Hugging Face model.")],
    out: Annotated[Path, typer.Option(help="safetensors file to write.")],
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="Feature set, by name; may be given again. Default: the model's."
        ),
    ] = None,
    feature_sets: FeatureSetsOption = FEATURE_SETS,
    with_text: Annotated[
        bool,
        typer.Option("--with-text", help="Keep what each token spells, so that explain shows it."),
    ] = False,
) -> None:
    """Record the value of every feature at every token of some texts, without their text.

    Exits with 0, 2 where a file or the command is wrong, 3 where the model cannot be used.
    """
    from saeguard.cli.feature_folder import read_feature_sets

    must_be_there(texts)
    if out.suffix != ".safetensors":  # by which the other tools tell it from texts
        stop(f"--out {out}: name a file that ends in .safetensors", BAD_INPUT)
    with told():
        sets = read_feature_sets(feature_sets)
    if not sets.known:
        stop(f"{feature_sets}: there is no feature set in it that can be used", BAD_INPUT)
    unknown = [name for name in set_ or () if name not in sets.known]
    if unknown:
        known = ", ".join(sorted(sets.known))
        stop(f"there is no feature set {', '.join(unknown)}; there are: {known}", BAD_INPUT)
    with model_told():
        from saeguard.features.model_fit import misfit
        from saeguard.hf.model import load_model, load_tokenizer
        from saeguard.hf.texts import read_texts
        from saeguard.policy_tools.record_features import record_features
        from saeguard.policy_tools.recording import write_recording

        tokenizer = load_tokenizer(model)
        read = read_texts(texts, tokenizer)
        if not read:
            stop(f"{texts}: there is no text in it", BAD_INPUT)
        lm = load_model(model, tokenizer)
        of_model = [
            name for name, known in sorted(sets.known.items()) if not misfit(known.model, lm.shape)
        ]
        names = set_ or of_model
        if not names:
            stop(
                f"no feature set in {feature_sets} is made for {model}, which is {lm.hidden_size} "
                f"wide and has {len(lm.layers)} layers; name one with --set",
                BAD_INPUT,
            )
        files = [feature_sets / f"{name}.yaml" for name in names]
        recording = record_features(lm, files, read, path=out, with_text=with_text)
        write_recording(recording, out)
    typer.echo(
        f"{len(recording.ids)} texts, {len(recording.evaluable)} tokens, "
        f"{len(recording.definitions)} features written to {out}"
    )
