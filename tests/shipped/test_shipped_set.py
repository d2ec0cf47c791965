"""What the shipped set, its policies and its page claim follows from the files beside them."""

from __future__ import annotations

import json
import re
from functools import cache
from typing import Any

import pytest

from saeguard.features.load import load_feature_set
from saeguard.features.pins import file_digest
from saeguard.features.probe import read_probe
from saeguard.features.reading import read_words
from saeguard.sae import encode_latents
from tests.shipped.sample import EXPECTED, LAYER, ROOT, SET, found, ids, policies, read_residuals

ROW = re.compile(
    r"^\| ([a-z.-]+) \| (\w+) \| (\S+) \((\S+) to (\S+)\) \| (\S+) \| (\d+) of (\d+) \| "
    r"(\d+) of (\d+) \|$",
    re.MULTILINE,
)


@cache
def evaluation() -> dict[str, Any]:
    """Return the report of `saeguard evaluate` on the shipped policies."""
    report: dict[str, Any] = json.loads((ROOT / "demo" / "evaluation.json").read_text("utf-8"))
    return report


def evaluated(policy: str) -> list[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Return by dataset the rows of a policy and of its words, in the report."""
    out = []
    for dataset in evaluation()["datasets"]:
        rows = {row["name"]: row for row in dataset["rows"]}
        if policy in rows:
            out.append((dataset["name"], rows[policy], rows["words"]))
    return out


def test_shares_and_verdicts_on_texts_of_our_own() -> None:
    """From recorded residuals the shipped probes, ranges and policies give what they gave."""
    features = load_feature_set(SET)
    expected = json.loads(EXPECTED.read_text("utf-8"))
    actual = found(features, read_residuals(features))

    assert list(actual) == ids()
    for text, row in expected.items():
        assert actual[text]["matches"] == row["matches"], text
        assert actual[text]["shares"] == pytest.approx(row["shares"], abs=2e-4), text
    matched = {name for row in expected.values() for name in row["matches"]}
    assert len(matched) > 1  # else the verdicts would hold of any policy


def test_the_pins() -> None:
    """Checkpoint and probes are the files that the set names, of the sizes that it states."""
    features = load_feature_set(SET)
    assert features.sae is not None
    info = features.sae.inspect()

    assert (info.layer, info.d_in, info.d_sae) == (LAYER, 576, 8192)
    assert file_digest(info.path / "sae_weights.safetensors") == features.sae.sha256
    for feature in features.features.values():
        assert feature.probe is not None
        assert file_digest(feature.probe.path) == feature.probe.sha256
        assert read_probe(feature.probe, features.model.hidden_size).w.shape[-1] == 576


def test_the_sae_is_as_sparse_as_its_card_states() -> None:
    """On texts of our own about as many latents fire as on those that the card was measured on."""
    features = load_feature_set(SET)
    assert features.sae is not None
    info, corpus = features.sae.inspect(), read_residuals(features)
    card = json.loads((info.path / "card.json").read_text("utf-8"))
    kept = corpus.at(LAYER)[~corpus.special]
    active = (encode_latents(info, list(range(info.d_sae)), kept) > 0).sum(1).float().mean()

    assert float(active) == pytest.approx(card["evaluation"]["l0"], rel=0.3)


@pytest.mark.parametrize("policy", policies(), ids=lambda p: p.id)
def test_policies_read_features_as_they_were_measured(policy: Any) -> None:
    """Scope and reading are the evidence's: at another one the rates would be others."""
    features = load_feature_set(SET).features

    behaviours = [s for s in policy.detect.values() if not s.feature.endswith("_topic")]
    assert len(behaviours) == 1
    evidence = features[behaviours[0].feature].evidence
    reading = read_words(evidence["window"])
    assert policy.scope == evidence["scope"]
    assert policy.window.last == reading.last
    assert {s.over for s in policy.detect.values()} == {behaviours[0].over}


@pytest.mark.parametrize("policy", policies(), ids=lambda p: p.id)
def test_the_report_is_of_these_policies(policy: Any) -> None:
    """The page's figures are those of the policies as they are, not of earlier ones."""
    digests = {row["name"]: row["digest"] for row in evaluation()["policies"]}

    assert digests.get(policy.id) == policy.digest
    assert evaluated(policy.id)


def test_the_page_has_the_reports_figures() -> None:
    """Every row of the table in docs/features.md, and no dataset is left out."""
    page = (ROOT / "docs" / "features.md").read_text("utf-8")
    rows = {(row[0], row[1]): row[2:] for row in ROW.findall(page)}
    report = {
        (policy.id, dataset): row for policy in policies() for dataset, *row in evaluated(policy.id)
    }

    assert rows.keys() == report.keys()
    for key, (own, words) in report.items():
        area, tpr, fpr = own["auroc"], own["tpr"], own["fpr"]
        assert rows[key] == (
            *(f"{x:.2f}" for x in (area["value"], *area["interval"], words["auroc"]["value"])),
            *(str(x) for rate in (tpr, fpr) for x in (rate["hits"], rate["texts"])),
        ), key


def test_the_page_has_the_rate_on_ordinary_texts() -> None:
    """The highest of all policies, and of how many texts."""
    page = (ROOT / "docs" / "features.md").read_text("utf-8")
    rates = [row["benign"]["rate"] for row in evaluation()["policies"]]
    highest = max(rates, key=lambda rate: rate["value"])

    assert f"Of {max(rate['texts'] for rate in rates)} ordinary texts" in page
    assert f"{highest['value']:.2%} at most".replace("%", " %") in page
