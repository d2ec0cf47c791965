"""Probes on one or several layers: one encoder row at each, added up to one value."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from saeguard.features.load import load_feature_set, save_feature_set
from saeguard.features.probe import Probe, read_probe, save_probes
from saeguard.features.types import Feature, FeatureSet, ModelRef
from saeguard.guard.build_watchlist import build_watchlist
from saeguard.guard.prefix.store import PrefixStore
from saeguard.guard.watchlist import WatchList, WatchListError
from saeguard.hf.scan import activations
from saeguard.policy.types import Clamp, Selection
from tests.guarded import feature_set, policy

D = 16
GENERATOR = np.random.default_rng(3)
PROBES = {
    "early": Probe((0,), GENERATOR.standard_normal((1, D)).astype(np.float32), 0.25),
    "both": Probe((0, 2), GENERATOR.standard_normal((2, D)).astype(np.float32), -1.5),
}
X = {layer: torch.from_numpy(GENERATOR.standard_normal((7, D), np.float32)) for layer in range(3)}


def probes_alone(folder: Path, probes: dict[str, Probe] | None = None) -> FeatureSet:
    """Save and load a set of probes without an SAE."""
    folder.mkdir(parents=True, exist_ok=True)
    refs = save_probes(PROBES if probes is None else probes, folder / "probes.safetensors")
    features = {
        name: Feature(name, name, "noise", (), ref, (), -1.0, 2.0, 0.5, {})
        for name, ref in refs.items()
    }
    made = FeatureSet(
        id="probes",
        path=folder / "probes.yaml",
        model=ModelRef("tiny", D, 3),
        sae=None,
        features=features,
        exclude_tokens=(0,),
        digest="",
    )
    save_feature_set(made, made.path)
    return load_feature_set(made.path)


def watch(features: FeatureSet) -> WatchList:
    """Return the watch list of one policy a feature."""
    policies = [
        replace(
            policy("flag"),
            id=f"probe.{name}",
            feature_set=features.id,
            detect={"loud": Selection(name, 0.5)},
        )
        for name in features.features
    ]
    return build_watchlist(policies, {features.id: features})


def test_each_layer_has_a_part_and_the_mix_adds_them(tmp_path: Path) -> None:
    """The watch list's shares are those of the probe that was fitted, bias and all."""
    features = probes_alone(tmp_path)

    watchlist = watch(features)
    shares = watchlist.shares(activations(watchlist, X))

    assert [(hook.layer, len(hook.W)) for hook in watchlist.hooks] == [(0, 2), (2, 1)]
    assert all((hook.theta == -torch.inf).all() for hook in watchlist.hooks)
    for i, name in enumerate(watchlist.features):
        probe = PROBES[name.removeprefix("probes/")]
        parts = [X[layer].numpy() @ w for layer, w in zip(probe.layers, probe.w, strict=True)]
        np.testing.assert_allclose(shares[:, i] * 3 - 1, sum(parts) + probe.b, atol=1e-5)


def test_parts_add_up_as_recorded(tmp_path: Path) -> None:
    """Equal parts give equal values in serving and in calibration, to the last bit."""
    features = probes_alone(tmp_path)
    watchlist = watch(features)
    column = watchlist.features.index("probes/both")
    f = activations(watchlist, X)
    read = [c for c, _ in watchlist.latents(column)]
    ref = features.features["both"].probe
    assert ref is not None
    probe = read_probe(ref, D)

    # A width of one makes a part equal on both sides, whatever kernel multiplies.
    ones = replace(probe, w=np.ones((2, 1), np.float32), b=0.0)
    x = {layer: torch.from_numpy(f[:, [c]]) for layer, c in zip(probe.layers, read, strict=True)}

    assert np.array_equal(
        (ones.logits(x) + np.float32(1)) / np.float32(3), watchlist.shares(f)[:, column]
    )


def test_other_layers_are_other_rows(tmp_path: Path) -> None:
    """The digest changes if a layer does, even with equal weights."""
    one = watch(probes_alone(tmp_path / "a", {"p": PROBES["early"]}))
    other = watch(probes_alone(tmp_path / "b", {"p": replace(PROBES["early"], layers=(1,))}))

    assert one.digest != other.digest
    assert [hook.layer for hook in other.hooks] == [1]


def test_parts_are_recalled_whatever_their_sign(tmp_path: Path) -> None:
    """A part has no threshold: the prefix store keeps negative ones as well."""
    watchlist = watch(probes_alone(tmp_path))
    f = activations(watchlist, X)
    assert (f < 0).any()
    store = PrefixStore(len(f), watchlist.columns, blocks=1, limit_bytes=1 << 20)

    store.put([b"block"], f[None], np.ones((1, len(f)), bool))

    found = store.get(b"block")
    assert found is not None
    assert np.array_equal(found[0], f)


def test_latents_and_probes_of_other_layers_share_a_set(tmp_path: Path) -> None:
    """A set reads its SAE's layer and those of its probes."""
    features = with_probe(tmp_path)

    watchlist = watch(features)

    assert features.layers == (0, 1, 2)
    assert [hook.layer for hook in watchlist.hooks] == [0, 1, 2]


def with_probe(folder: Path) -> FeatureSet:
    """Return the demo set of latents with a probe on two other layers."""
    features = feature_set(folder, D)
    refs = save_probes({"both": PROBES["both"]}, folder / "probes.safetensors")
    probe = Feature("both", "Both", "noise", (), refs["both"], (), -1.0, 2.0, 0.5, {})
    return replace(features, features={**features.features, "both": probe})


@pytest.mark.parametrize("mode", ["enforce", "shadow"])
def test_a_clamp_of_a_probe_is_refused(tmp_path: Path, mode: str) -> None:
    """A probe names no latents to edit, with or without an SAE beside it."""
    may_enforce = frozenset({"noise.loud"} if mode == "shadow" else ())
    for features in (probes_alone(tmp_path / "a"), with_probe(tmp_path / "b")):
        clamping = replace(
            policy("clamp"),
            mode=mode,
            feature_set=features.id,
            clamp=Clamp(("both",), 0.0),
            detect={"loud": Selection("both", 0.5)},
        )
        with pytest.raises(WatchListError, match=r"'both' of .* names no clamp latents; a probe"):
            build_watchlist([clamping], {features.id: features}, may_enforce=may_enforce)


def test_a_clamp_that_looks_at_another_layer_is_refused(tmp_path: Path) -> None:
    """The rules of a clamp see only what its own layer's tap read."""
    features = with_probe(tmp_path)
    clamping = replace(policy("clamp"), detect={"loud": Selection("both", 0.5)})

    with pytest.raises(WatchListError, match=r"'both' of .* reads layer 0, 2, but the clamp edits"):
        build_watchlist([clamping], {features.id: features})


def test_latents_without_an_sae_are_refused(tmp_path: Path) -> None:
    """A set that was not read from a file is checked as well."""
    features = replace(feature_set(tmp_path, D), sae=None)

    with pytest.raises(WatchListError, match="'loud' names latents, but the set has no SAE"):
        build_watchlist([policy("flag")], {features.id: features})
