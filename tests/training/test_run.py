"""`saeguard sae train` and `evaluate` on a tiny model: killed, continued, measured by hand."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner, Result

from saeguard.cli.sae import verb
from saeguard.hf.model import load_model
from saeguard.sae import inspect
from saeguard.training.activations import read_residuals
from saeguard.training.evaluate import Fit, choose_tokens, evaluate, next_token_loss
from saeguard.training.texts import read_chunks
from tests.tiny import D, save_model
from tests.training.test_activations import make_texts

LATENTS, LAYER, TOKENS = 48, 1, 16_000


def _run(*arguments: object) -> Result:
    return CliRunner().invoke(verb, [str(a) for a in arguments], env={"COLUMNS": "120"})


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and texts."""
    folder = tmp_path_factory.mktemp("made")
    save_model(folder / "model")
    make_texts(folder / "texts.jsonl")
    make_texts(folder / "others.jsonl", 25)
    return folder


def _train(made: Path, out: Path, *more: object) -> list[str]:
    arguments = [
        "train", "--model", made / "model", "--layer", LAYER, "--texts", made / "texts.jsonl",
        "--latents", LATENTS, "--tokens", TOKENS, "--k", 4, "--batch", 128, "--buffer", 512,
        "--lr", 0.002, "--device", "cpu", "--out", out, *more,
    ]  # fmt: skip
    return [str(argument) for argument in arguments]


@pytest.fixture(scope="module")
def trained(made: Path) -> Path:
    """The checkpoint of a run that was never cut off."""
    shown = _run(*_train(made, made / "sae"))
    assert shown.exit_code == 0, shown.output
    assert "48 latents of layer 1, L0 " in shown.stdout
    return made / "sae"


def test_the_result(made: Path, trained: Path) -> None:
    """The folder holds a checkpoint and its card, and nothing of the run."""
    assert sorted(entry.name for entry in trained.iterdir()) == [
        "card.json", "cfg.json", "sae_weights.safetensors",
    ]  # fmt: skip
    info = inspect(trained)
    assert (info.layer, info.d_in, info.d_sae) == (LAYER, D, LATENTS)
    card = json.loads((trained / "card.json").read_text())["training"]
    assert card["texts"] == 60
    assert list(card["texts_sha256"]) == [str(made / "texts.jsonl")]
    assert card["tokens_trained"] == TOKENS // 128 * 128
    assert card["blocks"]["tokens"] >= card["tokens_trained"]
    assert card["blocks"]["special"] == card["blocks"]["texts"]  # BOS
    assert 1 < card["last_block"]["l0"] < 12
    assert card["last_block"]["explained_variance"] > 0.5
    assert _run("inspect", trained).exit_code == 0
    again = _run(*_train(made, trained))
    assert again.exit_code == 0
    assert "already trained" in again.output


def test_killed_and_continued(made: Path, trained: Path, tmp_path: Path) -> None:
    """A run that was killed ends, with --resume, as the one that was not: to the last bit."""
    out = tmp_path / "sae"
    command = [sys.executable, "-m", "saeguard", "sae", *_train(made, out, "--save-every", 0)]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    child = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=environment)
    try:
        deadline = time.monotonic() + 240
        while not any(out.glob("training/state-0000000[4-9]")) and time.monotonic() < deadline:
            assert child.poll() is None
            time.sleep(0.002)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    states = sorted(entry.name for entry in out.glob("training/state-*"))
    assert states, list(out.glob("*/*"))
    assert int(states[-1][6:]) < TOKENS // 128
    refused = _run(*_train(made, out))
    assert refused.exit_code == 2
    assert "continue it with --resume" in refused.output
    done = _run(*_train(made, out, "--resume"))
    assert done.exit_code == 0, done.output
    whole = load_file(trained / "sae_weights.safetensors")
    for name, tensor in load_file(out / "sae_weights.safetensors").items():
        assert torch.equal(tensor, whole[name]), name
    card, other = (json.loads((f / "card.json").read_text())["training"] for f in (out, trained))
    assert card == other


