"""An SAE of 16 million latents starts in seconds and costs megabytes."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

LATENTS, WIDTH = 16_000_000, 1024
WATCHED = [5, 1_234_567, 8_000_000, 15_999_999]

READ = """
import json, resource, sys, time
from saeguard.sae import inspect, read_decoder_rows, read_rows
folder, latents = sys.argv[1], json.loads(sys.argv[2])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
start = time.perf_counter()
info = inspect(folder)
rows = read_rows(info, latents)
read_decoder_rows(info, latents)
seconds = time.perf_counter() - start
grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
W = rows.W[:, 7].tolist()
print(json.dumps({"d_sae": info.d_sae, "W": W, "seconds": seconds, "MiB": grown}))
"""


def write_sparse(folder: Path) -> None:
    """Write a SAELens checkpoint of 122 GiB that takes a few pages of disk."""
    folder.mkdir()
    name = "sae_weights.safetensors"
    shapes = {
        "W_enc": [WIDTH, LATENTS], "W_dec": [LATENTS, WIDTH], "b_enc": [LATENTS],
        "b_dec": [WIDTH], "threshold": [LATENTS],
    }  # fmt: skip
    header, at = {}, 0
    for tensor, shape in shapes.items():
        end = at + 4 * int(np.prod(shape, dtype=np.int64))
        header[tensor] = {"dtype": "F32", "shape": shape, "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    with (folder / name).open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        data = file.tell()
        file.truncate(data + at)
        for latent in WATCHED:
            file.seek(data + 4 * (7 * LATENTS + latent))
            file.write(struct.pack("<f", latent % 1000))
    cfg = {
        "architecture": "jumprelu", "d_in": WIDTH, "d_sae": LATENTS, "apply_b_dec_to_input": True,
        "metadata": {"hook_name": "blocks.1.hook_resid_post"},
    }  # fmt: skip
    (folder / "cfg.json").write_text(json.dumps(cfg))


def test_sixteen_million_latents(tmp_path: Path) -> None:
    """Rows of a file of 122 GiB are read by slices: far below a minute, below 32 MiB."""
    write_sparse(tmp_path / "sae")
    file = tmp_path / "sae" / "sae_weights.safetensors"
    if file.stat().st_blocks * 512 > 1 << 30:
        pytest.skip("this file system has no sparse files")
    done = subprocess.run(
        [sys.executable, "-c", READ, str(tmp_path / "sae"), json.dumps(WATCHED)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    got = json.loads(done.stdout)
    print(f"{file.stat().st_size / (1 << 30):.0f} GiB: {got}")
    assert got["d_sae"] == LATENTS
    assert got["W"] == [latent % 1000 for latent in WATCHED]
    assert got["MiB"] < 32
    assert got["seconds"] < 60
