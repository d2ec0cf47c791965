"""Recognise an SAE checkpoint by its headers: `cfg.json` beside `sae_weights.safetensors`.

The format is SAELens' (https://github.com/decoderesearch/SAELens, `SAE.save_model`), in its
present form and in the flat one from before version 6. Nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

CFG_FILE = "cfg.json"
WEIGHTS_FILE = "sae_weights.safetensors"
MAX_CFG_BYTES = 1 << 20
DTYPES = ("F64", "F32", "F16", "BF16")

TENSORS: Mapping[str, Mapping[str, str]] = {
    "standard": {"W_enc": "dN", "b_enc": "N", "W_dec": "Nd", "b_dec": "d"},
    "jumprelu": {"W_enc": "dN", "b_enc": "N", "W_dec": "Nd", "b_dec": "d", "threshold": "N"},
    "gated": {
        "W_enc": "dN",
        "W_dec": "Nd",
        "b_dec": "d",
        "b_gate": "N",
        "b_mag": "N",
        "r_mag": "N",
    },
    "topk": {"W_enc": "dN", "b_enc": "N", "W_dec": "Nd", "b_dec": "d"},
}
"""Tensors of each recognised architecture; d is the residual's width, N the latents."""

READABLE = ("standard", "jumprelu")
"""Architectures whose latents do not depend on each other and whose rows can be read."""

_FOLDED = "none"
_HOOK = re.compile(r"blocks\.(\d+)\.hook_resid_(pre|post)")
_NORMALISATION_HELP = {
    "expected_average_only_in": (
        "the factor is not part of the checkpoint: fold it in with SAELens "
        "(`sae.fold_activation_norm_scaling_factor(factor)`) and save the SAE again"
    ),
    "constant_norm_rescale": "it depends on each token's norm, which this version does not compute",
    "layer_norm": "it depends on each token's mean and spread, which this version does not compute",
}


class SaeError(ValueError):
    """A checkpoint is missing, damaged or of a form that cannot be read; says what to do."""


@dataclass(frozen=True, slots=True)
class SaeInfo:
    """What the headers of one checkpoint say."""

    path: Path
    """Directory of the checkpoint, absolute."""
    weights: Path
    """The weight file in it."""
    architecture: str
    """A key of `TENSORS`."""
    layer: int
    """The SAE reads `resid_post` of this block."""
    d_in: int
    d_sae: int
    dtype: str
    """As safetensors names it, such as `F32`."""
    apply_b_dec_to_input: bool
    normalize_activations: str

    @property
    def sha256(self) -> str:
        """Digest of the weight file; read once and remembered while the file is unchanged."""
        stat = self.weights.stat()
        return _digest(self.weights, stat.st_size, stat.st_mtime_ns)


def inspect(path: str | Path) -> SaeInfo:
    """Read the configuration and the tensor headers of the checkpoint in directory `path`.

    Raises:
        SaeError: the directory holds no checkpoint of a recognised form.
    """
    folder = Path(path).resolve()
    if not folder.is_dir():
        raise SaeError(f"{path}: not a directory; give the folder that holds {CFG_FILE}")
    weights = folder / WEIGHTS_FILE
    for file in (folder / CFG_FILE, weights):
        if not file.is_file():
            raise SaeError(_missing(folder, file.name))
    cfg = _read_cfg(folder / CFG_FILE)
    architecture = _architecture(folder / CFG_FILE, cfg)
    d_in, d_sae, dtype = _check_tensors(weights, architecture, cfg)
    return SaeInfo(
        path=folder,
        weights=weights,
        architecture=architecture,
        layer=_layer(folder / CFG_FILE, cfg),
        d_in=d_in,
        d_sae=d_sae,
        dtype=dtype,
        apply_b_dec_to_input=_flag(folder / CFG_FILE, cfg, "apply_b_dec_to_input"),
        normalize_activations=_normalisation(folder / CFG_FILE, cfg),
    )


def require_readable(info: SaeInfo) -> None:
    """Raise `SaeError` where single latents of this SAE cannot be computed."""
    if info.architecture not in READABLE:
        raise SaeError(
            f"{info.path / CFG_FILE}: architecture {info.architecture!r} is not supported yet by "
            f"this version for watched latents; supported: {', '.join(READABLE)}"
        )
    if info.normalize_activations != _FOLDED:
        reason = _NORMALISATION_HELP[info.normalize_activations]
        raise SaeError(
            f"{info.path / CFG_FILE}: normalize_activations {info.normalize_activations!r} is not "
            f"supported for watched latents: {reason}; supported: 'none'"
        )


