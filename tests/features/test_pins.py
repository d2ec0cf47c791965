"""What a feature set rests on is pinned: weights, configuration, model, and its arithmetic."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from saeguard.cli import main
from saeguard.features.files import FeatureSetError
from saeguard.features.load import load_feature_set
from saeguard.features.model_fit import ModelFitError, check_fit, read_shape
from saeguard.features.model_identity import INDEX, WEIGHTS, quantization_of, weights_sha256
from saeguard.features.types import MeasuredDrift
from saeguard.policy_tools.recording import read_recording, write_recording
from saeguard.reload.policy_source import Source, load
from saeguard.vllm.model_fit import check_models
from tests import models


def run(*arguments: object) -> int:
    """Return the exit code of a command."""
    with pytest.raises(SystemExit) as ended:
        main([str(a) for a in arguments])
    return int(ended.value.code or 0)


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> models.Guarded:
    """A model, an SAE, a set and policies; nothing but the SAE's digests is pinned."""
    return models.make_guarded(tmp_path_factory.mktemp("pins"))


def copy(guarded: models.Guarded, root: Path, *drop: str) -> models.Guarded:
    """Copy it, leaving keys of the set's `sae:` out."""
    for name in ("model", "sae", "policies", "feature_sets"):
        shutil.copytree(guarded.policies.parent / name, root / name)
    file = root / "feature_sets" / "tiny.yaml"
    content = yaml.safe_load(file.read_text())
    content["sae"]["path"] = "../sae"
    for key in drop:
        del content["sae"][key]
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    return replace(
        guarded, model=root / "model", sae=root / "sae", policies=root / "policies",
        feature_sets=root / "feature_sets",
    )  # fmt: skip


def turn_b_dec(sae: Path) -> None:
    """Change what the encoder computes, in its configuration alone."""
    file = sae / "cfg.json"
    config = json.loads(file.read_text())
    config["apply_b_dec_to_input"] = not config.get("apply_b_dec_to_input", True)
    file.write_text(json.dumps(config))


def test_the_configuration_is_pinned(guarded: models.Guarded, tmp_path: Path) -> None:
    """With the pin, another configuration is refused; without, it is another watch list."""
    pinned = copy(guarded, tmp_path / "pinned")
    turn_b_dec(pinned.sae)
    with pytest.raises(FeatureSetError, match=r"sae\.config_sha256 is .*, but .* has"):
        load_feature_set(pinned.feature_sets / "tiny.yaml")
    free = copy(guarded, tmp_path / "free", "config_sha256")
    source = Source(free.policies, free.feature_sets)
    before = load(source).watchlist.digest
    turn_b_dec(free.sae)
    assert load(source).watchlist.digest != before


