"""A behaviour and its topic are learnt together; a policy that asks for both keeps the rates."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from typer.testing import CliRunner

from saeguard.cli.features import verb
from saeguard.cli.policy import verb as policy_verb
from saeguard.cli.scan import verb as scan
from saeguard.features.corpus import Corpus
from saeguard.features.joint import TopicTexts, add_topic, margins, thresholds_of
from saeguard.features.load import load_feature_set
from saeguard.features.probe import Probe, save_probes
from saeguard.features.reading import PEAK, READINGS, Reading
from saeguard.features.types import Feature, FeatureSet, ModelRef
from saeguard.policy.load import load_policies
from tests.features.planted import D, corpus
from tests.guarded import feature_set
from tests.tiny import D as WIDTH
from tests.tiny import save_model

ON_TOPIC, ORDINARY = "0123456789", "abcdefgh"
FPR, TWIN_FPR = 0.02, 0.1


def write(file: Path, letters: str, texts: int, seed: int) -> None:
    """Write texts in some letters, of which every other one holds a `#` and is labelled so."""
    rng = random.Random(seed)  # noqa: S311 - seeded texts, not secrets
    rows = []
    for i in range(texts):
        words = "".join(rng.choices(f"{letters} ", k=20))
        rows.append(
            {
                "id": f"{file.stem}-{i}",
                "prompt": "Say: ",
                "completion": words if i % 2 else f"{words[:8]}#{words[9:]}",
                "label": int(i % 2 == 0 and letters == ON_TOPIC),
                "template": f"{file.stem}-{i // 4}",
            }
        )
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


@pytest.fixture(scope="module")
def learnt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder in which a behaviour that ordinary texts show, too, was learnt."""
    folder = tmp_path_factory.mktemp("joint")
    save_model(folder / "model")
    feature_set(folder / "sets", WIDTH)
    write(folder / "data" / "noise" / "marks.jsonl", ON_TOPIC, 240, 1)
    write(folder / "benign" / "chat.jsonl", ORDINARY, 600, 2)
    done = learn(folder)
    assert done[0] == 0, done[1]
    return folder


def learn(folder: Path) -> tuple[int, str]:
    """Run the command with `--topic`; return its exit code and what it printed."""
    command = [
        "learn", str(folder / "data"), "--model", str(folder / "model"),
        "--sae", str(folder / "sets" / "sae"), "--benign", str(folder / "benign"),
        "--set", str(folder / "feature_sets" / "own.yaml"),
        "--policies", str(folder / "policies"), "--out", str(folder / "report.json"),
        "--owner", "team@example.com", "--topic", "--fpr", str(FPR), "--twin-fpr", str(TWIN_FPR),
        "--holdout", str(folder / "held"),
    ]  # fmt: skip
    done = CliRunner(env={"COLUMNS": "200"}).invoke(verb, command)
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, done.output


def matched(folder: Path, texts: Path) -> dict[str, bool]:
    """Return whether the written policy matches each text, judged by the rules that serve."""
    out = folder / "verdicts.jsonl"
    scan(texts, folder / "model", folder / "policies", out, folder / "feature_sets", device="cpu")
    rows = map(json.loads, out.read_text().splitlines())
    return {row["id"]: row["verdict"] == "match" for row in rows}


def test_both_become_features(learnt: Path) -> None:
    """Twins set the behaviour's threshold; the topic is told from ordinary texts."""
    features = load_feature_set(learnt / "feature_sets" / "own.yaml").features

    assert list(features) == ["marks", "marks_topic"]
    behaviour, topic = features["marks"].evidence, features["marks_topic"].evidence
    assert behaviour["threshold_set_on"] == "twins"
    assert behaviour["fpr_target"] == TWIN_FPR
    assert behaviour["fpr_calibration"]["texts"] == 24
    assert topic["window"] == behaviour["window"]
    assert topic["holdout"]["interval"][0] > 0.9
    assert topic["fpr_calibration"]["texts"] == 200
    assert topic["fpr_calibration"]["hits"] <= FPR * 200


