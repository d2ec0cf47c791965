"""`saeguard sae` says what a checkpoint is, and when it is not what it claims."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from saeguard.cli.sae import verb
from saeguard.sae import inspect as read
from tests import models
from tests.cli.project import plain
from tests.guarded import LATENTS, feature_set
from tests.sae import made
from tests.tiny import D, save_model


def _run(*arguments: object) -> Result:
    return CliRunner().invoke(verb, [str(a) for a in arguments], env={"COLUMNS": "120"})


def test_inspect_tells_family_folds_and_memory(tmp_path: Path) -> None:
    """The table and the JSON name family, hook point, convention and the cost of a watch list."""
    path = made.llama_scope(tmp_path, "openmoss").path
    shown = _run("inspect", path)
    assert shown.exit_code == 0, shown.output
    for told in ("llama_scope", "resid_post of block 2", "convention 'openmoss', since none"):
        assert told in shown.output
    told = json.loads(_run("inspect", path, "--json", "--latents", 100).output)
    assert (told["d_in"], told["d_sae"], told["published_l0"]) == (made.D, made.N, 50)
    assert told["watched"]["encoder_bytes"] == 100 * 4 * (made.D + 5)
    assert told["sha256"] == read(path).sha256
    assert told["config_sha256"] == read(path).config_sha256


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    """A refusal is a message and exit code 2, and so is half of a measurement."""
    pickled = made.goodfire(tmp_path).path
    shown = _run("inspect", pickled)
    assert shown.exit_code == 2
    assert "saeguard sae convert" in shown.output
    path = made.gemma_scope(tmp_path).path
    assert "give both or neither" in _run("inspect", path, "--text", pickled).output
    assert "expected openmoss or saelens" in _run("inspect", path, "--convention", "mine").output


def test_k_of_an_sae_that_does_not_rank(tmp_path: Path) -> None:
    """It would change nothing, so it is said of another SAE: refused, not passed over."""
    shown = _run("inspect", made.gemma_scope(tmp_path).path, "--k", 9)
    assert shown.exit_code == 2
    told = " ".join(shown.output.split())
    assert "k was stated as 9, but this SAE does not rank its latents (jumprelu)." in told
    assert "`--k` of a command" in told


def test_a_terminal_of_80(tmp_path: Path) -> None:
    """Path and digest can be copied whole; sizes are told in units that show them."""
    path = made.gemma_scope(tmp_path / "a [red] folder").path
    shown = CliRunner().invoke(verb, ["inspect", str(path)], env={"COLUMNS": "80"})
    lines = shown.output.splitlines()
    assert lines[0] == str(path.resolve())
    assert lines[-1] == f"sha256: {read(path).sha256}"
    assert max(map(len, lines[1:])) <= 80
    told = plain(shown.output)
    assert "resid_post of block 1 (counted from 0)" in told
    assert "9.2 KiB to watch, 8.0 KiB more to clamp (all of the encoder: 23.1 KiB)" in told
    assert "nothing, the residual is read as it is" in told
    assert "published: 30; --text and --model measure it" in told
    r1 = made.llama_scope_r1(tmp_path, 0.6).path
    assert "no file states it" in _run("inspect", r1, "--norm-factor", 0.6).output


def test_l0_of_an_sae_that_ranks(tmp_path: Path) -> None:
    """It is at most k on every model's texts, so it is no evidence for the SAE."""
    model = save_model(tmp_path / "model")
    path = models.make_sae(tmp_path / "sae", layer=1, d_in=D, d_sae=64, kind="topk", k=7)
    text = tmp_path / "text.txt"
    text.write_text("some ordinary words about nothing in particular. ")
    says = "at most k = 7 on any token, whatever the model: it cannot tell"
    assert says in plain(_run("inspect", path).output)
    measured = ("inspect", path, "--text", text, "--model", model)
    shown = _run(*measured)
    assert shown.exit_code == 0, shown.output
    assert says in plain(shown.output)
    assert "a token (median" in shown.output
    assert "this does not look like" in plain(_run(*measured, "--l0", 70).output)


