"""Probes beside the latents of a guarded engine, and what `scan` says of the same texts."""

from __future__ import annotations

import dataclasses
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors.torch import save_file

from saeguard.features.pins import file_digest
from saeguard.hf.model import load_model
from saeguard.hf.scan import scan
from saeguard.hf.texts import Text
from tests import models
from tests.engine import engines

LAYERS = {"early": [0], "both": [0, 2]}
"""By probe: the layers that it reads. The SAE of `models.make_guarded` reads layer 1."""
ABOVE = (0.5, 1.0, 2.0, 4.0)


def add(guarded: models.Guarded) -> Path:
    """Write a feature set of probes alone; return a folder of its policies beside the others."""
    generator = torch.Generator().manual_seed(5)
    tensors = {}
    for name, layers in LAYERS.items():
        w = 0.3 * torch.randn(len(layers), models.HIDDEN, generator=generator)
        tensors[f"{name}.weight"] = w if len(layers) > 1 else w[0].clone()
        tensors[f"{name}.bias"] = torch.tensor(0.25)
    file = guarded.feature_sets / "probes.safetensors"
    save_file(tensors, file)
    content = {
        "schema": "saeguard.features/v1",
        "id": "probes",
        "title": "probes without an SAE",
        "model": {"name": "tiny", "hidden_size": models.HIDDEN, "num_layers": models.LAYERS},
        "exclude_tokens": [1],
        "features": {
            name: {
                "title": name,
                "behaviour": "none",
                "probe": {
                    "file": file.name,
                    "name": name,
                    "sha256": file_digest(file),
                    **({"layer": layers[0]} if len(layers) == 1 else {"layers": layers}),
                },
                "low": -1.0,
                "high": 1.0,
                "threshold": 0.5,
            }
            for name, layers in LAYERS.items()
        },
    }
    (guarded.feature_sets / "probes.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    folder = guarded.policies.with_name("with_probes")
    shutil.copytree(guarded.policies, folder)
    for name in LAYERS:
        for i, above in enumerate(ABOVE):
            models.write_policy(
                folder / f"{name}{i}.yaml",
                id=f"probe.{name}{i}",
                feature_set="probes",
                scope=["both", "output"][i % 2],
                detect={"a": {"feature": name, "above": above}},
                condition="a",
                **{"for": "2 of 4 tokens"},
            )
    return folder


def of_latents(served: engines.Served, settings: dict[str, Any]) -> engines.Served:
    """Return what was served with the columns of the latents' layer alone."""
    hooks = engines.compile_policies(settings).hooks
    before = sum(len(h.W) for h in hooks if h.layer < 1)  # norms are not among what was recorded
    columns = slice(before, before + next(len(h.W) for h in hooks if h.layer == 1))
    rows = {i: (at, f[:, columns]) for i, (at, f) in served.activations.items()}
    return dataclasses.replace(served, activations=rows)


def check_against_scan(
    served: engines.Served, guarded: models.Guarded, settings: dict[str, Any]
) -> int:
    """Check every verdict against `scan` of the same tokens; return how many are of probes."""
    watchlist = engines.compile_policies(settings)
    events = engines.events_by_request(Path(str(settings["events"])))
    texts = [
        Text(r["id"], tuple([*r["prompt"], *r["output"]][:-1]), len(r["prompt"]))
        for r in served.results
    ]
    outcomes: Counter[str] = Counter()
    for i, verdicts in scan(load_model(guarded.model), watchlist, texts):
        for verdict in verdicts:
            event = events[texts[i].id][verdict.policy]
            if verdict.score is not None and np.abs(verdict.score - 1) < 1e-3:
                continue  # within rounding of the threshold either verdict is right
            assert (event["verdict"], event["first_token"]) == (
                verdict.outcome,
                verdict.first_token,
            ), (texts[i].id, verdict, event)
            if verdict.policy.startswith("probe."):
                outcomes[verdict.outcome] += 1
    assert min(outcomes["match"], outcomes["no_match"]) > 0, outcomes
    return outcomes.total()