def test_from_a_recording(made: Path, tmp_path: Path) -> None:
    """Two SAEs are trained from one recording; the second run does not record again."""
    record = ("--record", tmp_path / "recording", "--dtype", "float16")
    assert _run(*_train(made, tmp_path / "a", *record)).exit_code == 0
    shards = sorted((tmp_path / "recording").glob("shard-*"))
    assert len(shards) > 2
    times = [shard.stat().st_mtime_ns for shard in shards]
    second = _run(*_train(made, tmp_path / "b", *record, "--kind", "jumprelu"))
    assert second.exit_code == 0, second.output
    assert [shard.stat().st_mtime_ns for shard in shards] == times
    for name in "ab":
        assert inspect(tmp_path / name).dtype == "F16"
        card = json.loads((tmp_path / name / "card.json").read_text())["training"]
        assert card["recorded"] == "float16"
    other = _run(*_train(made, tmp_path / "c", *record, "--context", 40))
    assert other.exit_code == 2
    assert "settings.context: found 512, expected 40" in other.output


def test_evaluation_is_that_of_plain_hooks(made: Path, trained: Path) -> None:
    """Loss and fit equal those of SAELens' SAE in a plain hook, text by text."""
    import sae_lens

    lm = load_model(made / "model")
    chunks = read_chunks([made / "others.jsonl"], lm.tokenizer, 512)
    ids = [chunks.chunk(i) for i in range(len(chunks))]
    found = evaluate(lm, inspect(trained), ids)
    sae: Any = sae_lens.SAE.load_from_disk(trained)
    counts, missed, seen = [], [], []
    loss: dict[str, list[torch.Tensor]] = {"model": [], "spliced": [], "zero": []}
    for text in ids:
        tokens = torch.from_numpy(text).long()[None]
        kept = tokens > 2
        for name, into in loss.items():

            def hook(_m: Any, _i: Any, output: Any, name: str = name, kept: Any = kept) -> Any:
                x = output[0] if isinstance(output, tuple) else output
                if name == "model":
                    return output
                if name == "spliced":
                    f = sae.encode(x[kept])
                    counts.append((f > 0).float().sum(1))
                    missed.append((x[kept] - sae.decode(f)).pow(2).sum(1))
                    seen.append(x[kept])
                x = x.clone()
                x[kept] = sae(x[kept]) if name == "spliced" else 0.0
                return (x, *output[1:]) if isinstance(output, tuple) else x

            handle = lm.layers[LAYER].register_forward_hook(hook)
            with torch.no_grad():
                logits = lm.model(tokens).logits
            handle.remove()
            into.append(
                torch.nn.functional.cross_entropy(logits[0, :-1], tokens[0, 1:], reduction="none")
            )
    for name, parts in loss.items():
        assert found["cross_entropy"][name] == pytest.approx(
            float(torch.cat(parts).mean()), rel=1e-4
        )
    x = torch.cat(seen)
    variance = (x - x.mean(0)).pow(2).sum()
    expected = 1 - float(torch.cat(missed).sum() / variance)
    assert found["explained_variance"] == pytest.approx(expected, abs=1e-4)
    assert found["l0"] == pytest.approx(float(torch.cat(counts).mean()), rel=1e-3)
    assert found["tokens"] == len(x)
    assert found["tokens_left_out"] == len(ids)  # BOS
    clean, spliced, zero = (found["cross_entropy"][n] for n in ("model", "spliced", "zero"))
    assert found["loss_recovered"] == pytest.approx((zero - spliced) / (zero - clean))
    assert found["explained_variance"] > found["random_decoder"]["explained_variance"]


def test_nothing_replaced_is_nothing_changed(made: Path) -> None:
    """A replacement by the residual itself leaves the loss as it is."""
    lm = load_model(made / "model")
    chunks = read_chunks([made / "others.jsonl"], lm.tokenizer, 512)
    ids = [chunks.chunk(i) for i in range(len(chunks))]
    x, _, _ = read_residuals(lm, LAYER, ids)
    texts = choose_tokens(lm, ids, x.norm(dim=1))
    clean = next_token_loss(lm, LAYER, texts)
    assert next_token_loss(lm, LAYER, texts, lambda rows: rows) == pytest.approx(clean, abs=1e-9)


