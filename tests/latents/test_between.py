"""Two SAEs side by side, and dead latents: what `sae inspect` adds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from saeguard.cli.sae import verb
from saeguard.latents.between import between
from saeguard.latents.index import Index
from saeguard.sae import SaeInfo, inspect
from tests import models
from tests.latents.made import Made


@pytest.fixture
def split(tmp_path: Path) -> tuple[SaeInfo, SaeInfo]:
    """An SAE, and one in which latent 3 is split in three, 5 is missing and others are new."""
    small = models.make_sae(tmp_path / "small", d_sae=16)
    large = models.make_sae(tmp_path / "large", d_sae=32, seed=1)
    file = large / "sae_weights.safetensors"
    tensors = load_file(file)
    rows = load_file(small / "sae_weights.safetensors")["W_dec"].clone()
    torch.manual_seed(0)
    for at, latent in enumerate([0, 1, 2, 3, 3, 3, 4, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]):
        tensors["W_dec"][at] = rows[latent] + 0.05 * torch.randn(rows.shape[1])
    save_file(tensors, file)
    return inspect(small), inspect(large)


def test_splitting_is_found(split: tuple[SaeInfo, SaeInfo]) -> None:
    """The split latent with its parts, the missing one, and how many are found."""
    small, large = split
    found = between(small, large)
    assert found["most_split"] == [{"latent": 3, "parts": [3, 4, 5]}]
    assert found["latents_by_parts"] == {"0": 1, "1": 14, "2 or more": 1}
    assert (found["found_there"], found["found_here"]) == (15, 17)
    assert found["d_sae"] == 32


def test_inspect_shows_both(made: Made, split: tuple[SaeInfo, SaeInfo]) -> None:
    """In words and in JSON; the figures are those of the index."""
    small, large = split
    arguments = ["inspect", str(small.path), "--beside", str(large.path)]
    words = CliRunner().invoke(verb, arguments)
    assert words.exit_code == 0, words.output
    assert "1 latents have no part there, 14 one, 1 several: 3 into" in " ".join(
        words.stdout.replace("│", " ").split()
    )
    arguments = ["inspect", str(made.info.path), "--index", str(made.index)]
    plain = CliRunner().invoke(verb, [*arguments, "--json"])
    found = json.loads(plain.stdout)["latents_on_corpus"]
    index = Index(made.index)
    alive = [s for s in (index.stats(i) for i in range(64)) if not s.dead]
    assert found["dead"] == 64 - len(alive)
    assert sum(found["density"].values()) == len(alive)
    assert found["density"].get("1e-1", 0) == sum(0.1 <= s.density < 1 for s in alive)
    words = CliRunner().invoke(verb, arguments)
    assert "fire on none of" in words.stdout
    wrong = CliRunner().invoke(verb, ["inspect", str(small.path), "--index", str(made.index)])
    assert wrong.exit_code == 2
    assert "the index is of the SAE with sha256" in wrong.output