def test_missing_pins_are_told(
    guarded: models.Guarded, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`check` warns of each, signing refuses, `features pin` writes them; then both are content."""
    free = copy(guarded, tmp_path / "free", "config_sha256")
    file, key = free.feature_sets / "tiny.yaml", tmp_path / "key"
    where = [free.policies, "--feature-sets", free.feature_sets]
    assert run("check", *where) == 0
    out = capsys.readouterr().out
    assert out.count("warning[not-pinned]") == 2
    assert 'the key "sha256" is missing, the digest of the model\'s weights' in out
    assert 'the key "config_sha256" is missing, the digest of the SAE\'s configuration' in out
    assert run("policy", "keygen", key) == 0
    assert run("policy", "sign", "--key", key, *where) == 2
    assert "a signature would cover less than it seems to" in capsys.readouterr().err
    assert run("features", "pin", "--set", file, "--model", free.model, "--dtype", "float32") == 0
    assert load_feature_set(file).model.dtype == "float32"
    assert run("check", "--strict", *where) == 0
    assert run("policy", "sign", "--key", key, *where) == 0
    assert run("features", "pin", "--set", file, "--dtype", "float16") == 2
    weights = load_file(free.model / WEIGHTS)
    save_file({name: 2 * w for name, w in weights.items()}, free.model / WEIGHTS)
    assert run("features", "pin", "--set", file, "--model", free.model) == 2
    assert "its latents mean nothing with other weights" in capsys.readouterr().err


def shard(model: Path) -> None:
    """Split the weights into two files with an index, as large models have."""
    weights = load_file(model / WEIGHTS)
    half = len(weights) // 2
    where = {}
    for i, names in enumerate((list(weights)[:half], list(weights)[half:]), 1):
        name = f"model-0000{i}-of-00002.safetensors"
        save_file({n: weights[n].contiguous() for n in names}, model / name)
        where.update(dict.fromkeys(names, name))
    (model / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    (model / WEIGHTS).unlink()


def test_a_sharded_model(guarded: models.Guarded, tmp_path: Path) -> None:
    """Any shard, and the index, is part of its identity; another of the same shape is refused."""
    model = copy(guarded, tmp_path).model
    whole = weights_sha256(model)
    shard(model)
    first = weights_sha256(model)
    assert first not in {None, whole}
    ref = replace(load_feature_set(tmp_path / "feature_sets" / "tiny.yaml").model, sha256=first)
    check_fit(ref, read_shape(model), model, at="the set")
    index = json.loads((model / INDEX).read_text())
    (model / INDEX).write_text(json.dumps({**index, "metadata": {"total_size": 1}}))
    assert weights_sha256(model) == first
    file = model / sorted(set(index["weight_map"].values()))[1]
    save_file({name: 2 * w for name, w in load_file(file).items()}, file)
    with pytest.raises(ModelFitError, match="mean nothing with other weights"):
        check_fit(ref, read_shape(model), model, at="the set")
    file.unlink()
    with pytest.raises(ModelFitError, match="cannot be compared"):
        check_fit(ref, read_shape(model), model, at="the set")
    (model / INDEX).write_text("[]")
    with pytest.raises(ModelFitError, match="expected the key weight_map"):
        check_fit(ref, read_shape(model), model, at="the set")


@pytest.mark.parametrize(
    ("config", "found"),
    [
        ({}, None),
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "awq"),
        (SimpleNamespace(quantization_config={"quant_method": "fp8"}), "fp8"),
        (SimpleNamespace(quantization_config=SimpleNamespace(quant_method="gptq")), "gptq"),
        (SimpleNamespace(quantization_config=None), None),
    ],
)
def test_quantisation(config: object, found: str | None) -> None:
    """It is named as the model's configuration names it."""
    assert quantization_of(config) == found


@pytest.mark.parametrize(
    ("dtype", "quantization", "warned"),
    [
        (torch.float32, None, ""),
        (torch.bfloat16, None, "calibrated=float32"),
        (torch.float32, "awq", "quantised: awq"),
    ],
)
def test_serving_under_other_arithmetic(
    dtype: torch.dtype,
    quantization: str | None,
    warned: str,
    guarded: models.Guarded,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The start says what the set was calibrated with, and what it is served with."""
    ref = load_feature_set(guarded.feature_sets / "tiny.yaml").model
    shape = read_shape(guarded.model)
    text = SimpleNamespace(hidden_size=shape.hidden_size, num_hidden_layers=shape.num_layers)
    config = SimpleNamespace(
        model=str(guarded.model), hf_text_config=text, dtype=dtype, quantization=quantization
    )
    check_models(config, [replace(ref, dtype="float32")])
    printed = capsys.readouterr()
    told = printed.out + printed.err
    assert warned in told
    assert ("saeguard features drift" in told) == bool(warned)
    check_models(config, [ref])
    printed = capsys.readouterr()
    assert "an unknown type" in printed.out + printed.err
    if warned:
        known = replace(ref, dtype="float32")
        how = replace(known, dtype=str(dtype)[6:], quantization=quantization).arithmetic
        drift = ((how, MeasuredDrift(900, 0.01, 0.125, 70, 3, 2)),)
        check_models(config, [replace(known, drift=drift)])
        printed = capsys.readouterr()
        told = printed.out + printed.err
        assert "[warning" not in told
        assert "one by 0.12; of 70 above their threshold 3 fell below, and 2 rose above" in told


def test_drift(guarded: models.Guarded, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is 0 between equal recordings, and what a feature moved by otherwise."""
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(f'{{"id": "{i}", "text": "hello {i} world"}}\n' for i in range(4)))
    first, second = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    record = ["policy", "record", texts, "--model", guarded.model]
    assert run(*record, "--feature-sets", guarded.feature_sets, "--out", first) == 0
    drift = ["features", "drift", "--feature-sets", guarded.feature_sets, "--json", first]
    capsys.readouterr()
    assert run(*drift, first) == 0
    assert {d["highest"] for d in json.loads(capsys.readouterr().out)} == {0.0}
    recording = read_recording(first)
    values = recording.values.copy()
    values[:, 0] += 0.25
    write_recording(replace(recording, values=values), second)
    assert run(*drift, second) == 0
    found = json.loads(capsys.readouterr().out)
    moved = values[recording.evaluable, 0] - recording.values[recording.evaluable, 0]
    assert found[0]["mean"] == pytest.approx(float(np.abs(moved).mean()))
    crossed = (values[:, 0] > 0.5) & (recording.values[:, 0] <= 0.5) & recording.evaluable
    assert (found[0]["gained"], found[0]["lost"]) == (int(crossed.sum()), 0)
    assert {d["highest"] for d in found[1:]} == {0.0}
    set_ = copy(guarded, tmp_path / "copy").feature_sets / "tiny.yaml"
    before = load_feature_set(set_)
    assert run(*drift, second, "--set", set_, "--served", "float32") == 0
    after = load_feature_set(set_)
    [(how, kept)] = after.model.drift
    assert (how, kept.highest) == ("float32", pytest.approx(found[0]["highest"], abs=1e-4))
    assert kept.gained == sum(d["gained"] for d in found)
    assert after.digest != before.digest
    assert run(*drift, second, "--set", set_) == 2
    assert "--set and --served: expected both or none" in capsys.readouterr().err
    write_recording(replace(recording, ids=("x", *recording.ids[1:])), second)
    assert run(*drift, second) == 2
    assert "expected the texts of" in capsys.readouterr().err