def test_the_command_fills_the_card(made: Path, trained: Path) -> None:
    """Table and JSON show what goes into the card, beside what training wrote there."""
    measured = ("evaluate", trained, "--model", made / "model", "--texts")
    found = json.loads(_run(*measured, made / "others.jsonl", "--json").stdout)
    card = json.loads((trained / "card.json").read_text())
    assert card["evaluation"] == found
    assert card["training"]["k"] == 4
    assert sum(found["density"].values()) == LATENTS
    shown = _run(*measured, made / "texts.jsonl")
    assert shown.exit_code == 0
    assert "texts.jsonl: the SAE was trained on this file" in shown.output
    assert "loss recovered" in shown.stdout


def test_the_models_type(made: Path, trained: Path, tmp_path: Path) -> None:
    """A run reads the model in the type that is asked for, and goes on in no other."""
    out = tmp_path / "sae"
    assert _run(*_train(made, out, "--model-dtype", "bfloat16")).exit_code == 0
    whole = load_file(trained / "sae_weights.safetensors")["W_enc"]
    rounded = load_file(out / "sae_weights.safetensors")["W_enc"]
    assert whole.equal(rounded) is False
    cosine = torch.nn.functional.cosine_similarity(whole, rounded, dim=0)
    assert float(cosine.median()) > 0.9
    record = ("--record", tmp_path / "residuals")
    assert _run(*_train(made, tmp_path / "a", *record, "--model-dtype", "bfloat16")).exit_code == 0
    shown = _run(*_train(made, tmp_path / "b", *record))
    assert shown.exit_code == 2
    assert "model_dtype: found 'bfloat16'" in " ".join(shown.output.split())


def test_density() -> None:
    """Latents are counted by powers of ten, those that never fire apart."""
    fired = np.array([0, 0.5, 0.02, 0.011, 1.0, 1e-8])
    assert Fit(10, 0.0, 0.0, fired).density == {
        "never": 1, "1e-6": 1, "1e-5": 0, "1e-4": 0, "1e-3": 0, "1e-2": 2, "1e-1": 2,
    }  # fmt: skip


def test_wrong_input(made: Path, trained: Path, tmp_path: Path) -> None:
    """What is wrong is named, and the exit code is that of wrong input."""
    texts = made / "texts.jsonl"
    for change, says in (
        (("--layer", 9), "--layer: found 9, expected 0 to 2"),
        (("--k", 99), "--k: found 99, expected 1 to 48"),
        (("--texts", tmp_path / "gone"), "gone: No such file"),
        (("--device", "cuda:77"), "--device: found 'cuda:77', which cannot be used"),
    ):
        shown = _run(*_train(made, tmp_path / "out", *change))
        assert shown.exit_code == 2, shown.output
        assert says in " ".join(shown.output.split())
    save_model(tmp_path / "wide", "gpt2")
    (tmp_path / "sae").mkdir()
    for name in ("cfg.json", "sae_weights.safetensors"):
        (tmp_path / "sae" / name).write_bytes((trained / name).read_bytes())
    (tmp_path / "sae" / "card.json").write_text("[]")
    shown = _run("evaluate", tmp_path / "sae", "--model", made / "model", "--texts", texts)
    assert shown.exit_code == 2
    assert "card.json: schema: found None" in shown.output


PAGE = Path("docs/training.md").resolve()


def test_the_pages_commands(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every command of docs/training.md runs, on a tiny model and at tiny sizes."""
    monkeypatch.chdir(tmp_path)
    for name in ("chats.jsonl", "code.jsonl", "others.jsonl"):
        make_texts(Path(name))
    Path("models").mkdir()
    Path("models/SmolLM2-135M-Instruct").symlink_to(made / "model")
    blocks = re.findall(r"```sh\n(.*?)```", PAGE.read_text(), re.DOTALL)
    commands = "".join(blocks).replace("\\\n", " ").splitlines()
    assert len(commands) >= 5
    for command in commands:
        words = shlex.split(command)
        assert words[:2] == ["saeguard", "sae"]
        if words[2] == "train":
            assert words[words.index("--layer") + 1] == "18"
            small = {"--layer": 1, "--latents": 48, "--k": 4, "--tokens": 2048}
            for option, value in small.items():
                words[words.index(option) + 1] = str(value)
            words += ["--batch", "128", "--buffer", "512"]
        shown = _run(*words[2:])
        assert shown.exit_code == 0, (command, shown.output)
