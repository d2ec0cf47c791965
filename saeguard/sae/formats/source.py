"""The input of every family's module, and the checks that all of them share."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saeguard.sae.checkpoint_info import Activation, Layout, Norm, SaeInfo, Stated
from saeguard.sae.errors import SaeError
from saeguard.sae.tensors import DTYPES, TensorFile

_TRANSFORMER_LENS_HOOK = re.compile(r"blocks\.(\d{1,4})\.hook_resid_(pre|post)")


@dataclass(frozen=True, slots=True)
class Source:
    """One checkpoint folder: headers and configuration, nothing else read yet."""

    folder: Path
    weights: TensorFile
    config_file: Path | None
    config: Mapping[str, Any]
    stated: Stated


@dataclass(frozen=True, slots=True)
class Sizes:
    """The sizes that all tensors of a checkpoint agree in."""

    d_in: int
    d_sae: int
    dtype: str
    """Of the encoder."""


def make_info(
    source: Source,
    found: Sizes,
    *,
    format_: str,
    architecture: str,
    layer: int,
    activation: Activation,
    layout: Layout,
    k: int | None = None,
    relu_after_topk: bool = True,
    norm: Norm = "none",
    eps: float = 0.0,
    transcoder: bool = False,
    model: str | None = None,
    folded: Sequence[str] = (),
) -> SaeInfo:
    """Return the description of `source`; defaults are the values of most families."""
    return SaeInfo(
        path=source.folder,
        weights=source.weights.path,
        config=source.config_file,
        format=format_,
        architecture=architecture,
        layer=layer,
        d_in=found.d_in,
        d_sae=found.d_sae,
        dtype=found.dtype,
        activation=activation,
        k=k,
        relu_after_topk=relu_after_topk,
        norm=norm,
        eps=eps,
        transcoder=transcoder,
        model=model,
        folded=tuple(folded),
        layout=layout,
    )


def sizes(source: Source, wanted: Mapping[str, str]) -> Sizes:
    """Compare the shapes of all tensors with that of the first.

    Args:
        source: the checkpoint.
        wanted: per tensor its axes, `d` the residual's width and `N` the latents; the first has
            both.

    Raises:
        SaeError: a tensor is missing, or has another shape or a type that is not read.
    """
    file, tensors = source.weights.path, source.weights.tensors
    missing = [name for name in wanted if name not in tensors]
    if missing:
        raise SaeError(
            f"{file}: tensor {', '.join(missing)} is missing; found {', '.join(sorted(tensors))}"
        )
    first, first_axes = next(iter(wanted.items()))
    shape = tensors[first].shape
    known = dict(zip(first_axes, shape, strict=False))
    for name, axes in wanted.items():
        stored = tensors[name]
        if len(shape) != len(first_axes) or stored.shape != tuple(known[axis] for axis in axes):
            raise SaeError(
                f"{file}: {name} has shape {list(stored.shape)}, but {first} has {list(shape)}; "
                f"{name} must be [{', '.join(axes)}] where {first} is [{', '.join(first_axes)}]"
            )
        if stored.dtype not in DTYPES:
            raise SaeError(f"{file}: {name} has dtype {stored.dtype}; allowed: {', '.join(DTYPES)}")
    if not math.prod(shape):
        raise SaeError(f"{file}: {first} is empty, {list(shape)}")
    return Sizes(known["d"], known["N"], tensors[first].dtype)


def check_config_sizes(source: Source, found: Sizes, d_in: str, d_sae: str) -> None:
    """Compare the sizes that the configuration names with those of the tensors.

    Args:
        source: the checkpoint.
        found: the tensors' sizes.
        d_in: the key of the residual's width in the configuration.
        d_sae: that of the number of latents.
    """
    for key, size in ((d_in, found.d_in), (d_sae, found.d_sae)):
        if source.config.get(key, size) != size:
            raise SaeError(
                f"{source.weights.path}: the encoder says {key} {size}, {source.config_file} says "
                f"{source.config[key]!r}"
            )


def wrong(source: Source, message: str) -> SaeError:
    """Return an error about the configuration."""
    return SaeError(f"{source.config_file or source.weights.path}: {message}")


def flag(source: Source, key: str, default: bool | None = None) -> bool:
    """Return a boolean of the configuration; the key is required if there is no default."""
    value = source.config.get(key, default)
    if not isinstance(value, bool):
        raise wrong(source, f"{key} is {value!r}; true or false is needed")
    return value


def text(source: Source, key: str) -> str | None:
    """Return a string of the configuration, None if the key is absent."""
    value = source.config.get(key)
    if value is not None and not isinstance(value, str):
        raise wrong(source, f"{key} is {value!r}; a text is needed")
    return value


def positive(source: Source, key: str, config: Mapping[str, Any] | None = None) -> float:
    """Return a number of the configuration, which must be finite and above 0."""
    value = (source.config if config is None else config).get(key)
    if type(value) not in {int, float} or not math.isfinite(value) or value <= 0:  # type: ignore[arg-type, operator]
        raise wrong(source, f"{key} is {value!r}; a finite number above 0 is needed")
    return float(value)  # type: ignore[arg-type]


def kept(source: Source, value: object, d_sae: int, *, key: str = "k") -> int:
    """Return the number of latents that TopK keeps, which must be 1 to `d_sae`."""
    if type(value) is not int or not 1 <= value <= d_sae:
        raise wrong(source, f"{key} is {value!r}; a number from 1 to d_sae, {d_sae}, is needed")
    return value


def stated_layer(source: Source, found: int | None, where: str) -> int:
    """Return the layer that the files name, or else the one that the user states.

    Raises:
        SaeError: neither does, or they differ.
    """
    stated = source.stated.layer
    if found is None and stated is None:
        raise SaeError(
            f"{source.folder}: the layer is not in the files; {where}, or state it: `layer:` in a "
            "feature set's `sae:`, `--layer` of a command"
        )
    if found is not None and stated is not None and found != stated:
        raise SaeError(f"{source.folder}: reads layer {found}, but layer {stated} was stated")
    layer = stated if found is None else found
    assert layer is not None
    return layer


def hooked_layer(source: Source, name: object, key: str = "hook_name") -> int:
    """Return L of `blocks.L.hook_resid_post`, TransformerLens' name of the hook point.

    Raises:
        SaeError: it is another hook point, or not the layer that the user states.
    """
    match = _TRANSFORMER_LENS_HOOK.fullmatch(name) if isinstance(name, str) else None
    layer = -1 if match is None else int(match[1]) - (match[2] == "pre")
    if layer < 0:
        raise wrong(
            source,
            f"{key} is {name!r}; the SAE must read the residual stream after a block, "
            "`blocks.L.hook_resid_post` (or `hook_resid_pre` of the block behind it)",
        )
    return stated_layer(source, layer, "")
