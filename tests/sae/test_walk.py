"""The walk in docs/public-saes.md, command by command, on a random Gemma-2 and its SAE file."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from saeguard.features.load import load_feature_set
from tests import models
from tests.sae.standin import COMMIT, hub
from tests.sae.test_hub import run
from tests.server.serving import free_port, started

DOCS = Path(__file__).parents[2] / "docs" / "public-saes.md"
SETS = Path(__file__).parents[2] / "feature_sets"
ID = "layer_13/width_65k/average_l0_75"
LAYERS, WIDTH, LATENTS, LATENT = 14, models.HIDDEN, 65_536, 48_974
L0 = 75


def blocks(language: str) -> list[str]:
    """Return the code blocks of the walk."""
    return re.findall(rf"```{language}\n(.*?)```", DOCS.read_text(), re.DOTALL)


def commands() -> list[list[str]]:
    """Return every command of the walk."""
    return [shlex.split(line) for block in blocks("sh") for line in block.strip().splitlines()]


def _sae(folder: Path, root: Path) -> None:
    """Write a Gemma Scope file that fires about as often as its name says, on the random model."""
    import torch

    from saeguard.hf.model import load_model
    from saeguard.hf.residuals import record

    lm = load_model(root / "gemma-2-2b-it")
    ids = lm.tokenizer((root / "ordinary.txt").read_text())["input_ids"]
    x = next(iter(record(lm, [ids], [13])))[1][13][1:]
    rng = np.random.default_rng(0)
    W = rng.standard_normal((WIDTH, LATENTS), np.float32)
    W[:, LATENT] = x.mean(0).numpy()
    pre = torch.from_numpy(W).T @ x.T
    threshold = torch.quantile(pre.flatten()[: 1 << 22], 1 - L0 / LATENTS).clamp(min=0.1)
    theta = np.full(LATENTS, float(threshold), np.float32)
    theta[LATENT] = 0.0
    folder.mkdir(parents=True)
    np.savez(
        folder / "params.npz", W_enc=W, W_dec=np.ascontiguousarray(W.T) / 10,
        b_enc=np.zeros(LATENTS, np.float32), b_dec=np.zeros(WIDTH, np.float32), threshold=theta,
    )  # fmt: skip


def _model(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(models.COMMON, "num_hidden_layers", LAYERS)
    models.make_model("gemma2", path)


def _startup(arguments: list[str], root: Path) -> tuple[int, str]:
    """Do what `saeguard serve` does before it hands over to vLLM."""
    from saeguard.cli.serve_checks import startup_report

    options = dict(zip(arguments[3::2], arguments[4::2], strict=True))
    settings = {
        "policies": str(root / options["--policies"]),
        "feature_sets": str(root / "feature_sets"),
        "events": str(root / options["--events"]),
    }
    try:
        return 0, "\n".join(startup_report(settings))
    except ValueError as error:
        return 1, str(error)


def _serve(arguments: list[str], root: Path) -> dict[str, Any]:
    """Run the page's command, ask once, and return the response with the event it left."""
    port = free_port()
    # What a random model on this machine needs beside; every word of the page stays.
    small = ["--dtype", "float32", "--max-model-len", "256", "--enforce-eager"]
    small += ["--event-lines", "all"]  # of this text the policy may find nothing
    command = [sys.executable, "-m", *arguments, *small, "--host", "127.0.0.1", "--port", str(port)]
    env = {"HF_HOME": str(root / "hf"), "HF_HUB_OFFLINE": "1"}
    with started(command, port, root / "server.log", cwd=root, **env) as (process, client):
        body = client.completions.create(
            model="gemma-2-2b-it",
            prompt="Say: the quick brown fox",
            max_tokens=24,
            temperature=0,
            extra_body={"return_token_ids": True, "ignore_eos": True},
        )
        process.send_signal(signal.SIGTERM)
        process.wait(60)
    lines = list(map(json.loads, (root / "events.jsonl").read_text().splitlines()))
    [event] = [e for e in lines if e["event"] == "verdict"]
    [whole] = [e for e in lines if e["event"] == "request"]
    assert whole["verdicts"] == {event["verdict"]: 1}
    [choice] = body.choices
    assert choice.model_extra is not None
    assert body.model_extra is not None
    tokens = [*choice.model_extra["prompt_token_ids"], *choice.model_extra["token_ids"]]
    return {"event": event, "tokens": tokens, "said": body.model_extra["saeguard"]}


def _by_formula(root: Path, weights: Path, tokens: list[int]) -> np.ndarray:
    """Return the latent's activations: Transformers' residual, the paper's JumpReLU."""
    import torch
    import transformers

    lm = transformers.AutoModelForCausalLM.from_pretrained(
        root / "gemma-2-2b-it", dtype=torch.float32, attn_implementation="eager"
    )
    kept: list[torch.Tensor] = []
    lm.model.layers[13].register_forward_hook(
        lambda _module, _args, out: kept.append(out[0] if isinstance(out, tuple) else out)
    )
    with torch.no_grad():
        lm(torch.tensor([tokens]))
    x = kept[0].reshape(len(tokens), WIDTH).numpy()
    sae = np.load(weights)
    z = x @ sae["W_enc"][:, LATENT] + sae["b_enc"][LATENT]
    out: np.ndarray = z * (z > sae["threshold"][LATENT])
    return out


