"""Thresholds in place of ranks: fitted and measured on real activations of real TopK SAEs."""

from __future__ import annotations

import hashlib
import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from typer.testing import CliRunner

from saeguard.cli.features import verb
from saeguard.cli.sae import verb as sae_verb
from saeguard.cli.serve_checks import startup_report
from saeguard.events.records import verdict_record as scan_line
from saeguard.features.files import read_feature_set_file
from saeguard.features.load import FeatureSetError, load_feature_set
from saeguard.features.stats import interval
from saeguard.guard.build_watchlist import build_watchlist
from saeguard.hf.model import load_model
from saeguard.hf.scan import hook_activations, scan
from saeguard.hf.texts import read_texts
from saeguard.policy.load import load_policies
from saeguard.policy_tools.recording import definition
from saeguard.sae import SaeError, encode_full, inspect, read_rows
from tests import models
from tests.tiny import LAYERS, D, save_model

sparsify = pytest.importorskip("sparsify")

LAYER, LATENTS, K = 1, 64, 12


def _texts(file: Path, count: int) -> Path:
    rng = random.Random(file.name)  # noqa: S311 - seeded texts, not secrets
    rows = [
        {"id": str(i), "prompt": "Say: ", "completion": "".join(rng.choices("abcdefgh ,.", k=40))}
        for i in range(count)
    ]
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return file


def _sae(folder: Path, kind: str) -> tuple[Path, Any]:
    """Write an SAE with its own library; return it, and what it makes of residuals."""
    if kind == "saelens":
        path = models.make_sae(folder / "sae", layer=LAYER, d_in=D, d_sae=LATENTS, kind="topk", k=K)
        from sae_lens import SAE

        return path, SAE.load_from_disk(str(path)).encode
    config = sparsify.SparseCoderConfig(
        activation=kind, expansion_factor=LATENTS // D, k=K if kind == "topk" else 16
    )
    coder = sparsify.SparseCoder(D, config)
    with torch.no_grad():
        for parameter in coder.parameters():
            parameter.normal_(0, 0.3, generator=torch.Generator().manual_seed(parameter.numel()))
    path = folder / f"layers.{LAYER}"
    coder.save_to_disk(path)

    def encode(x: torch.Tensor) -> torch.Tensor:
        out = coder.encode(x)
        return torch.zeros(len(x), LATENTS).scatter(-1, out.top_indices, out.top_acts)

    return path, encode


def _lively(encode: Any, x: torch.Tensor) -> tuple[int, ...]:
    """Return three latents that fire on some tokens and not on others."""
    often = (encode(x) > 0).float().mean(0)
    return tuple(sorted((often - 0.3).abs().argsort()[:3].tolist()))


def _residuals(model: Path, file: Path) -> list[torch.Tensor]:
    """Return each text's residuals behind BOS, by Transformers alone."""
    import transformers

    lm = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    with torch.no_grad():
        return [
            lm(torch.tensor([t.tokens]), output_hidden_states=True).hidden_states[LAYER + 1][0]
            for t in read_texts(file, tokenizer)
        ]


def _calibrate(*more: str, root: Path, code: int = 0) -> str:
    done = CliRunner().invoke(
        verb,
        ["calibrate", "--set", str(root / "sets" / "tiny.yaml"), "--model", str(root / "model"),
         "--benign", str(root / "benign.jsonl"), *more],
    )  # fmt: skip
    assert done.exit_code == code, done.output
    return " ".join(done.output.split())


