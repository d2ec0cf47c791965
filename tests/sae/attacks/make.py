"""Hostile checkpoints, one function each; the regular expression is what the refusal must say.

They are made when a test runs: the large ones are sparse, the small ones would otherwise be
binaries that nobody can review.
"""

from __future__ import annotations

import io
import json
import os
import struct
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

D, N = 16, 64
FILE = "sae_weights.safetensors"

ATTACKS: dict[str, tuple[Callable[[Path], Path | None], str]] = {}
"""Name -> what makes it in a folder, and the refusal."""


def attack(says: str) -> Callable[[Callable[[Path], Path | None]], Callable[[Path], Path | None]]:
    """Enter a function into `ATTACKS`; it returns what to inspect if not the folder."""

    def enter(make: Callable[[Path], Path | None]) -> Callable[[Path], Path | None]:
        ATTACKS[make.__name__] = (make, says)
        return make

    return enter


def sound(folder: Path, **changes: Any) -> None:
    """Write a sound SAELens checkpoint with changed tensors; None leaves one out."""
    tensors: dict[str, Any] = {
        "W_enc": torch.ones(D, N), "b_enc": torch.ones(N), "W_dec": torch.ones(N, D),
        "b_dec": torch.ones(D), "threshold": torch.ones(N),
    }  # fmt: skip
    kept = {k: v for k, v in {**tensors, **changes}.items() if v is not None}
    save_file(kept, folder / FILE)
    config(folder)


def config(folder: Path, **changes: Any) -> None:
    """Write the configuration of `sound`."""
    cfg = {
        "architecture": "jumprelu", "d_in": D, "d_sae": N, "apply_b_dec_to_input": True,
        "normalize_activations": "none", "metadata": {"hook_name": "blocks.1.hook_resid_post"},
    }  # fmt: skip
    (folder / "cfg.json").write_text(json.dumps(cfg | changes))


def header(folder: Path, content: bytes, size: int = 0, claimed: int | None = None) -> None:
    """Write a safetensors file with this header and `size` bytes of holes."""
    config(folder)
    with (folder / FILE).open("wb") as file:
        file.write(struct.pack("<Q", len(content) if claimed is None else claimed) + content)
        file.truncate(8 + len(content) + size)


def entries(**changes: Any) -> dict[str, Any]:
    """Return the header of a sound file."""
    at, out = 0, {}
    shapes = {"W_enc": [D, N], "b_enc": [N], "W_dec": [N, D], "b_dec": [D], "threshold": [N]}
    for name, shape in shapes.items():
        end = at + 4 * int(np.prod(shape))
        out[name] = {"dtype": "F32", "shape": shape, "data_offsets": [at, end]}
        at = end
    return out | changes


TOTAL = entries()["threshold"]["data_offsets"][1]


def npz(folder: Path, write: Callable[[zipfile.ZipFile], None]) -> Path:
    """Write an npz in Gemma Scope's folders by hand."""
    inner = folder / "layer_1" / "width_64" / "average_l0_5"
    inner.mkdir(parents=True)
    with zipfile.ZipFile(inner / "params.npz", "w") as archive:
        write(archive)
    return inner


def npy(array: Any, **options: Any) -> bytes:
    """Return the bytes of a `.npy` file."""
    out = io.BytesIO()
    np.save(out, array, **options)
    return out.getvalue()


def arrays(**changes: Any) -> dict[str, Any]:
    """Return sound arrays of a Gemma Scope file."""
    ones = {
        "W_enc": np.ones((D, N), np.float32), "W_dec": np.ones((N, D), np.float32),
        "b_enc": np.ones(N, np.float32), "b_dec": np.ones(D, np.float32),
        "threshold": np.ones(N, np.float32),
    }  # fmt: skip
    return {k: v for k, v in {**ones, **changes}.items() if v is not None}


def saved(folder: Path, **changes: Any) -> Path:
    """Write an npz with changed arrays."""
    inner = folder / "layer_1" / "width_64" / "average_l0_5"
    inner.mkdir(parents=True)
    np.savez(inner / "params.npz", **arrays(**changes))
    return inner


# --- safetensors -----------------------------------------------------------------------------


@attack("not a complete safetensors file: it has 0 bytes")
def empty_file(folder: Path) -> None:
    """Nothing at all."""
    config(folder)
    (folder / FILE).touch()


@attack("header claims 18446744073709551615 bytes")
def header_length_overflow(folder: Path) -> None:
    """The largest length there is."""
    header(folder, b"{}", claimed=(1 << 64) - 1)


