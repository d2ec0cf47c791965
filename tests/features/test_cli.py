"""`saeguard features` searches and calibrates from files."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from sae_lens import SAE
from typer.testing import CliRunner

from saeguard.cli.features import verb
from saeguard.cli.policy import verb as policy_verb
from saeguard.features.load import load_feature_set
from saeguard.features.probe import read_probe
from saeguard.hf.model import load_model
from saeguard.hf.residuals import record
from saeguard.hf.texts import make_text
from saeguard.policy.load import load_policies
from tests.guard.test_probes import probes_alone
from tests.guarded import LATENTS, feature_set
from tests.tiny import D, save_model


def _texts(file: Path, split: str, count: int = 60, *, ordinary: bool = False) -> Path:
    """Write texts whose positives hold a `#`, which one token alone can tell."""
    rng = random.Random(split)  # noqa: S311 - seeded texts, not secrets
    rows = []
    for i in range(count):
        words = "".join(rng.choices("abcdefgh ", k=20))
        row = {
            "id": f"{split}{i}",
            "prompt": "Say: ",
            "completion": words,
            "label": 0 if ordinary else 1 - i % 2,
        }
        if row["label"]:
            row["completion"] = f"{words[:8]}#{words[9:]}"
        rows.append(row | {"kind": "hash", "template": f"{split}{i // 6}"})
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return file


def _run(*arguments: object) -> str:
    result = CliRunner().invoke(verb, [str(a) for a in arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_search_then_calibrate(tmp_path: Path) -> None:
    """A search writes its findings; calibration sets the set's thresholds in place."""
    model = save_model(tmp_path / "model")
    features = feature_set(tmp_path / "sets", D)
    data = _texts(tmp_path / "noise.search.jsonl", "s")
    holdout = _texts(tmp_path / "noise.holdout.jsonl", "h")
    benign, check = (
        _texts(tmp_path / f"{name}.jsonl", name, 200, ordinary=True) for name in ("benign", "check")
    )
    out = tmp_path / "report.json"
    common = ("--model", model, "--behaviour", "noise", "--kind", "hash", "--out", out)
    output = _run(
        "search", *common, "--sae", features.sae.path, "--data", data, "--holdout", holdout,
        "--benign", benign, "--top", 3, "--group-size", 4,
    )  # fmt: skip
    assert "AUROC" in output
    report = json.loads(out.read_text())
    assert report["texts"] == {"search": 90, "holdout": 60}
    assert report["sae"]["sha256"] == features.sae.sha256
    probe, group, *latents = report["findings"]
    assert probe["form"] == "probe"
    assert probe["auroc_holdout"] > 0.9
    assert len(group["detect"]) <= 4
    assert sum(row["form"] == "latent" for row in latents) == 3
    assert all(0 <= int(latent) < LATENTS for latent in group["detect"])

    file = features.path
    output = _run(
        "calibrate", "--set", file, "--model", model, "--benign", benign, "--check", check,
        "--labelled", tmp_path, "--fpr", 0.05, "--for", "1 of 2 tokens",
    )  # fmt: skip
    assert "loud: threshold" in output
    loud = load_feature_set(file).features["loud"]
    assert loud.evidence["fpr_calibration"]["rate"] <= 0.05
    assert loud.evidence["window"] == "1 of 2"
    assert {"fpr_holdout", "tpr_holdout", "snippets"} <= loud.evidence.keys()


def test_probes_without_an_sae(tmp_path: Path) -> None:
    """Layers are searched, a set of probes alone is calibrated; what needs an SAE says so."""
    model = save_model(tmp_path / "model")
    data = _texts(tmp_path / "noise.search.jsonl", "s")
    holdout = _texts(tmp_path / "noise.holdout.jsonl", "h")
    benign = _texts(tmp_path / "benign.jsonl", "benign", 200, ordinary=True)
    out = tmp_path / "report.json"
    common = ("search", "--model", model, "--behaviour", "noise", "--data", data, "--holdout",
              holdout, "--out", out)  # fmt: skip
    _run(*common, "--layers", "2,0")
    report = json.loads(out.read_text())
    assert report["sae"] is None
    assert sorted(row["layers"] for row in report["findings"]) == [[0], [0, 2], [2]]
    for layers, says in (((), "neither --sae nor --layers"), (("--layers", "a"), "found 'a'"),
                         (("--layers", "9"), "there is no layer 9")):  # fmt: skip
        result = CliRunner().invoke(verb, [str(a) for a in (*common, *layers)])
        assert (result.exit_code, says in result.output) == (2, True), result.output

    features = probes_alone(tmp_path / "sets")
    _run("calibrate", "--set", features.path, "--model", model, "--benign", benign,
         "--labelled", tmp_path)  # fmt: skip
    calibrated = load_feature_set(features.path)
    assert calibrated.sae is None
    assert calibrated.features["both"].evidence["fpr_calibration"]["rate"] <= 0.01
    assert calibrated.features["both"].probe == features.features["both"].probe
    for command in (
        ("calibrate", "--benign", benign, "--topk", "exact"),
        ("fired", "--prompt", "a"),
    ):
        result = CliRunner().invoke(
            verb,
            [str(a) for a in (*command, "--set", features.path, "--model", model)],
        )
        assert result.exit_code == 2
        assert "the set holds probes alone, and this needs an SAE" in result.output