@pytest.mark.parametrize("kind", ["topk", "groupmax", "saelens"])
def test_the_agreement_is_what_the_library_says(tmp_path: Path, kind: str) -> None:
    """Precision and recall in the file are those recomputed from Transformers and the library."""
    model = save_model(tmp_path / "model")
    benign, check = _texts(tmp_path / "benign.jsonl", 40), _texts(tmp_path / "check.jsonl", 30)
    sae, encode = _sae(tmp_path, kind)
    held = torch.cat([x[1:] for x in _residuals(model, check)])
    latents = _lively(encode, held)
    file = tmp_path / "sets" / "tiny.yaml"
    models.write_feature_set(file, sae, latents=latents, layers=LAYERS, high=4.0)
    exact = load_feature_set(file)
    before = definition(read_feature_set_file(file), f"f{latents[0]}")

    told = _calibrate("--check", str(check), "--topk", "approximate", root=tmp_path)
    assert "TopK latents are approximate: measured thresholds stand for ranks" in told

    features = load_feature_set(file)
    found = features.sae.approximation
    assert found is not None
    assert features.digest != exact.digest
    assert definition(read_feature_set_file(file), f"f{latents[0]}") != before, (
        "recordings are others"
    )
    tokens = [t for text in _tokens(model, check) for t in text]
    assert (found.texts, found.tokens) == (30, len(held))
    assert found.texts_sha256 == hashlib.sha256(np.array(tokens, "<i8").tobytes()).hexdigest()
    assert sorted(found.latents) == list(latents)
    f = encode(held)
    rows = read_rows(inspect(sae), latents)
    z = held @ rows.W.T + rows.b
    wrong = 0
    for i, latent in enumerate(latents):
        stand_in = found.latents[latent]
        above, fires = z[:, i] > stand_in.threshold, f[:, latent] > 0
        both = int((above & fires).sum())
        for rate, of in ((stand_in.precision, above), (stand_in.recall, fires)):
            assert (rate.hits, rate.tokens) == (both, int(of.sum()))
            assert rate.rate == round(both / int(of.sum()), 4)
            assert rate.interval == tuple(round(x, 4) for x in interval(both, int(of.sum())))
            assert rate.rate > 0.5, "a threshold tells something"
        wrong += int((above != fires).sum())
    assert wrong > 0, "it is an approximation"
    # No threshold does better on the texts it was fitted on.
    x = torch.cat([x[1:] for x in _residuals(model, benign)])
    z, f = x @ rows.W.T + rows.b, encode(x)
    for i, latent in enumerate(latents):
        fires = f[:, latent] > 0

        def f1(threshold: float, z: torch.Tensor = z[:, i], fires: torch.Tensor = fires) -> float:
            above = z > threshold
            return float(2 * (above & fires).sum() / (above.sum() + fires.sum()))

        best = max(f1(float(value) - 1e-6) for value in z[:, i])
        assert f1(found.latents[latent].threshold) == pytest.approx(best, abs=1e-6)


def _tokens(model: Path, file: Path) -> list[list[int]]:
    import transformers

    return [
        list(t.tokens) for t in read_texts(file, transformers.AutoTokenizer.from_pretrained(model))
    ]


def _ready(root: Path) -> tuple[int, ...]:
    """Lay out model, texts, feature set and one policy."""
    model = save_model(root / "model")
    benign = _texts(root / "benign.jsonl", 60)
    sae, encode = _sae(root, "topk")
    latents = _lively(encode, torch.cat([x[1:] for x in _residuals(model, benign)]))
    models.write_feature_set(
        root / "sets" / "tiny.yaml", sae, latents=latents, layers=LAYERS, high=4.0
    )
    models.write_policy(
        root / "policies" / "p.yaml",
        detect={"a": {"feature": f"f{latents[0]}", "above": 0.1}},
        condition="a",
    )
    return latents


def test_it_shows_wherever_one_looks(tmp_path: Path) -> None:
    """Inspection, the report at start, and each verdict say that it is an approximation."""
    latents = _ready(tmp_path)
    settings = {"policies": str(tmp_path / "policies"), "feature_sets": str(tmp_path / "sets")}

    def look() -> tuple[list[Any], str, str]:
        features = load_feature_set(tmp_path / "sets" / "tiny.yaml")
        watchlist = build_watchlist(load_policies(tmp_path / "policies"), {"tiny": features})
        lm = load_model(tmp_path / "model")
        texts = read_texts(tmp_path / "benign.jsonl", lm.tokenizer)
        verdicts = [v for _, vs in scan(lm, watchlist, texts[:3]) for v in vs]
        inspected = CliRunner().invoke(
            sae_verb, ["inspect", str(features.path)], env={"COLUMNS": "200"}
        )
        assert inspected.exit_code == 0, inspected.output
        return verdicts, "\n".join(startup_report(settings)), inspected.output

    verdicts, report, inspected = look()
    assert not any(v.approximate for v in verdicts)
    assert "approximate" not in report + inspected

    _calibrate("--topk", "approximate", root=tmp_path)
    verdicts, report, inspected = look()
    assert all(v.approximate and scan_line(v)["approximate"] for v in verdicts)
    assert "feature set tiny: TopK latents are approximate: measured thresholds" in report
    assert "approximate: measured thresholds stand for ranks" in inspected
    before = load_feature_set(tmp_path / "sets" / "tiny.yaml").sae.approximation
    _calibrate(root=tmp_path)
    again = load_feature_set(tmp_path / "sets" / "tiny.yaml").sae.approximation
    assert again == before, "it stays what it was, measured again"
    _calibrate("--topk", "exact", root=tmp_path)
    assert look()[1].count("approximate") == 0
    assert latents