@attack("a header of 2097152 bytes; at most 1048576")
def huge_header(folder: Path) -> None:
    """A header that is all spaces."""
    header(folder, b"{" + b" " * ((2 << 20) - 2) + b"}")


@attack("a header of 8589934592 bytes; at most")
def sparse_huge_header(folder: Path) -> None:
    """Eight gigabytes of header in a sparse file."""
    header(folder, b"{", size=9 << 30, claimed=8 << 30)


@attack("the file at")
def truncated_data(folder: Path) -> None:
    """The last tensor is cut."""
    sound(folder)
    file = folder / FILE
    file.write_bytes(file.read_bytes()[:-5])


@attack("its tensors end at byte .*, the file at")
def trailing_bytes(folder: Path) -> None:
    """Something hides behind the tensors."""
    header(folder, json.dumps(entries()).encode(), size=TOTAL + 4096)


@attack("data_offsets .*, but the tensor before it ends at")
def overlapping_offsets(folder: Path) -> None:
    """Two tensors share bytes."""
    shared = {"dtype": "F32", "shape": [N], "data_offsets": [0, 4 * N]}
    header(folder, json.dumps(entries(b_enc=shared)).encode(), size=TOTAL)


@attack("the tensor before it ends at")
def gap_between_tensors(folder: Path) -> None:
    """Bytes that belong to no tensor."""
    late = {"dtype": "F32", "shape": [N], "data_offsets": [TOTAL + 64, TOTAL + 64 + 4 * N]}
    header(folder, json.dumps(entries(threshold=late)).encode(), size=TOTAL + 64 + 4 * N)


@attack(r"data_offsets \[-4, 60\] are not two sizes")
def negative_offsets(folder: Path) -> None:
    """Offsets before the data."""
    wrong = {"dtype": "F32", "shape": [D], "data_offsets": [-4, 60]}
    header(folder, json.dumps(entries(b_dec=wrong)).encode(), size=TOTAL)


@attack("are not two sizes")
def offsets_beyond_64_bits(folder: Path) -> None:
    """Offsets that overflow."""
    wrong = {"dtype": "F32", "shape": [D], "data_offsets": [1 << 64, (1 << 64) + 64]}
    header(folder, json.dumps(entries(b_dec=wrong)).encode(), size=TOTAL)


@attack("are no tensor's")
def shape_of_truth_values(folder: Path) -> None:
    """`true` is a 1 to careless readers."""
    wrong = entries()["b_dec"] | {"shape": [True, D]}
    header(folder, json.dumps(entries(b_dec=wrong)).encode(), size=TOTAL)


@attack("W_enc: .* bytes for F32 of shape")
def shape_product_overflows(folder: Path) -> None:
    """2^32 x 2^32 elements, which is 0 in 64 bits."""
    wrong = entries()["W_enc"] | {"shape": [1 << 32, 1 << 32]}
    header(folder, json.dumps(entries(W_enc=wrong)).encode(), size=TOTAL)


@attack("the key 'W_enc' is repeated")
def repeated_tensor(folder: Path) -> None:
    """Readers differ in which one they take."""
    text = json.dumps(entries())
    header(
        folder, ('{"W_enc": ' + json.dumps(entries()["b_dec"]) + ", " + text[1:]).encode(), TOTAL
    )


@attack("its header: not JSON")
def header_not_json(folder: Path) -> None:
    """Bytes that are no text."""
    header(folder, b"\xff\xfe{}" * 10)


@attack("its header: not JSON")
def deeply_nested_header(folder: Path) -> None:
    """Brackets that overflow a recursive parser."""
    header(folder, b'{"a":' * 50_000)


@attack("its header: holds a list")
def header_is_a_list(folder: Path) -> None:
    """JSON, but no object."""
    header(folder, b"[1, 2, 3]")


@attack("W_enc has dtype I64; allowed")
def integer_weights(folder: Path) -> None:
    """Weights that are counts."""
    sound(folder, W_enc=torch.ones(D, N, dtype=torch.int64))


@attack("threshold has dtype F8_E4M3; allowed")
def eight_bit_thresholds(folder: Path) -> None:
    """A type too coarse to compare with."""
    sound(folder, threshold=torch.ones(N).to(torch.float8_e4m3fn))


@attack(r"W_dec has shape \[16, 64\]")
def transposed_decoder(folder: Path) -> None:
    """The decoder the wrong way round."""
    sound(folder, W_dec=torch.ones(D, N))


