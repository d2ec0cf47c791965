"""`saeguard features steer`: what a model writes with a latent turned up or down."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from saeguard.cli.on_prompt import CompletionOption, IndexOption, Loaded, latent_option, load_all
from saeguard.cli.options import (
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelOption,
    ModelOptions,
    SaeOption,
    SetOption,
    existing_file,
)
from saeguard.cli.records import number, show
from saeguard.errors import InputError

if TYPE_CHECKING:
    from saeguard.effect.attribute import Scored


def verb(
    latent: Annotated[int, typer.Argument(help="Number of the latent.", min=0)],
    model: ModelOption,
    prompt: Annotated[str, typer.Option(help="The user's message.")],
    completion: CompletionOption = "",
    set_: SetOption = None,
    sae: SaeOption = None,
    index: IndexOption = None,
    scale: Annotated[
        list[float] | None,
        typer.Option(
            help="Times the latent's highest activation on the index's corpus, or --height. "
            "Repeatable. Default: -2, 0, 1 and 3."
        ),
    ] = None,
    height: Annotated[
        float | None, typer.Option(help="Activation that the scales are times of.", min=0)
    ] = None,
    texts: Annotated[
        Path | None,
        typer.Option(
            help="Texts (JSON lines) to measure the loss on. Default: the answer without an edit.",
            callback=existing_file,
        ),
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Length of an answer.", min=1)] = 40,
    samples: Annotated[
        int, typer.Option(help="Answers under each edit; more than one needs --temperature.", min=1)
    ] = 1,
    temperature: Annotated[
        float, typer.Option(help="0: the likeliest token each time.", min=0)
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="Random seed, the same under each edit.")] = 0,
    dtype: DtypeOption = "float32",
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Hold a latent at values, and show the answers side by side with the loss under each.

    The latent is set at every token of prompt and answer but special tokens and attention sinks.
    A loss far above that without an edit says that the edit breaks the model rather than steers it.
    """
    from saeguard.effect.steer import Sampling, steer
    from saeguard.features.massive import measure_norms

    if samples > 1 and not temperature:
        raise InputError("--samples: without --temperature all answers are alike; give both")
    loaded = load_all(model, sae, set_, index, ModelOptions(dtype, device))
    if loaded.info.k is not None:
        raise InputError(
            f"{loaded.info.path}: its latents compete (TopK), so that none can be set by itself"
        )
    latent_option([latent], loaded.info)
    top = _height(loaded, latent, height)
    read = loaded.read(prompt, completion)
    norm = read.x.norm(dim=1).numpy()[read.looked]
    bound = None if loaded.features is None else loaded.features.max_norm.get(loaded.info.layer)
    bound, _ = measure_norms(norm, read.looked.nonzero()[0], bound)
    arms = steer(
        loaded.lm,
        loaded.info,
        latent,
        read.text.tokens,
        [(s, s * top) for s in scale or [-2.0, 0.0, 1.0, 3.0]],
        sampling=Sampling(max_tokens, samples, temperature, seed),
        texts=_scored(loaded, texts),
        excluded=loaded.lm.special_tokens,
        bound=bound,
    )
    rows: list[dict[str, Any]] = [
        {
            "scale": arm.scale,
            "activation": arm.activation,
            "loss": round(arm.loss, 4),
            "samples": list(arm.samples),
        }
        for arm in arms
    ]
    report = {**loaded.facts, "latent": latent, "height": top, "prompt": prompt, "arms": rows}
    columns = [
        ("scale", lambda row: "no edit" if row["scale"] is None else f"{row['scale']:g}"),
        ("activation", number("activation")),
        ("loss", number("loss", ".3f")),
        ("answer", lambda row: "\n\n".join(row["samples"])),
    ]
    show(report, rows, columns, as_json=as_json)


def _height(loaded: Loaded, latent: int, height: float | None) -> float:
    if height is not None:
        return height
    if loaded.index is None:
        raise InputError(
            "--scale is times the latent's highest activation: give --index, where that is kept, "
            "or --height"
        )
    highest = loaded.index.stats(latent).highest
    if highest is None:
        raise InputError(f"latent {latent} fires nowhere in {loaded.index.path}; give --height")
    return float(highest)


def _scored(loaded: Loaded, path: Path | None) -> list[Scored]:
    if path is None:
        return []
    from saeguard.effect.attribute import Scored
    from saeguard.hf.corpus import read_outputs

    return [
        Scored(t.tokens, max(1, t.prompt_tokens), 1, t.id, t.template)
        for t in read_outputs(path, loaded.lm.tokenizer)
        if len(t.tokens) > max(1, t.prompt_tokens)
    ]
