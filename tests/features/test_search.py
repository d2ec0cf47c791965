"""The search finds what was planted and reports nothing where nothing is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from saeguard.features.corpus import Corpus
from saeguard.features.fit_probe import fit_probe
from saeguard.features.search import SearchError, search
from saeguard.sae import inspect
from tests.features.planted import PLANTED, D, corpus, save_sae


def test_finds_the_planted_latents(tmp_path: Path) -> None:
    """Both planted latents come first, and their group beats either."""
    info = inspect(save_sae(tmp_path))
    found = search(info, corpus("search"), corpus("holdout"), top=5, seed=1)
    assert {f.terms[0].latent for f in found.latents[:2]} == set(PLANTED)
    assert {t.latent for t in found.group.terms} >= set(PLANTED)
    assert found.latents[0].auroc_holdout < 0.9 < found.group.auroc_holdout
    assert max(t.weight for t in found.group.terms) == 1.0
    assert min(t.weight for t in found.group.terms) > 0
    assert found.probe.auroc_holdout > 0.9
    assert found.controls[1].auroc_holdout < 0.7
    low, high = found.group.interval
    assert low <= found.group.auroc_holdout <= high
    assert [row["form"] for row in found.report()][:3] == ["probe", "group", "latent"]


def test_is_deterministic(tmp_path: Path) -> None:
    """One seed gives one report."""
    info = inspect(save_sae(tmp_path))
    texts = corpus("search"), corpus("holdout")
    assert search(info, *texts, top=3).report() == search(info, *texts, top=3).report()


def test_no_signal_is_reported_as_chance(tmp_path: Path) -> None:
    """What was picked by luck on the search split is near one half on the hold-out."""
    info = inspect(save_sae(tmp_path))
    found = search(info, corpus("search", signal=0.0), corpus("holdout", signal=0.0), top=5)
    for finding in (found.group, found.probe, *found.latents):
        assert finding.interval[0] < 0.55
        assert finding.auroc_holdout < 0.7


def test_probe_reads_one_token_among_many() -> None:
    """The probe's largest logit finds a single strong token."""
    probe, validated, _ = fit_probe(corpus("search"), seed=0)
    held = corpus("holdout")
    logits = probe.logits(held.by_layer)
    assert validated > 0.9
    assert probe.w.dtype == np.float32
    assert logits.shape == (len(held.tokens),)


def layered(split: str) -> Corpus:
    """Return texts read at three layers: what is planted shows weakly in 1 and in 2, not in 0."""
    weak = corpus(split, signal=1.6)
    rng = np.random.default_rng([ord(c) for c in f"{split} again"])
    noise = [
        torch.from_numpy(0.3 * rng.standard_normal(weak.x.shape).astype(np.float32))
        for _ in range(2)
    ]
    own = torch.from_numpy(0.3 * rng.standard_normal(weak.x.shape).astype(np.float32))
    return replace(weak, x=torch.cat([noise[0], weak.x, weak.x + own], 1), layers=(0, 1, 2))


def test_layers_are_compared_alone_and_together() -> None:
    """Each layer and their concatenation are reported; the folds of the search split choose."""
    found = search(None, layered("search"), layered("holdout"), layers=(0, 1, 2))

    by_layers = {finding.layers: finding for finding in (found.probe, *found.other_probes)}
    assert set(by_layers) == {(0,), (1,), (2,), (0, 1, 2)}
    validated = [f.auroc_validation for f in found.findings]
    assert validated == sorted(validated, reverse=True)
    assert by_layers[0,].auroc_holdout < 0.7
    assert by_layers[1,].auroc_holdout > 0.8
    assert found.probe.probe is not None
    assert found.probe.probe.w.shape == (len(found.probe.layers), D)
    assert found.group is None
    assert found.report()[0]["layers"] == list(found.probe.layers)


def test_a_probe_on_layers_is_a_probe_on_their_concatenation() -> None:
    """The parts of the fitted probe add up to the logit that its fit saw."""
    texts = layered("search")
    probe, *_ = fit_probe(texts, seed=0, layers=(0, 2))
    side_by_side = torch.cat([texts.at(0), texts.at(2)], 1)

    expected = side_by_side @ torch.from_numpy(probe.w.reshape(-1)) + probe.b

    np.testing.assert_allclose(probe.logits(texts.by_layer), expected, rtol=1e-4, atol=1e-4)


def test_refuses_a_leaky_or_small_holdout(tmp_path: Path) -> None:
    """Shared templates and a handful of texts are refused."""
    info = inspect(save_sae(tmp_path))
    with pytest.raises(SearchError, match="share 20 templates"):
        search(info, corpus("search"), corpus("search"))
    with pytest.raises(SearchError, match="the hold-out split has 5 positive"):
        search(info, corpus("search"), corpus("holdout", 10))