def test_from_texts_to_policy_without_copying(tmp_path: Path) -> None:
    """A search writes a set, calibration fills it, and a policy takes its threshold."""
    model = save_model(tmp_path / "model")
    sae = feature_set(tmp_path / "sets", D).sae.path
    texts = ("--data", _texts(tmp_path / "noise.search.jsonl", "s"),
             "--holdout", _texts(tmp_path / "noise.holdout.jsonl", "h"))  # fmt: skip
    benign = _texts(tmp_path / "benign.jsonl", "benign", 200, ordinary=True)
    file = tmp_path / "feature_sets" / "team" / "new.yaml"
    search = ("search", "--model", model, "--sae", sae, *texts, "--benign", benign, "--top", 3,
              "--out", tmp_path / "report.json", "--write-set", file)  # fmt: skip
    _run(*search, "--behaviour", "noise", "--form", "probe")
    _run(*search, "--behaviour", "other", "--kind", "hash", "--form", "latent", "--accept-weak")

    new = load_feature_set(file, unfinished=True)
    assert new.id == "team/new"
    assert list(new.features) == ["noise", "other_hash"]
    assert not new.calibrated
    assert new.model.sha256 is not None
    probe = new.features["noise"].probe
    assert probe is not None
    report = json.loads((tmp_path / "report.json").read_text())
    kept = read_probe(probe, D)
    assert report["findings"][0]["probe"]["weight"] == kept.w.tolist()
    with pytest.raises(ValueError, match="has no low, high, threshold yet"):
        load_feature_set(file)

    output = _run(
        "calibrate", "--set", file, "--model", model, "--benign", benign, "--labelled", tmp_path,
        "--fpr", 0.05,
    )  # fmt: skip
    assert "Not calibrated with labels, for want of files: other_hash." in output
    done = load_feature_set(file)
    assert done.features["noise"].evidence["tpr_holdout"]["rate"] > 0.5
    assert done.features["noise"].evidence["compared"]["random_group"]["auroc"] > 0

    policies = tmp_path / "policies"
    arguments = ["noise.hash", "--set", "team/new", "--feature", "noise", "--folder",
                 str(policies), "--feature-sets", str(tmp_path / "feature_sets")]  # fmt: skip
    result = CliRunner().invoke(policy_verb, ["new", *arguments])
    assert result.exit_code == 0, result.output
    [policy] = load_policies(policies)
    threshold = done.features["noise"].threshold
    assert 0 <= policy.detect["noise"].above - threshold < 0.001
    result = CliRunner().invoke(policy_verb, ["test", str(policies)])
    assert result.exit_code == 0, result.output


def test_a_search_that_finds_nothing_writes_nothing(tmp_path: Path) -> None:
    """Labels without meaning: said plainly, exit code 1; with --accept-weak it is written."""
    model = save_model(tmp_path / "model")
    sae = feature_set(tmp_path / "sets", D).sae.path
    files = [_texts(tmp_path / f"{name}.jsonl", name, 120) for name in ("s", "h")]
    for file in files:
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        for i, row in enumerate(rows):
            row["label"] = i // 2 % 2  # half of each kind of text
        file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    out = tmp_path / "new.yaml"
    command = [str(a) for a in (
        "search", "--model", model, "--sae", sae, "--data", files[0], "--holdout", files[1],
        "--top", 3, "--out", tmp_path / "o.json", "--write-set", out, "--behaviour", "b",
        "--form", "group",
    )]  # fmt: skip

    result = CliRunner().invoke(verb, command)
    assert result.exit_code == 1, result.output
    assert "Nothing was found: the group is no better than chance" in result.output
    assert not out.exists()
    assert "no better than chance" in json.loads((tmp_path / "o.json").read_text())["nothing_found"]
    result = CliRunner().invoke(verb, [*command, "--accept-weak"])
    assert result.exit_code == 0, result.output
    assert list(load_feature_set(out, unfinished=True).features) == ["b"]


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    """A leaky hold-out is refused with exit code 2 and no traceback."""
    model = save_model(tmp_path / "model")
    features = feature_set(tmp_path / "sets", D)
    data = _texts(tmp_path / "a.jsonl", "s")
    result = CliRunner().invoke(
        verb,
        ["search", "--model", str(model), "--sae", str(features.sae.path), "--data", str(data),
         "--holdout", str(data), "--behaviour", "b", "--out", str(tmp_path / "o.json")],
    )  # fmt: skip
    assert result.exit_code == 2
    assert "share 10 templates" in result.output
    assert not (tmp_path / "o.json").exists()