def test_serving_reads_by_the_threshold(tmp_path: Path) -> None:
    """The tap's activations are `z * (z > threshold)`, with nothing else of the encoder held."""
    _ready(tmp_path)
    _calibrate("--topk", "approximate", root=tmp_path)
    features = load_feature_set(tmp_path / "sets" / "tiny.yaml")
    [hook] = build_watchlist(load_policies(tmp_path / "policies"), {"tiny": features}).hooks
    assert hook.ranked == ()
    assert features.sae.approximation is not None
    x = torch.randn(200, D) * 3
    [latent] = [
        t.latent
        for f in features.features.values()
        for t in f.detect
        if f.id in str(load_policies(tmp_path / "policies")[0].detect["a"].feature)
    ]
    rows = read_rows(inspect(features.sae.path), [latent])
    z = x @ rows.W.T + rows.b
    expected = z * (z > features.sae.approximation.latents[latent].threshold)
    torch.testing.assert_close(hook_activations(hook, x)[:, :1], expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(SaeError, match="no threshold was measured that stands for the rank"):
        encode_full(features.sae.inspect(), x)


def test_without_a_measurement_it_is_refused(tmp_path: Path) -> None:
    """Nobody can write `topk: approximate`, or move a measurement to another SAE, k or latent."""
    _ready(tmp_path)
    file = tmp_path / "sets" / "tiny.yaml"
    plain = file.read_text()

    def refused(message: str, **sae: Any) -> None:
        content = yaml.safe_load(file.read_text())
        content["sae"] |= sae
        broken = file.with_name("broken.yaml")
        broken.write_text(yaml.safe_dump(content))
        with pytest.raises(FeatureSetError, match=message):
            load_feature_set(broken)

    refused("belong together, and the latter is measured", topk="approximate")
    _calibrate("--topk", "approximate", root=tmp_path)
    measured = yaml.safe_load(file.read_text())["sae"]["topk_measured"]
    refused("belong together", topk="exact")
    refused("another checkpoint", topk_measured=measured | {"sha256": "0" * 64})
    refused(f"k is {K}, but the thresholds", topk_measured=measured | {"k": K + 1})
    some = dict(list(measured["latents"].items())[1:])
    refused("whose threshold is not among", topk_measured=measured | {"latents": some})
    file.write_text(plain)
    other = models.make_sae(tmp_path / "relu", layer=LAYER, d_in=D, d_sae=LATENTS)
    models.write_feature_set(file, other, latents=(0,), layers=LAYERS)
    assert "whose latents fire by rank" in _calibrate(
        "--topk", "approximate", root=tmp_path, code=2
    )
    features = load_feature_set(file)
    info = inspect(tmp_path / f"layers.{LAYER}")
    assert info.k == K
    with pytest.raises(SaeError, match="this one is jumprelu"):
        replace(features.sae, approximation=_any(info.sha256)).inspect()


def _any(sha256: str) -> Any:
    from saeguard.features.topk_thresholds import Approximation

    return Approximation(K, sha256, sha256, 1, 1, {})


def test_a_rare_latent_is_refused(tmp_path: Path) -> None:
    """Where a latent hardly fires, nothing can be said of a threshold."""
    _ready(tmp_path)
    _texts(tmp_path / "benign.jsonl", 2)
    told = _calibrate("--topk", "approximate", root=tmp_path, code=2)
    assert "takes 10 to fit on and 10 others to measure on" in told