@attack(r"W_enc is empty, \[16, 0\]")
def no_latents(folder: Path) -> None:
    """An encoder without rows."""
    none = torch.ones(0)
    sound(folder, W_enc=torch.ones(D, 0), b_enc=none, W_dec=torch.ones(0, D), threshold=none)


@attack("tensor threshold is missing")
def missing_threshold(folder: Path) -> None:
    """JumpReLU without thresholds would fire on everything."""
    sound(folder, threshold=None)


@attack("threshold of latent 3 is -0.5")
def negative_threshold(folder: Path) -> None:
    """A threshold below zero lets negative activations through."""
    threshold = torch.ones(N)
    threshold[3] = -0.5
    sound(folder, threshold=threshold)


@attack("W_enc of latent 3 is not finite")
def nan_weights(folder: Path) -> None:
    """NaN never fires: a guard that is silent for ever."""
    W_enc = torch.ones(D, N)
    W_enc[2, 3] = torch.nan
    sound(folder, W_enc=W_enc)


@attack("threshold of latent 3 is not finite")
def infinite_threshold(folder: Path) -> None:
    """A threshold that nothing exceeds."""
    threshold = torch.ones(N)
    threshold[3] = torch.inf
    sound(folder, threshold=threshold)


@attack("b_dec is not finite")
def nan_in_the_subtracted_bias(folder: Path) -> None:
    """One NaN there spoils every latent."""
    sound(folder, b_dec=torch.full((D,), torch.nan))


@attack("scaling_factor differs from 1")
def hidden_scale(folder: Path) -> None:
    """A factor that half of the readers apply."""
    sound(folder, scaling_factor=torch.full((N,), 3.0))


@attack("not a complete safetensors file")
def pickle_under_another_name(folder: Path) -> None:
    """A pickle that calls itself safetensors."""
    config(folder)
    torch.save({"W_enc": torch.ones(D, N)}, folder / FILE)


# --- configuration ----------------------------------------------------------------------------


@attack("the key 'architecture' is repeated")
def repeated_configuration_key(folder: Path) -> None:
    """Readers differ in which one they take."""
    sound(folder)
    text = (folder / "cfg.json").read_text()
    (folder / "cfg.json").write_text('{"architecture": "standard", ' + text[1:])


@attack("NaN is no JSON number")
def nan_in_configuration(folder: Path) -> None:
    """Python writes it, JSON does not have it."""
    sound(folder)
    (folder / "cfg.json").write_text('{"d_in": NaN}')


@attack("at most 1048576 are read")
def huge_configuration(folder: Path) -> None:
    """A configuration of gigabytes, sparse."""
    sound(folder)
    os.truncate(folder / "cfg.json", 4 << 30)


@attack("the encoder says d_sae 64")
def configuration_of_another_sae(folder: Path) -> None:
    """Configuration and weights were mixed up."""
    sound(folder)
    config(folder, d_sae=2 * N)


@attack("k is 65; a number from 1 to d_sae, 64")
def k_beyond_the_width(folder: Path) -> None:
    """TopK of more latents than there are."""
    sound(folder)
    config(folder, architecture="topk", k=N + 1)


@attack("k is True; a number")
def k_is_a_truth_value(folder: Path) -> None:
    """`true` is a 1 to careless readers."""
    sound(folder)
    config(folder, architecture="topk", k=True)


@attack("hook_name is '../../etc/passwd'")
def path_as_hook_name(folder: Path) -> None:
    """A name that would be a path."""
    sound(folder)
    config(folder, metadata={"hook_name": "../../etc/passwd"})


@attack("architecture .* is not recognised")
def architecture_is_a_list(folder: Path) -> None:
    """A value that cannot be looked up."""
    sound(folder)
    config(folder, architecture=["jumprelu"])