def test_texts_are_read_before_the_model(tmp_path: Path) -> None:
    """The last file of several is at fault: told at once, though the weights are minutes away."""
    model = save_model(tmp_path / "model")
    features = feature_set(tmp_path / "sets", D)
    (model / "model.safetensors").unlink()
    benign = _texts(tmp_path / "benign.jsonl", "b", ordinary=True)
    data = _texts(tmp_path / "noise.search.jsonl", "s")
    bad = tmp_path / "noise.holdout.jsonl"
    bad.write_text('{"id": "a", "prompt": "Say: ", "completion": 3}\n')
    search = ("search", "--model", model, "--sae", features.sae.path, "--data", data, "--holdout",
              bad, "--behaviour", "noise", "--out", tmp_path / "o.json")  # fmt: skip
    calibrate = ("calibrate", "--set", features.path, "--model", model, "--benign", benign,
                 "--labelled", tmp_path)  # fmt: skip
    for command in (search, calibrate):
        result = CliRunner().invoke(verb, [str(a) for a in command])
        assert result.exit_code == 2
        assert "noise.holdout.jsonl:1: completion: Input should be a valid string" in result.output
    bad.unlink()
    result = CliRunner().invoke(verb, [str(a) for a in calibrate])
    assert "noise.holdout.jsonl: No such file or directory" in result.output


def test_what_else_fired(tmp_path: Path) -> None:
    """Each token's strongest latents are SAELens's own, and those of features carry their names."""
    model = save_model(tmp_path / "model")
    features = feature_set(tmp_path / "sets", D)
    lm = load_model(model)
    text = make_text("text", lm.tokenizer, [("user", "Say: ")], "abc")
    ((_, residuals),) = record(lm, [text.tokens], [features.sae.layer])
    sae = SAE.load_from_disk(features.sae.path)
    values, latents = sae.encode(residuals[features.sae.layer]).topk(3)

    common = ("--set", features.path, "--model", model, "--prompt", "Say: ", "--completion", "abc")
    found = json.loads(_run("fired", *common, "--most", 3, "--json"))
    assert [token["at"] for token in found] == list(range(len(text.tokens)))
    for token, value, latent in zip(found, values, latents, strict=True):
        assert [at["latent"] for at in token["latents"]] == latent.tolist()
        assert [at["activation"] for at in token["latents"]] == pytest.approx(value.tolist())
    watched = {t.latent: f.id for f in features.features.values() for t in f.detect}
    for at in (at for token in found for at in token["latents"]):
        assert at["features"] == ([watched[at["latent"]]] if at["latent"] in watched else [])
    (alone,) = json.loads(_run("fired", *common, "--token", 1, "--most", 3, "--json"))
    assert alone["at"] == 1
    assert [at["latent"] for at in alone["latents"]] == latents[1].tolist()
    assert "loud" in _run("fired", *common)
    refused = CliRunner().invoke(verb, [str(a) for a in ("fired", *common, "--token", 99)])
    assert refused.exit_code == 2
    assert "tokens 0 to" in refused.output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("calibrate", "--for", "3 in 8"), "3 of 8 tokens"),
        (("calibrate", "--for", "20 tokens in the request"), "expected a window, such as"),
        (("fired",), "there is no text"),
    ],
)
def test_wrong_options(tmp_path: Path, arguments: tuple[str, ...], said: str) -> None:
    """A window that is none, and no text at all, end the command before a model is loaded."""
    features = feature_set(tmp_path / "sets", D)
    benign = _texts(tmp_path / "benign.jsonl", "benign", 2, ordinary=True)
    name, *more = arguments
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    given = ["--benign", str(benign)] if name == "calibrate" else []

    result = CliRunner(env={"COLUMNS": "200"}).invoke(
        verb, [name, "--set", str(features.path), "--model", str(model), *given, *more]
    )

    assert result.exit_code == 2, result.output
    assert said in result.output
