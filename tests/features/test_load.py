"""Feature-set files are read strictly, pinned to their checkpoint, and written whole."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from saeguard.features.load import FeatureSetError, load_feature_set, save_feature_set
from saeguard.features.probe import Probe, ProbeError, read_probe, save_probes
from saeguard.features.types import FeatureSet, Term
from tests.features.planted import D
from tests.features.test_calibrate import feature, feature_set


def _saved(folder: Path, **changes: Any) -> Path:
    """Write a set of one feature and return its file."""
    features = feature_set(folder, feature(clamp=(Term(3, -1.0),), **changes))
    save_feature_set(features, folder / "demo.yaml")
    return folder / "demo.yaml"


def _edited(folder: Path, *path: str, value: Any) -> Path:
    """Change one key of a saved set; None removes it."""
    file = _saved(folder)
    content = yaml.safe_load(file.read_text())
    at = content
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    if value is None:
        del at[path[-1]]
    file.write_text(yaml.safe_dump(content))
    return file


def test_round_trip(tmp_path: Path) -> None:
    """What is saved is loaded, with paths relative to the file in it."""
    w = np.arange(D, dtype=np.float32)
    probes = save_probes({"p": Probe((1,), w[None], 0.5)}, tmp_path / "p.safetensors")
    latents = feature(clamp=(Term(3, -1.0),), evidence={"auroc": 0.9})
    probe = feature(id="probed", detect=(), probe=probes["p"])
    features = feature_set(tmp_path, latents)
    features = replace(features, features={"planted": latents, "probed": probe})
    save_feature_set(features, tmp_path / "demo.yaml")
    loaded = load_feature_set(tmp_path / "demo.yaml")
    assert replace(loaded, digest="") == features
    assert "path: sae" in (tmp_path / "demo.yaml").read_text()
    assert str(tmp_path) not in (tmp_path / "demo.yaml").read_text()
    read = read_probe(probes["p"], D)
    assert np.array_equal(read.w, w[None])
    assert read.b == 0.5


def _probes_alone(folder: Path) -> FeatureSet:
    """Return a set without an SAE: one probe on one layer, one on two."""
    one = Probe((2,), np.ones((1, D), np.float32), 0.5)
    two = Probe((0, 2), np.arange(2 * D, dtype=np.float32).reshape(2, D), -0.5)
    refs = save_probes({"one": one, "two": two}, folder / "p.safetensors")
    features = {name: feature(id=name, detect=(), probe=ref) for name, ref in refs.items()}
    return replace(feature_set(folder, feature()), sae=None, features=features)


def test_probes_need_no_sae(tmp_path: Path) -> None:
    """A set of probes alone is saved and loaded; each names its layers, one row of weights each."""
    features = _probes_alone(tmp_path)
    save_feature_set(features, tmp_path / "demo.yaml")
    loaded = load_feature_set(tmp_path / "demo.yaml")
    assert replace(loaded, digest="") == features
    assert loaded.layers == (0, 2)
    assert "sae" not in yaml.safe_load((tmp_path / "demo.yaml").read_text())
    two = loaded.features["two"].probe
    assert two is not None
    read = read_probe(two, D)
    assert read.w.shape == (2, D)
    x = {layer: torch.randn(5, D) for layer in (0, 2)}
    expected = x[0] @ torch.arange(D).float() + x[2] @ torch.arange(D, 2 * D).float() - 0.5
    assert np.allclose(expected, read.logits(x), rtol=1e-4, atol=1e-2)
    with pytest.raises(
        ProbeError, match=rf"found shape \[2, {D}\], expected \[3, {D}\], a row for"
    ):
        read_probe(replace(two, layers=(0, 1, 2)), D)


def test_a_probe_on_the_layer_of_the_sae_names_none(tmp_path: Path) -> None:
    """Sets from before probes had layers keep their digest."""
    probes = save_probes({"p": Probe((1,), np.ones((1, D), np.float32), 0.0)}, tmp_path / "p.st")
    file = _saved(tmp_path, detect=(), probe=probes["p"])
    content = yaml.safe_load(file.read_text())
    assert set(content["features"]["planted"]["probe"]) == {"file", "name", "sha256"}
    content["features"]["planted"]["probe"]["layer"] = 0
    file.write_text(yaml.safe_dump(content))
    assert load_feature_set(file).layers == (0,)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"layer": None}, "found neither layer nor layers, and the set has no SAE"),
        ({"layers": [0, 2]}, r"found layer: 2 and layers: \[0, 2\]; keep one"),
        ({"layer": 3}, "found layer 3, but model.num_layers is 3; write a layer from 0 to 2"),
        ({"layer": None, "layers": [2, 0]}, "write each layer once, in ascending order"),
        ({"layer": None, "layers": [1, 1]}, "write each layer once"),
        ({"layer": None, "layers": [0, 9]}, "found layer 9, but"),
        ({"layer": None, "layers": []}, "the value is empty"),
        ({"layer": -1}, "found -1"),
    ],
)
def test_mistakes_in_the_layers_of_a_probe(
    tmp_path: Path, changes: dict[str, Any], says: str
) -> None:
    """Layers must be named once, be in order, and exist in the model."""
    save_feature_set(_probes_alone(tmp_path), tmp_path / "demo.yaml")
    content = yaml.safe_load((tmp_path / "demo.yaml").read_text())
    probe = content["features"]["one"]["probe"] | changes
    content["features"]["one"]["probe"] = {k: v for k, v in probe.items() if v is not None}
    (tmp_path / "demo.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(FeatureSetError, match=says):
        load_feature_set(tmp_path / "demo.yaml")


def test_digest_ignores_layout(tmp_path: Path) -> None:
    """Comments and order do not change the digest; a weight does."""
    file = _saved(tmp_path)
    first = load_feature_set(file).digest
    content = yaml.safe_load(file.read_text())
    file.write_text("# a comment\n" + yaml.safe_dump(content, sort_keys=True))
    assert load_feature_set(file).digest == first
    content["features"]["planted"]["high"] = 7.5
    file.write_text(yaml.safe_dump(content))
    assert load_feature_set(file).digest != first


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        (("schema",), "saeguard.features/v2", "schema: "),
        (
            ("features", "planted", "detekt"),
            {1: 1.0},
            r'11:5: error\[unknown-key\]: "detekt" is .*did you mean "detect"',
        ),
        (("modell",), {}, r'22:1: error\[unknown-key\]: "modell" is .* did you mean "model"'),
        (
            ("features", "planted", "low"),
            "0",
            r"14:10: error\[wrong-type\]: found text",
        ),
        (("features", "planted", "low"), 5.0, r"low \(5\) must be below high \(1\)"),
        (
            ("features", "planted", "high"),
            float("nan"),
            r"13:11: error\[ambiguous-value\]",
        ),
        (
            ("features", "planted", "threshold"),
            0.0,
            r"15:16: error\[out-of-range\]: found 0.0",
        ),
        (("features", "planted", "detect"), None, "give either detect or probe"),
        (
            ("features", "planted", "detect"),
            {"x": 1.0},
            r"9:7: error\[wrong-type\]: found text",
        ),
        (("features", "planted", "detect"), {-1: 1.0}, r"9:7: error\[out-of-range\]: found -1"),
        (("features", "planted", "detect"), {9999: 1.0}, r"9:7: .*found latent 9999"),
        (("features", "planted", "clamp"), {9999: 1.0}, r"7:7: .*found latent 9999"),
        (("features",), {}, "features: "),
        (("features",), {"Bad Name": {}}, "Bad Name"),
        (("sae", "sha256"), "abc", r"27:11: error\[bad-name\]: .*64 hexadecimal digits"),
        (("sae", "layer"), 9, "sae.layer is 9"),
        (("sae", "d_in"), 7, "sae.d_in is 7"),
        (("model",), None, r'1:1: error\[missing-key\]: the key "model" is missing'),
    ],
)
def test_mistakes_name_file_and_field(
    tmp_path: Path, path: tuple[str, ...], value: Any, says: str
) -> None:
    """Unknown keys, wrong types and values out of range are refused."""
    file = _edited(tmp_path, *path, value=value)
    with pytest.raises(FeatureSetError, match=says) as caught:
        load_feature_set(file)
    assert str(caught.value).startswith(str(file))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: 1\na: 2\n", r':2:1: error\[duplicate-key\]: found the key "a" on line 1 already'),
        ("a: &x [1]\nb: *x\n", r":2:4: error\[alias\]"),
        ("a: !!python/object/apply:os.getcwd []\n", r":1:4: error\[tag\]"),
        ("a: [1\n", ":2:1: "),
        ("", r":1:1: error\[empty-file\]"),
        ("- 1\n", r":1:1: error\[wrong-type\]: found a list, expected a mapping"),
        ("[" * 5000, r":1:14: error\[too-deep\]"),
    ],
)
def test_refuses_dangerous_or_broken_yaml(tmp_path: Path, text: str, says: str) -> None:
    """Only plain YAML is read, and places are told."""
    file = tmp_path / "demo.yaml"
    file.write_text(text)
    with pytest.raises(FeatureSetError, match=says):
        load_feature_set(file)
    with pytest.raises(FeatureSetError, match=r"none\.yaml: error\[not-found\]"):
        load_feature_set(tmp_path / "none.yaml")


class TestPinned:
    """A feature set refuses another checkpoint than its own, and tells both values."""

    def test_other_weights(self, tmp_path: Path) -> None:
        """A changed weight file has another digest."""
        file = _saved(tmp_path)
        pinned = load_feature_set(file).sae.sha256
        weights = tmp_path / "sae" / "sae_weights.safetensors"
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(content)
        with pytest.raises(FeatureSetError, match=f"sae.sha256 is {pinned}, but .* has [0-9a-f]+"):
            load_feature_set(file)
        assert load_feature_set(file, verify=False).sae.sha256 == pinned

    def test_missing_sae(self, tmp_path: Path) -> None:
        """A checkpoint that is not there is named."""
        file = _edited(tmp_path, "sae", "path", value="elsewhere")
        with pytest.raises(FeatureSetError, match=r"sae\.path: .*elsewhere"):
            load_feature_set(file)

    def test_other_layer(self, tmp_path: Path) -> None:
        """A set for another layer is refused."""
        file = _edited(tmp_path, "sae", "layer", value=2)
        with pytest.raises(FeatureSetError, match=r"reads layer 1, but layer 2 was stated"):
            load_feature_set(file)

    def test_other_probe(self, tmp_path: Path) -> None:
        """A changed, missing or wrongly sized probe is refused."""
        probes = save_probes(
            {"p": Probe((1,), np.ones((1, D), np.float32), 0.0)}, tmp_path / "p.st"
        )
        file = _saved(tmp_path, detect=(), probe=probes["p"])
        save_probes({"p": Probe((1,), np.zeros((1, D), np.float32), 0.0)}, tmp_path / "p.st")
        with pytest.raises(FeatureSetError, match=r"features\.planted\.probe\.sha256 is"):
            load_feature_set(file)
        with pytest.raises(ProbeError, match=rf"found shape \[{D}\], expected \[9\]"):
            read_probe(probes["p"], 9)
        (tmp_path / "p.st").unlink()
        with pytest.raises(FeatureSetError, match=r"features\.planted\.probe\.file"):
            load_feature_set(file)


def test_saving_is_atomic(tmp_path: Path) -> None:
    """A set that could not be loaded again leaves the old file as it was."""
    file = _saved(tmp_path)
    before = file.read_text()
    features = load_feature_set(file)
    broken = replace(features.features["planted"], low=9.0)
    with pytest.raises(FeatureSetError, match="must be below"):
        save_feature_set(replace(features, features={"planted": broken}), file)
    assert file.read_text() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["demo.yaml", "sae"]


def test_a_full_disk_leaves_no_half_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where writing ends half-way, the set is as it was, and the half is taken away."""
    file = _saved(tmp_path)
    before, there = file.read_bytes(), sorted(tmp_path.rglob("*"))

    def full(_handle: int) -> None:
        raise OSError(28, "No space left on device", str(file))

    monkeypatch.setattr("saeguard.atomic_files.os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save_feature_set(load_feature_set(file), file)
    assert file.read_bytes() == before
    assert sorted(tmp_path.rglob("*")) == there
