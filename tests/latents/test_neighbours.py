"""Neighbours are those of a brute-force cosine, in one SAE and between two."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from saeguard.errors import InputError
from saeguard.latents import neighbours as module
from saeguard.latents.neighbours import counterparts, flat_map, neighbours, unit_rows
from saeguard.sae import SaeInfo, inspect, read_decoder_rows, read_rows
from tests import models


@pytest.fixture(scope="module")
def saes(tmp_path_factory: pytest.TempPathFactory) -> tuple[SaeInfo, SaeInfo]:
    """Two SAEs of one width and different sizes."""
    root = tmp_path_factory.mktemp("neighbours")
    return tuple(
        inspect(models.make_sae(root / str(size), d_sae=size, seed=size)) for size in (48, 96)
    )


def brute(a: torch.Tensor, b: torch.Tensor) -> np.ndarray:
    """Return all cosines, pair by pair."""
    return np.array(
        [[float(x @ y / (x.norm() * y.norm())) for y in b.double()] for x in a.double()]
    )


@pytest.mark.parametrize("side", ["decoder", "encoder"])
def test_neighbours_equal_a_brute_force_cosine(
    saes: tuple[SaeInfo, SaeInfo], side: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In order, without the latent itself; in another SAE, with all of its latents."""
    monkeypatch.setattr(module, "BLOCK", 7)  # so that blocks end within

    def rows(info: SaeInfo) -> torch.Tensor:
        latents = range(info.d_sae)
        decoder = side == "decoder"
        return read_decoder_rows(info, latents) if decoder else read_rows(info, latents).W

    small, large = saes
    own, across = brute(rows(small), rows(small)), brute(rows(small), rows(large))
    for latent in (0, 5, 47):
        found = neighbours(small, latent, side=side, most=10)
        expected = [i for i in np.argsort(-own[latent]) if i != latent][:10]
        assert [n.latent for n in found] == expected
        assert [n.cosine for n in found] == pytest.approx(own[latent, expected].tolist(), abs=1e-5)
        found = neighbours(small, latent, side=side, other=large, most=10)
        assert [n.latent for n in found] == np.argsort(-across[latent])[:10].tolist()
    assert len(neighbours(small, 0, side=side, most=100)) == 47


def test_counterparts_are_the_nearest_of_all(
    saes: tuple[SaeInfo, SaeInfo], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each latent of one SAE has the other's latent with the highest cosine."""
    monkeypatch.setattr(module, "BLOCK", 11)
    small, large = saes
    cosines = brute(*(read_decoder_rows(info, range(info.d_sae)) for info in saes))
    counted: list[int] = []
    found = counterparts(small, large, counted.append)
    assert found.latent.tolist() == cosines.argmax(1).tolist()
    assert found.cosine.tolist() == pytest.approx(cosines.max(1).tolist(), abs=1e-5)
    assert sum(counted) == 48


def test_an_sae_of_another_width_is_refused(saes: tuple[SaeInfo, SaeInfo], tmp_path: Path) -> None:
    """Both widths are named."""
    other = inspect(models.make_sae(tmp_path / "sae", d_in=32, d_sae=8))
    with pytest.raises(InputError, match="width 32, expected 64"):
        neighbours(saes[0], 0, other=other)


def test_a_map_puts_near_rows_near() -> None:
    """Rows of two bunches lie in two bunches; few rows lie on a line."""
    torch.manual_seed(0)
    bunches = torch.nn.functional.normalize(torch.randn(2, 16), dim=1).repeat_interleave(20, 0)
    rows = torch.nn.functional.normalize(bunches + 0.05 * torch.randn(40, 16), dim=1)
    placed = flat_map(rows)
    assert placed.shape == (40, 2)
    assert np.abs(placed).max() == pytest.approx(1.0)
    first, second = placed[:20], placed[20:]
    apart = np.linalg.norm(first.mean(0) - second.mean(0))
    assert apart > 2 * max(first.std(), second.std())
    assert flat_map(rows[:2]).shape == (2, 2)


def test_rows_have_length_one(saes: tuple[SaeInfo, SaeInfo]) -> None:
    """So that products are cosines."""
    assert unit_rows(saes[0], [3, 1]).norm(dim=1).tolist() == pytest.approx([1, 1])