def test_the_behaviour_alone_would_not_do(learnt: Path) -> None:
    """Ordinary texts show the behaviour as often; with the topic they do not match."""
    evidence = load_feature_set(learnt / "feature_sets" / "own.yaml").features["marks"].evidence

    assert evidence["fpr_holdout"]["rate"] > 10 * FPR
    assert evidence["with_topic"]["fpr_holdout"]["rate"] <= 2 * FPR
    assert evidence["with_topic"]["tpr_holdout"]["rate"] > 0.7


def test_the_policy_keeps_the_rates(learnt: Path) -> None:
    """On the held-out texts the rules that serve match as many as the evidence states."""
    evidence = load_feature_set(learnt / "feature_sets" / "own.yaml").features["marks"].evidence
    labelled = learnt / "held" / "labelled" / "noise" / "marks.jsonl"
    rows = [json.loads(line) for line in labelled.read_text().splitlines()]
    label = {row["id"]: row["label"] for row in rows}
    found = matched(learnt, labelled)
    ordinary = matched(learnt, learnt / "held" / "ordinary" / "chat.jsonl")

    told = evidence["with_topic"]
    for key, of in (("tpr_holdout", 1), ("twin_rate_holdout", 0)):
        here = [found[name] for name in found if label[name] == of]
        assert (told[key]["hits"], told[key]["texts"]) == (sum(here), len(here))
    assert told["fpr_holdout"]["hits"] == sum(ordinary.values())
    assert told["fpr_holdout"]["texts"] == len(ordinary)


def test_the_policy_asks_for_both(learnt: Path) -> None:
    """It is in shadow, its thresholds are the set's, and its tests pass, recorded ones too."""
    [policy] = load_policies(learnt / "policies")
    features = load_feature_set(learnt / "feature_sets" / "own.yaml").features

    assert policy.mode == "shadow"
    assert {s.feature for s in policy.detect.values()} == {"marks", "marks_topic"}
    for selection in policy.detect.values():
        assert 0 <= selection.above - features[selection.feature].threshold < 0.001
    file = learnt / "policies" / "noise" / "marks.yaml"
    assert yaml.safe_load(file.read_text())["condition"] == "marks_topic and marks"
    tests = yaml.safe_load(file.with_suffix(".test.yaml").read_text())
    assert {"all but marks_topic", "all but marks"} < {case["name"] for case in tests["cases"]}
    assert sum("recorded_text" in case for case in tests["cases"]) == 2
    arguments = [str(learnt / "policies"), "--feature-sets", str(learnt / "feature_sets")]
    for name in ("test", "check"):
        done = CliRunner().invoke(policy_verb, [name, *arguments])
        assert done.exit_code == 0, done.output


def test_the_report(learnt: Path) -> None:
    """It states how topic and behaviour were learnt, and what both do together."""
    report = json.loads((learnt / "report.json").read_text())

    assert report["arguments"]["topic"]
    assert report["arguments"]["twin_fpr"] == TWIN_FPR
    [row] = report["learnt"]
    assert row["evidence"]["with_topic"]["thresholds"].keys() == {"marks", "marks_topic"}


def test_a_topic_that_ordinary_texts_share(learnt: Path, tmp_path: Path) -> None:
    """Nothing is learnt if the labelled texts cannot be told from ordinary ones, and why."""
    for name in ("model", "sets"):
        (tmp_path / name).symlink_to(learnt / name)
    write(tmp_path / "data" / "noise" / "marks.jsonl", ON_TOPIC, 240, 1)
    write(tmp_path / "benign" / "chat.jsonl", ON_TOPIC, 600, 7)
    code, output = learn(tmp_path)

    assert code == 1
    assert "nothing: the topic, labelled texts beside ordinary ones, is no better" in output
    assert not (tmp_path / "policies").exists()


