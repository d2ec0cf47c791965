"""`saeguard features search --prompt`: latents by the prompts on which they fire."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from saeguard.cli.on_prompt import Loaded, load_all
from saeguard.cli.options import ModelOptions
from saeguard.cli.records import number, show, token, tokens, word
from saeguard.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from saeguard.hf.on_prompt import OnPrompt
    from saeguard.latents.prompts import Found


class Wanted(NamedTuple):
    """What to look for."""

    prompts: Sequence[str]
    without: Sequence[str]
    completion: str
    by: str
    """strength, specific or position."""
    most: int


def search(
    model: Path,
    sae: Path | None,
    set_: Path | None,
    index: Path | None,
    background: Path | None,
    wanted: Wanted,
    options: ModelOptions,
    *,
    as_json: bool,
) -> None:
    """Print the latents that fire in all prompts, and in none of those they must not fire in.

    Raises:
        InputError: `specific` without a background, or `position` with several prompts.
    """
    from saeguard.latents.prompts import by_position, find, specific

    if wanted.by == "specific" and index is None and background is None:
        raise InputError(
            "--by specific: there is nothing to compare with; give --index or --benign"
        )
    if wanted.by == "position" and (len(wanted.prompts) > 1 or wanted.without):
        raise InputError("--by position: expected one --prompt and no --without")
    loaded = load_all(model, sae, set_, index, options)
    prompts = [loaded.read(prompt, wanted.completion) for prompt in wanted.prompts]
    if wanted.by == "position":
        _show_positions(loaded, prompts[0], by_position(prompts[0], wanted.most), as_json=as_json)
        return
    without = [loaded.read(prompt) for prompt in wanted.without]
    found = find(prompts, without, index=loaded.index, background=_background(loaded, background))
    found = specific(found) if wanted.by == "specific" else found
    rows = loaded.named(_row(f, prompts) for f in found[: wanted.most])
    report = {
        **loaded.facts,
        "prompts": list(wanted.prompts),
        "without": list(wanted.without),
        "by": wanted.by,
        "latents_found": len(found),
        "latents": rows,
    }
    columns = [
        ("latent", word("latent")),
        ("activation", number("activation")),
        ("at", word("at")),
        ("token", token("token")),
        ("as strong in the background", _share),
        ("features", word("features")),
        ("makes likelier", tokens("tokens")),
    ]
    show(report, rows, columns, as_json=as_json)


def _background(loaded: Loaded, path: Path | None) -> list[OnPrompt]:
    if path is None:
        return []
    from tqdm import tqdm

    from saeguard.hf.on_prompt import on_prompt
    from saeguard.hf.texts import read_texts

    texts = read_texts(path, loaded.lm.tokenizer)
    return [
        on_prompt(loaded.lm, loaded.info, loaded.features, text)
        for text in tqdm(texts, desc=path.name, unit="text")
    ]


def _row(found: Found, prompts: Sequence[OnPrompt]) -> dict[str, Any]:
    peaks: list[dict[str, Any]] = [
        {"activation": round(value, 4), "at": at, "token": prompt.pieces[at]}
        for (value, at), prompt in zip(found.peaks, prompts, strict=True)
    ]
    weakest = min(peaks, key=lambda peak: peak["activation"])
    return {
        "latent": found.latent,
        **weakest,
        "background": found.background,
        **({"prompts": peaks} if len(peaks) > 1 else {}),
    }


def _share(row: Any) -> str:
    share = row["background"]
    if share is None:
        return "\u2013"
    return f"{share:.3%}" if share else "never"


def _show_positions(
    loaded: Loaded, prompt: OnPrompt, found: Sequence[Sequence[tuple[int, float]]], *, as_json: bool
) -> None:
    rows = [
        {
            "at": at,
            "token": prompt.pieces[at],
            "looked": bool(prompt.looked[at]),
            "latents": loaded.named(
                {"latent": latent, "activation": round(value, 4)} for latent, value in fired
            ),
        }
        for at, fired in enumerate(found)
    ]

    def latents(row: Any) -> str:
        if not row["looked"]:
            return "left out: special, or an attention sink"
        return ", ".join(
            f"{entry['latent']}: {entry['activation']:.3g}" for entry in row["latents"]
        )

    columns = [("at", word("at")), ("token", token("token")), ("latents, strongest first", latents)]
    show({**loaded.facts, "tokens": rows}, rows, columns, as_json=as_json)