@pytest.mark.server
@pytest.mark.engine
def test_every_command(  # noqa: PLR0915 - the page is one story
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each command of the walk does what the page says of it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    texts = ["the quick brown fox jumps over the lazy dog. ", "a longer line of ordinary words. "]
    (tmp_path / "ordinary.txt").write_text("".join(texts) * 4)
    lines = [
        {"id": f"t{i}", "prompt": "Say: ", "completion": texts[i % 2] + str(i), "label": 0}
        for i in range(40)
    ]
    (tmp_path / "benign.jsonl").write_text("".join(f"{json.dumps(x)}\n" for x in lines))
    shutil.copytree(SETS, tmp_path / "feature_sets")
    set_ = tmp_path / "feature_sets" / "published" / "gemma-scope-2b-l13-65k.yaml"
    # The only change to the published file: the sizes of the small model.
    text = set_.read_text().replace("2304", str(WIDTH)).replace("layers: 26", f"layers: {LAYERS}")
    set_.write_text(text)
    policy = next(b for b in blocks("yaml") if b.startswith("# policies/refusal.yaml"))
    file = tmp_path / "policies" / "refusal.yaml"
    file.parent.mkdir()
    file.write_text(policy)

    steps = commands()
    names = [" ".join(step[:3]) for step in steps]
    assert names == [
        "hf download google/gemma-2-2b-it", "saeguard sae fetch", "saeguard sae inspect",
        "saeguard check policies", "saeguard serve gemma-2-2b-it", "saeguard features calibrate",
        "saeguard check policies", "saeguard serve gemma-2-2b-it",
    ]  # fmt: skip
    assert steps[0][-1] == "gemma-2-2b-it"
    _model(tmp_path / "gemma-2-2b-it", monkeypatch)
    _sae(tmp_path / "hub" / "google" / "gemma-scope-2b-pt-res" / ID, tmp_path)

    with hub(tmp_path / "hub") as running:
        code, output = run(tmp_path, running, *steps[1][1:])
        assert code == 0, output
        pinned = yaml.safe_load(output[output.index("sae:\n") :])["sae"]
        folder = re.search(r"# .*, in (\S+)", output)
        assert folder is not None
        monkeypatch.setenv("HF_ENDPOINT", running.url)

        inspected = [folder[1] if word == "SAE_FOLDER" else word for word in steps[2]]
        code, output = run(tmp_path, running, *inspected[1:])
        assert code == 0, output
        assert "this looks like the SAE it says it is" in " ".join(output.split())

        code, output = run(tmp_path, running, *steps[3][1:])
        assert code == 0, output
        # The rest runs in this process, without a hub: what was fetched is enough.
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        code, output = _startup(steps[4], tmp_path)
        assert code == 0, output
        file.write_text(policy.replace("action: log", "action: flag"))
        code, output = _startup(steps[4], tmp_path)
        assert code == 1
        assert "published ids that were never measured here" in output
        code, checked = run(tmp_path, running, *steps[3][1:])
        assert code == 1
        assert "policies/refusal.yaml:7:7: error[not-calibrated]: mode: enforce" in checked
        said = output.partition(" error[")[2].splitlines()[0]
        assert said in checked, "serving and checking say the same"

        code, output = run(tmp_path, running, *steps[5][1:])
        assert code == 0, output
        threshold = re.search(r"refusal: threshold ([\d.]+)", output)
        assert threshold is not None

    calibrated = load_feature_set(set_)
    assert calibrated.status == "calibrated"
    assert calibrated.sae.sha256 == pinned["sha256"]
    assert calibrated.sae.name == {
        "release": "gemma-scope-2b-pt-res", "id": ID, "revision": COMMIT,
    }  # fmt: skip
    assert calibrated.features["refusal"].evidence["fpr_calibration"]["rate"] <= 0.01

    acts = policy.replace("action: log", "action: flag").replace(
        "above: 20", f"above: {threshold[1]}"
    )
    file.write_text(acts)
    served = _serve(steps[7], tmp_path)
    event, tokens = served["event"], served["tokens"]
    feature = calibrated.features["refusal"]
    f = _by_formula(tmp_path, Path(folder[1]) / "params.npz", tokens[:-1])[-23:]
    share = f / feature.high
    assert event["coverage"] == {"tokens": 24, "evaluated": 23, "skipped": {"not_forwarded": 1}}
    assert event["features"]["refusal"]["max"] == pytest.approx(share.max(), rel=1e-3, abs=1e-4)
    above = share > float(threshold[1])
    assert event["matched_tokens"] == above.sum()
    assert event["verdict"] == ("match" if above.any() else "no_match")
    assert event["acted"] == ("flag" if above.any() else None)
    assert served["said"]["flagged"] == above.any()
    print(f"max share {share.max():.4f}, threshold {threshold[1]}, {above.sum()} tokens above")


class TestPublishedSets:
    """The sets that ship can be loaded as files, name known SAEs, and name no clamps."""

    @pytest.mark.parametrize("path", sorted((SETS / "published").glob("*.yaml")), ids=str)
    def test_each(self, path: Path) -> None:
        """Status, grade, source and names are as the page says."""
        features = load_feature_set(path, verify=False)
        assert features.status == "published"
        assert features.id == f"published/{path.stem}"
        assert features.sae.sha256 is None
        for feature in features.features.values():
            assert feature.evidence["grade"] in {"A", "B"}
            assert feature.evidence["source"]
            assert not feature.clamp
            assert all(term.latent < features.sae.d_sae for term in feature.detect)
        assert path.stem in DOCS.read_text() or re.search(r"-l\d+", path.stem)

    def test_a_calibrated_set_must_pin(self, tmp_path: Path) -> None:
        """Without `status: published`, a set without digest is refused."""
        path = next((SETS / "published").glob("gemma*.yaml"))
        broken = tmp_path / "x.yaml"
        broken.write_text(path.read_text().replace("status: published\n", ""))
        with pytest.raises(ValueError, match=r'not-pinned\]: the key "sha256" is missing'):
            load_feature_set(broken, verify=False)
