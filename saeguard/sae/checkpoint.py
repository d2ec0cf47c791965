"""Recognise an SAE checkpoint by its files and the names in their headers; nothing is unpickled."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from saeguard.real_path import real_path
from saeguard.sae.checkpoint_info import SaeInfo, Stated
from saeguard.sae.errors import SaeError
from saeguard.sae.files import found_in, read_json, regular
from saeguard.sae.formats import FAMILIES
from saeguard.sae.formats.source import Source
from saeguard.sae.weights import read_headers

__all__ = ["SaeError", "SaeInfo", "inspect"]

PICKLES = (".pt", ".pth", ".bin", ".pkl", ".ckpt")


def inspect(path: str | Path, stated: Stated | None = None) -> SaeInfo:
    """Read the configuration and the tensor headers of the checkpoint in folder `path`.

    Args:
        path: the folder that holds the files of one SAE, named as they were published.
        stated: what the user states, for what the files leave open.

    Raises:
        SaeError: the folder holds no checkpoint of a known family, or one that cannot be read
            correctly, or `stated` contradicts its files.
    """
    folder = real_path(path)
    if not folder.is_dir():
        raise SaeError(_no_folder(path, folder))
    families = [
        family for family in FAMILIES if all((folder / name).is_file() for name in family.files)
    ]
    if not families:
        raise SaeError(_nothing(folder))
    if len(families) > 1:
        sets = " and ".join(" + ".join(family.files) for family in families)
        raise SaeError(f"{folder}: holds {sets}; a folder must hold one checkpoint")
    family = families[0]
    config = regular(folder, family.config) if family.config else None
    source = Source(
        folder=folder,
        weights=read_headers(regular(folder, family.weights)),
        config_file=config,
        config=read_json(config) if config else {},
        stated=stated or Stated(),
    )
    return as_stated(family.describe(source), source.stated)


def as_stated(info: SaeInfo, stated: Stated) -> SaeInfo:
    """Return `info` after checking that every stated field went into it.

    Raises:
        SaeError: the files contradict a stated field or have no use for it, so the user may mean
            another SAE.
    """
    for name, found in _otherwise(info, stated):
        raise SaeError(
            f"{info.path}: {name} was stated as {getattr(stated, name)}, but {found}. Leave it out "
            f"(`{name}:` in a feature set's `sae:`, `--{name.replace('_', '-')}` of a command), or "
            "name the checkpoint that is meant"
        )
    return info


def _otherwise(info: SaeInfo, stated: Stated) -> Iterator[tuple[str, str]]:
    """Yield each field of `stated` that did not go into `info`, with the value in use."""
    if stated.k not in {None, info.k}:
        ranks = f"its files say {info.k}"
        yield "k", ranks if info.k else f"this SAE does not rank its latents ({info.activation})"
    factor = info.layout.W_enc_factor
    if stated.norm_factor not in {None, factor}:
        yield (
            "norm_factor",
            f"its files leave no factor open: the input is multiplied by {factor:g}",
        )
    read = [fold for fold in info.folded if fold.startswith(f"convention {stated.convention!r}")]
    if stated.convention is not None and not read:
        other = f"this is {info.format}; only Llama Scope is read in more than one way"
        converted = info.format == "llama_scope"
        yield "convention", "it was converted under the other one" if converted else other


def _no_folder(path: str | Path, folder: Path) -> str:
    if folder.is_file() and folder.suffix in PICKLES:
        return (
            f"{path}: a pickle, which can run code and is never read while serving; "
            f"`saeguard sae convert {path} FOLDER` reads it in a process of its own"
        )
    return f"{path}: not a directory; give the folder that holds the checkpoint's files"


def _nothing(folder: Path) -> str:
    pickles = sorted(entry.name for entry in folder.iterdir() if entry.suffix in PICKLES)
    if pickles:
        return (
            f"{folder}: holds {', '.join(pickles[:4])}; pickles can run code and are never read "
            f"while serving: `saeguard sae convert {folder / pickles[0]} FOLDER` reads one in a "
            "process of its own and writes what can be served"
        )
    for family in FAMILIES:
        missing = [name for name in family.files if not (folder / name).is_file()]
        if len(missing) < len(family.files):
            return f"{folder}: no file {missing[0]}, which {family.title} need; {found_in(folder)}"
    known = "; ".join(f"{' + '.join(family.files)} ({family.title})" for family in FAMILIES)
    return f"{folder}: no SAE checkpoint; {found_in(folder)}. Known: {known}"
