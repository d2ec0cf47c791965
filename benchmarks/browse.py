"""Time and memory of the index and of the page's views, on random latents of a small random model.

    python -m benchmarks.browse --latents 65536 --texts 400

The model and SAE are made on the spot (tests/models.py), with thresholds such that about `--l0`
latents fire on a token, so that the figures are of the index and the page, not of a model.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from starlette.testclient import TestClient

from saeguard.browse.server import app
from saeguard.browse.site import Site
from saeguard.hf.model import load_model
from saeguard.hf.residuals import record
from saeguard.hf.text_files import check_file
from saeguard.latents.build import build_index
from saeguard.latents.index import Index
from saeguard.sae import SaeInfo, inspect, read_rows
from tests import models

VIEWS = ("/", "/?q=a", "/latent/{}")
LOOKED = 40
"""Latents whose pages are opened."""


def make(root: Path, latents: int, texts: int, l0: float) -> tuple[Any, SaeInfo, Path]:
    """Return a model, an SAE that fires on about `l0` latents a token, and a corpus."""
    lm = load_model(models.make_model("llama", root / "model"))
    sae = models.make_sae(root / "sae", d_sae=latents)
    rng = random.Random(0)
    corpus = root / "corpus.jsonl"
    rows = [{"id": f"t{i}", "text": "".join(rng.choices("abcdefgh ijkl", k=200))}
            for i in range(texts)]  # fmt: skip
    corpus.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    ids = [lm.tokenizer(row["text"])["input_ids"] for row in rows[:8]]
    x = torch.cat([r[1] for _, r in record(lm, ids, [1])])
    file = sae / "sae_weights.safetensors"
    tensors = load_file(file)
    encoder = read_rows(inspect(sae), range(latents))
    z = x @ encoder.W.t() + encoder.b
    rank = max(1, int(len(z) * (1 - l0 / latents)))
    tensors["threshold"] = z.kthvalue(rank, dim=0).values.clamp(min=0.01)
    save_file(tensors, file)
    return lm, inspect(sae), corpus


def main() -> None:
    """Print the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--latents", type=int, default=8192)
    parser.add_argument("--texts", type=int, default=400)
    parser.add_argument("--l0", type=float, default=50)
    parser.add_argument("--out", type=Path, help="JSON file to write the figures into")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        lm, info, corpus = make(root, options.latents, options.texts, options.l0)
        out = root / "index.duckdb"
        start = time.perf_counter()
        build_index(lm, info, [check_file(corpus, lm.tokenizer)], out)
        built = time.perf_counter() - start
        index = Index(out)
        ((fired,),) = index.rows("SELECT sum(tokens) FROM latent")
        start = time.perf_counter()
        client = TestClient(app(Site(index, info)), base_url="http://127.0.0.1")
        client.get("/latent/0")
        first = time.perf_counter() - start
        times: dict[str, list[float]] = {view: [] for view in VIEWS}
        for latent in np.random.default_rng(0).integers(0, options.latents, LOOKED).tolist():
            for view in VIEWS:
                start = time.perf_counter()
                answer = client.get(view.format(latent))
                times[view].append(time.perf_counter() - start)
                assert answer.status_code == 200
        figures = {
            "latents": options.latents,
            "tokens": index.tokens,
            "latents_a_token": round(int(fired) / index.tokens, 1),
            "index_s": round(built, 1),
            "index_mib": round(out.stat().st_size / 2**20, 1),
            "most_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
            "first_view_ms": round(1000 * first),
            "views_ms": {
                view: {
                    "median": round(1000 * float(np.median(of))),
                    "p95": round(1000 * float(np.quantile(of, 0.95))),
                }
                for view, of in times.items()
            },
        }
    if options.out:
        options.out.write_text(json.dumps(figures))
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