@attack("no file sae_weights.safetensors")
def sharded_index_that_lies(folder: Path) -> None:
    """An index that points out of the folder instead of weights."""
    config(folder)
    index = {"weight_map": {"W_enc": "../../../etc/passwd", "b_enc": "missing-00001.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@attack("holds .* and .*; a folder must hold one checkpoint")
def two_checkpoints_at_once(folder: Path) -> None:
    """Which one would be served depends on the order."""
    sound(folder)
    save_file({"encoder.weight": torch.ones(N, D)}, folder / "sae.safetensors")


# --- links ------------------------------------------------------------------------------------


@attack("a link to .*, which is outside of the checkpoint")
def weights_link_outside(folder: Path) -> None:
    """Weights that are somebody else's file."""
    sound(folder)
    (folder / FILE).rename(folder.parent / "elsewhere.safetensors")
    (folder / FILE).symlink_to("../elsewhere.safetensors")


@attack("a link to /etc/hostname|no file cfg.json")
def configuration_link_outside(folder: Path) -> None:
    """A configuration that is a system's file."""
    sound(folder)
    (folder / "cfg.json").unlink()
    (folder / "cfg.json").symlink_to("/etc/hostname")


@attack("no file sae_weights.safetensors")
def link_to_a_device(folder: Path) -> None:
    """A device that never ends."""
    config(folder)
    (folder / FILE).symlink_to("/dev/zero")


@attack("no file sae_weights.safetensors")
def link_to_itself(folder: Path) -> None:
    """A link that never arrives."""
    config(folder)
    (folder / FILE).symlink_to(FILE)


@attack("no file sae_weights.safetensors")
def named_pipe(folder: Path) -> None:
    """A pipe that nobody writes to, so that opening it would wait for ever."""
    config(folder)
    os.mkfifo(folder / FILE)


# --- npz --------------------------------------------------------------------------------------


@attack("an array of objects, which is a pickle")
def npz_with_objects(folder: Path) -> Path:
    """An array whose reading would unpickle."""
    content = npy(np.array([{"a": 1}], dtype=object), allow_pickle=True)
    return npz(folder, lambda archive: archive.writestr("W_enc.npy", content))


@attack("bytes for float32 of")
def npz_bomb(folder: Path) -> Path:
    """A kilobyte that inflates to far more than its header says."""

    def write(archive: zipfile.ZipFile) -> None:
        content = npy(np.ones((D, N), np.float32)) + bytes(64 << 20)
        archive.writestr("W_enc.npy", content, zipfile.ZIP_DEFLATED, 9)

    return npz(folder, write)


@attack(r"bytes for float32 of \[1099511627776, 64\]")
def npz_shape_that_lies(folder: Path) -> Path:
    """A header that asks for 256 terabytes."""
    content = npy(np.ones((D, N), np.float32)).replace(b"(16, 64)", b"(1099511627776, 64)", 1)
    return npz(folder, lambda archive: archive.writestr("W_enc.npy", content))


@attack("is not a `name.npy`")
def npz_path_trick(folder: Path) -> Path:
    """A member that would be written out of the folder."""
    content = npy(np.ones(3, np.float32))
    return npz(folder, lambda archive: archive.writestr("../../W_enc.npy", content))


@attack("a member is there twice")
def npz_repeated_member(folder: Path) -> Path:
    """Readers differ in which one they take."""

    def write(archive: zipfile.ZipFile) -> None:
        for value in (0, 1):
            with warnings.catch_warnings(action="ignore"):  # zipfile's own, of the second
                archive.writestr("W_enc.npy", npy(np.full((D, N), value, np.float32)))

    return npz(folder, write)


@attack("compression method 12")
def npz_other_compression(folder: Path) -> Path:
    """A method that is not numpy's."""
    content = npy(np.ones((D, N), np.float32))
    return npz(folder, lambda a: a.writestr("W_enc.npy", content, zipfile.ZIP_BZIP2))


@attack("a directory of .* bytes; at most 65536")
def npz_many_members(folder: Path) -> Path:
    """A directory that alone would fill the memory."""

    def write(archive: zipfile.ZipFile) -> None:
        for i in range(2000):
            archive.writestr(f"a{i}.npy", b"")

    return npz(folder, write)


@attack("its header is no array's")
def npz_header_with_code(folder: Path) -> Path:
    """A header that would be an expression to `eval`."""
    content = npy(np.ones((D, N), np.float32))
    swapped = content.replace(b"(16, 64)", b"exit(9) ", 1)
    return npz(folder, lambda archive: archive.writestr("W_enc.npy", swapped))


@attack("it does not end as a zip archive does")
def npz_truncated(folder: Path) -> Path:
    """The end, and with it the directory, is missing."""
    inner = saved(folder)
    file = inner / "params.npz"
    file.write_bytes(file.read_bytes()[: 4 * D * N])
    return inner


@attack("tensor threshold is missing")
def npz_without_threshold(folder: Path) -> Path:
    """A Gemma Scope file without its thresholds."""
    return saved(folder, threshold=None)


@attack("W_enc has dtype >f4; allowed")
def npz_big_endian(folder: Path) -> Path:
    """Bytes in another order."""
    return saved(folder, W_enc=np.ones((D, N), ">f4"))


@attack("threshold of latent 0 is -1")
def npz_negative_threshold(folder: Path) -> Path:
    """Thresholds as never set."""
    return saved(folder, threshold=np.full(N, -1, np.float32))