def test_a_name_taken_twice(learnt: Path, tmp_path: Path) -> None:
    """A file whose feature would have the name of another one's topic is refused."""
    for name in ("model", "sets", "benign"):
        (tmp_path / name).symlink_to(learnt / name)
    for name in ("marks", "marks_topic"):
        write(tmp_path / "data" / "noise" / f"{name}.jsonl", ON_TOPIC, 8, 1)
    code, output = learn(tmp_path)

    assert code == 2
    assert "the topic of marks would be called marks_topic" in " ".join(output.split())


@pytest.mark.parametrize("reading", READINGS, ids=lambda r: r.words)
def test_margins_are_of_each_feature(reading: Reading) -> None:
    """Each exceeds its threshold by its own reading, at whichever token."""
    texts = corpus("margins", 30)
    rng = np.random.default_rng(1)
    share = [rng.normal(size=len(texts.tokens)).astype(np.float32) for _ in "ab"]
    above = [0.3, 0.2]
    expected = []
    for i in range(len(texts)):
        here = np.flatnonzero(texts.looked & (texts.owner == i))
        of_text = {"1 of 1": np.max, "the last token": lambda v: v[-1]}.get(reading.words, np.mean)
        expected.append(all(of_text(s[here]) > a for s, a in zip(share, above, strict=True)))

    assert (margins(share, above, texts, reading) > 0).tolist() == expected
    assert 0 < sum(expected) < len(expected)


@pytest.mark.parametrize("reading", READINGS, ids=lambda r: r.words)
def test_the_topics_threshold_is_the_least_that_keeps_the_rate(
    tmp_path: Path, reading: Reading
) -> None:
    """Under the policy's reading no more ordinary texts exceed it than wished, and none less do."""
    weight = np.zeros(D, np.float32)
    weight[0] = 1.0
    ref = save_probes({"f": Probe((1,), weight[None], 0.0)}, tmp_path / "f.safetensors")["f"]
    feature = Feature(
        id="f", title="F", behaviour="b", detect=(), probe=ref, clamp=(),
        low=0.0, high=1.0, threshold=0.1,
        evidence={"scope": "output", "window": reading.words},
    )  # fmt: skip
    path = tmp_path / "set.yaml"
    features = FeatureSet("set", path, ModelRef("m", D, 2), None, {"f": feature}, (), "")
    texts = TopicTexts(
        (topical("l0"), topical("l1"), topical("l2")),
        (corpus("o0", 90), corpus("o1", 90), corpus("o2", 90)),
    )
    done = add_topic(features, feature, texts, layers=(1,), fpr=0.05, seed=0)
    topic = done.features["f_topic"]

    value = by_hand(tmp_path, texts.ordinary[1], reading)
    share = np.sort((value - topic.low) / (topic.high - topic.low))[::-1]
    assert (share > topic.threshold).sum() <= math.floor(0.05 * 90)
    assert (share > topic.threshold - 2e-4).sum() > math.floor(0.05 * 90) or topic.threshold == 0.05
    assert thresholds_of(done.features["f"]) == {"f_topic": topic.threshold, "f": 0.1}


def topical(split: str) -> Corpus:
    """Return texts that all lie a little to one side, whatever their label."""
    texts = corpus(split, 80)
    side = torch.zeros(D)
    side[3] = 0.4
    return replace(texts, x=texts.x + side)


def by_hand(folder: Path, texts: Corpus, reading: Reading) -> np.ndarray:
    """Return the topic probe's value of each text, by the reading, without the search's code."""
    from safetensors.numpy import load_file

    probe = load_file(folder / "set.probes" / "f_topic.safetensors")
    logit = texts.x.numpy() @ probe["f_topic.weight"].reshape(-1) + probe["f_topic.bias"]
    out = []
    for i in range(len(texts)):
        here = logit[texts.looked & (texts.owner == i)]
        out.append(here.max() if reading == PEAK else here.mean() if reading.mean else here[-1])
    return np.array(out)
