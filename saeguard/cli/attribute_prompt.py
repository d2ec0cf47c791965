"""`saeguard features attribute --prompt` and `features ablate`: latents on a logit difference."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from saeguard.cli.on_prompt import CompletionOption, IndexOption, Loaded, load_all
from saeguard.cli.options import (
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelOption,
    ModelOptions,
    SaeOption,
    SetOption,
)
from saeguard.cli.records import Column, number, show, token, tokens, word
from saeguard.errors import InputError

if TYPE_CHECKING:
    from saeguard.effect.on_logits import Effects, Target
    from saeguard.hf.on_prompt import OnPrompt

TargetOption = Annotated[
    str | None,
    typer.Option(
        "--target", help='Token that may follow, such as " Paris"; often it begins with a space.'
    ),
]
AgainstOption = Annotated[
    str | None,
    typer.Option(
        "--against",
        help="Token to compare its logit with. Default: the target's log-probability is looked at.",
    ),
]
StepsOption = Annotated[
    int,
    typer.Option(
        "--steps", help="Integrated gradients of so many steps. 0: the gradient alone.", min=0
    ),
]


def attribute(
    loaded: Loaded,
    prompt: str,
    completion: str,
    target: str | None,
    against: str | None,
    steps: int,
    most: int,
    *,
    as_json: bool,
) -> None:
    """Print the latents, with the token, that do most to a logit difference.

    Raises:
        InputError: there is no target, or it is not one token.
    """
    from saeguard.effect.on_logits import attribute_prompt

    read = loaded.read(prompt, completion)
    asked = _target(loaded, target, against)
    effects = attribute_prompt(loaded.lm, loaded.info, read, asked, steps=steps)
    rows = loaded.named(_entries(effects, read, most))
    report = _report(loaded, read, effects, steps) | {
        "latents": loaded.named(
            {"latent": latent, "effect": round(effect, 5)}
            for latent, effect in list(effects.by_latent().items())[:most]
        ),
        "entries": rows,
    }
    columns = [
        ("latent", word("latent")),
        ("at", word("at")),
        ("token", token("token")),
        ("activation", number("activation")),
        ("effect", number("effect", "+.4f")),
        ("features", word("features")),
        ("makes likelier", tokens("tokens")),
    ]
    show(report, rows, columns, as_json=as_json)
    if not as_json:
        _print_sum(report)


def ablate(
    model: ModelOption,
    prompt: Annotated[str, typer.Option(help="The user's message.")],
    target: TargetOption = None,
    against: AgainstOption = None,
    completion: CompletionOption = "",
    set_: SetOption = None,
    sae: SaeOption = None,
    index: IndexOption = None,
    latent: Annotated[
        list[int] | None,
        typer.Option(help="Latent to take out. Repeatable. Default: those with most attribution."),
    ] = None,
    most: Annotated[int, typer.Option(help="Number of latents to take out.", min=2)] = 32,
    steps: StepsOption = 0,
    dtype: DtypeOption = "float32",
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Take latents out of a prompt one at a time, and measure; compare with attribution.

    An effect is by how much the latent's being there raises the difference of logits. Attribution
    estimates it from a gradient; the correlation of the two says how far to believe it.
    """
    from tqdm import tqdm

    from saeguard.effect.on_logits import ablate as take_out
    from saeguard.effect.on_logits import attribute_prompt, correlation

    loaded = load_all(model, sae, set_, index, ModelOptions(dtype, device))
    read = loaded.read(prompt, completion)
    asked = _target(loaded, target, against)
    effects = attribute_prompt(loaded.lm, loaded.info, read, asked, steps=steps)
    estimated = effects.by_latent()
    chosen = latent or list(estimated)[:most]
    with tqdm(total=len(chosen), desc="ablate", unit="latent", disable=as_json) as bar:
        measured = take_out(loaded.lm, loaded.info, read, asked, chosen, bar.update)
    rows = loaded.named(
        {
            "latent": i,
            "attribution": round(estimated.get(i, 0.0), 5),
            "ablation": round(effect, 5),
        }
        for i, effect in sorted(measured.items(), key=lambda item: -abs(item[1]))
    )
    agreement = correlation([estimated.get(i, 0.0) for i in measured], list(measured.values()))
    report = _report(loaded, read, effects, steps) | {"correlation": agreement, "latents": rows}
    columns: list[Column] = [
        ("latent", word("latent")),
        ("attribution", number("attribution", "+.4f")),
        ("ablation", number("ablation", "+.4f")),
        ("features", word("features")),
        ("makes likelier", tokens("tokens")),
    ]
    show(report, rows, columns, as_json=as_json)
    if not as_json:
        pearson, spearman = agreement["pearson"], agreement["spearman"]
        if pearson is None:
            typer.echo("Too few latents, or all alike, for a correlation.")
        else:
            typer.echo(
                f"Attribution against ablation, {len(rows)} latents: Pearson {pearson:.3f}, "
                f"Spearman {spearman:.3f}."
            )


def _target(loaded: Loaded, target: str | None, against: str | None) -> Target:
    from saeguard.effect.on_logits import Target
    from saeguard.hf.on_prompt import one_token

    if target is None:
        raise InputError('--target: missing; give the token that may follow, such as " Paris"')
    return Target(
        one_token(loaded.lm, target, "--target"),
        None if against is None else one_token(loaded.lm, against, "--against"),
    )


def _entries(effects: Effects, read: OnPrompt, most: int) -> list[dict[str, Any]]:
    order = abs(effects.effect).argsort(kind="stable")[::-1][:most].tolist()
    return [
        {
            "latent": int(effects.latent[i]),
            "at": int(effects.token[i]),
            "token": read.pieces[int(effects.token[i])],
            "activation": round(float(effects.value[i]), 4),
            "effect": round(float(effects.effect[i]), 5),
        }
        for i in order
    ]


def _report(loaded: Loaded, read: OnPrompt, effects: Effects, steps: int) -> dict[str, Any]:
    return {
        **loaded.facts,
        "tokens": list(read.pieces),
        "metric": round(effects.metric, 5),
        "steps": steps,
        "sum_of_effects": round(float(effects.effect.sum()), 5),
    }


def _print_sum(report: dict[str, Any]) -> None:
    typer.echo(
        f"The difference is {report['metric']:+.4f}; the effects of all latents add up to "
        f"{report['sum_of_effects']:+.4f}, the rest is the SAE's error"
        + ("." if report["steps"] else " and what a gradient misses.")
    )