@contextmanager
def opened(weights: Path) -> Iterator[Any]:
    """Open a safetensors file, with its errors told as `SaeError`."""
    try:
        with safe_open(weights, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise SaeError(
            f"{weights}: not a complete safetensors file ({error}); copy or download it again, "
            "or convert it with SAELens"
        ) from error


@lru_cache(maxsize=64)
def _digest(weights: Path, size: int, mtime_ns: int) -> str:
    """Hash a file; size and time of change are only there to key the cache."""
    del size, mtime_ns
    with weights.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _missing(folder: Path, name: str) -> str:
    found = sorted(entry.name for entry in folder.iterdir())[:8]
    return (
        f"{folder}: no file {name}; found {', '.join(found) or 'nothing'}. Supported is SAELens' "
        f"format, {CFG_FILE} beside {WEIGHTS_FILE}; pickles (.pt, .pth, .bin) and .npz are never "
        "read: convert them with SAELens"
    )


def _read_cfg(file: Path) -> dict[str, Any]:
    if file.stat().st_size > MAX_CFG_BYTES:
        raise SaeError(f"{file}: {file.stat().st_size} bytes; at most {MAX_CFG_BYTES} are read")
    try:
        cfg = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise SaeError(f"{file}: not JSON ({error})") from error
    if not isinstance(cfg, dict):
        raise SaeError(f"{file}: holds a {type(cfg).__name__}; a JSON object is needed")
    return cfg


def _architecture(file: Path, cfg: Mapping[str, Any]) -> str:
    name = cfg.get("architecture", "standard")
    # Before SAELens 6, TopK was an activation function of the standard architecture.
    if cfg.get("activation_fn", cfg.get("activation_fn_str")) == "topk":
        name = "topk"
    if name not in TENSORS:
        raise SaeError(
            f"{file}: architecture {name!r} is not recognised; known: {', '.join(TENSORS)}"
        )
    return str(name)


def _layer(file: Path, cfg: Mapping[str, Any]) -> int:
    metadata = cfg.get("metadata")
    metadata = metadata if isinstance(metadata, dict) else {}
    name = metadata.get("hook_name", cfg.get("hook_name", cfg.get("hook_point")))
    match = _HOOK.fullmatch(name) if isinstance(name, str) else None
    layer = -1 if match is None else int(match[1]) - (match[2] == "pre")
    if layer < 0:
        raise SaeError(
            f"{file}: hook_name is {name!r}; the SAE must read the residual stream after a block, "
            "`blocks.L.hook_resid_post` (or `hook_resid_pre` of the block behind it)"
        )
    return layer


def _flag(file: Path, cfg: Mapping[str, Any], key: str) -> bool:
    value = cfg.get(key, True)
    if not isinstance(value, bool):
        raise SaeError(f"{file}: {key} is {value!r}; true or false is needed")
    return value


def _normalisation(file: Path, cfg: Mapping[str, Any]) -> str:
    value = cfg.get("normalize_activations", _FOLDED)
    if value is None or value is False:
        return _FOLDED
    if value is True:
        return "expected_average_only_in"
    if value != _FOLDED and value not in _NORMALISATION_HELP:
        known = ", ".join((_FOLDED, *_NORMALISATION_HELP))
        raise SaeError(f"{file}: normalize_activations {value!r} is not recognised; known: {known}")
    return str(value)


def _check_tensors(
    weights: Path, architecture: str, cfg: Mapping[str, Any]
) -> tuple[int, int, str]:
    """Return d_in, d_sae and the encoder's dtype after comparing all shapes with each other."""
    wanted = TENSORS[architecture]
    with opened(weights) as file:
        names = set(file.keys())
        missing = sorted(wanted.keys() - names)
        if missing:
            raise SaeError(
                f"{weights}: tensor {', '.join(missing)} is missing, which architecture "
                f"{architecture!r} needs; found {', '.join(sorted(names))}"
            )
        if "scaling_factor" in names and not bool((file.get_tensor("scaling_factor") == 1).all()):
            raise SaeError(
                f"{weights}: scaling_factor differs from 1, which is not supported; fold it into "
                "the weights with SAELens and save the SAE again"
            )
        slices = {name: file.get_slice(name) for name in wanted}
        shapes = {name: tuple(s.get_shape()) for name, s in slices.items()}
        dtypes = {name: str(s.get_dtype()) for name, s in slices.items()}
    encoder = shapes["W_enc"]
    sizes = dict(zip("dN", encoder, strict=False))
    for name, axes in wanted.items():
        if len(encoder) != len("dN") or shapes[name] != tuple(sizes[axis] for axis in axes):
            raise SaeError(
                f"{weights}: {name} has shape {list(shapes[name])}, but W_enc has "
                f"{list(encoder)}; {name} must be [{', '.join(axes)}] where W_enc is [d, N]"
            )
        if dtypes[name] not in DTYPES:
            raise SaeError(
                f"{weights}: {name} has dtype {dtypes[name]}; allowed: {', '.join(DTYPES)}"
            )
    for key, size in (("d_in", sizes["d"]), ("d_sae", sizes["N"])):
        if cfg.get(key, size) != size:
            raise SaeError(f"{weights}: W_enc says {key} {size}, {CFG_FILE} says {cfg[key]!r}")
    if not math.prod(encoder):
        raise SaeError(f"{weights}: W_enc is empty, {list(encoder)}")
    return sizes["d"], sizes["N"], dtypes["W_enc"]