def test_another_models_sae(tmp_path: Path) -> None:
    """Another width is another model: both are told, and what to do."""
    path, text = made.gemma_scope(tmp_path).path, tmp_path / "text.txt"
    text.write_text("words")
    model = save_model(tmp_path / "model")
    shown = _run("inspect", path, "--text", text, "--model", model)
    assert shown.exit_code == 2
    assert f"reads vectors of width {made.D}, but the residual stream of model is {D} wide" in (
        plain(shown.output)
    )


def test_convert(tmp_path: Path) -> None:
    """A pickle becomes a folder that can be inspected; the digest is told."""
    pickled = made.goodfire(tmp_path).path
    done = _run("convert", pickled, tmp_path / "rows", "--revision", "abc")
    assert done.exit_code == 0, done.output
    assert f"sha256: {read(tmp_path / 'rows').sha256}" in done.output
    assert _run("inspect", tmp_path / "rows").exit_code == 0
    assert _run("convert", pickled, tmp_path / "rows").exit_code == 2


@pytest.mark.parametrize(
    ("factor", "says", "code"),
    [
        (1.0, "this looks like the SAE it says it is", 0),
        (3.0, "doubtful", 0),
        (8.0, "this does not look like the SAE you think it is", 1),
    ],
)
def test_l0_verdict(tmp_path: Path, factor: float, says: str, code: int) -> None:
    """What fires on a text is compared with the published number, in words and by exit code."""
    model = save_model(tmp_path / "model")
    sae = feature_set(tmp_path / "sets", D).sae
    text = tmp_path / "text.txt"
    text.write_text("some ordinary words about nothing in particular. " * 8)
    common = ("inspect", sae.path, "--text", text, "--model", model)
    found = json.loads(_run(*common, "--json").stdout)["l0"]
    assert found["verdict"].startswith("no published L0")
    # The reference: the same count by hand, special tokens left out.
    assert 0 < found["mean"] < LATENTS
    assert found["tokens"] == len(text.read_text())
    shown = _run(*common, "--l0", found["mean"] / factor)
    assert shown.exit_code == code, shown.output
    assert says in " ".join(shown.output.replace("│", " ").split())


def test_l0_counts_what_fires(tmp_path: Path) -> None:
    """The mean is that of a dense count on the model's own hidden states."""
    import transformers

    model = save_model(tmp_path / "model")
    sae = feature_set(tmp_path / "sets", D).sae
    text = tmp_path / "text.txt"
    text.write_text("another text, of other words, to be counted by hand. " * 3)
    found = json.loads(
        _run("inspect", sae.path, "--text", text, "--model", model, "--json").stdout
    )["l0"]
    lm = transformers.AutoModelForCausalLM.from_pretrained(model)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    ids = torch.tensor([tokenizer(text.read_text())["input_ids"]])
    with torch.no_grad():
        x = lm(ids, output_hidden_states=True).hidden_states[sae.layer + 1][0][1:]
    from safetensors.torch import load_file

    tensors = load_file(sae.path / "sae_weights.safetensors")
    pre = x @ tensors["W_enc"] + tensors["b_enc"]
    expected = float((pre > tensors["threshold"]).sum(1).float().mean())
    assert found["mean"] == pytest.approx(expected, abs=0.02)


def test_numbers_that_are_none(tmp_path: Path) -> None:
    """A factor or an L0 that is no positive number would spoil every row or verdict unseen."""
    path = made.llama_scope(tmp_path, "openmoss").path
    for option in ("--norm-factor", "--l0"):
        for value in ("nan", "inf", "0"):
            shown = _run("inspect", path, option, value)
            assert shown.exit_code == 2, shown.output
            expected = f"{option}: expected a finite number above 0, got {float(value)}"
            assert expected in shown.output


def test_a_text_that_is_none(tmp_path: Path) -> None:
    """Bytes that are not UTF-8 are told before the model is loaded."""
    path = made.llama_scope(tmp_path, "openmoss").path
    (tmp_path / "text").write_bytes(b"\xff")
    shown = _run(
        "inspect", path, "--text", tmp_path / "text", "--model", save_model(tmp_path / "model")
    )
    assert shown.exit_code == 2
    assert "not UTF-8; give a file of plain text" in " ".join(shown.output.split())
