"""Residuals come from the model itself, massive tokens are left out, recordings go on."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from saeguard.hf.model import LanguageModel, load_model
from saeguard.training.activations import Streamed, norm_bound, read_residuals
from saeguard.training.errors import TrainingError
from saeguard.training.recording import open_recording, read_index, record, recorded_bound
from saeguard.training.texts import Chunks, read_chunks
from tests.tiny import LAYERS, save_model

TEXT = "the quick brown fox jumps over the lazy dog while nobody at all is looking"


def make_texts(path: Path, count: int = 60) -> Path:
    """Write texts of different lengths."""
    words = TEXT.split()
    lines = [{"text": " ".join((words[i % 15 :] + words)[: 4 + i % 9])} for i in range(count)]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    """A tiny random model."""
    return load_model(save_model(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def chunks(lm: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Chunks:
    """Tokens of some texts."""
    path = make_texts(tmp_path_factory.mktemp("texts") / "a.jsonl")
    return read_chunks([path], lm.tokenizer, 64)


@pytest.fixture
def streamed(lm: LanguageModel, chunks: Chunks) -> Streamed:
    """Blocks of about 400 tokens."""
    return Streamed(lm, 1, chunks, 0, 400, norm_bound(lm, 1, chunks, 0))


@pytest.mark.parametrize("layer", range(LAYERS))
def test_residuals_are_the_models(lm: LanguageModel, chunks: Chunks, layer: int) -> None:
    """Values are those of each text alone, though the layers behind are not run."""
    texts = [chunks.chunk(i) for i in range(7)]
    x, kept, special = read_residuals(lm, layer, texts)
    ran: list[int] = []
    for i, module in enumerate(lm.layers):
        module.register_forward_hook(lambda _m, _i, _o, i=i: ran.append(i))
    expected = []
    for text in texts:
        taken: list[torch.Tensor] = []
        handle = lm.layers[layer].register_forward_hook(
            lambda _m, _i, o, t=taken: t.append(o[0] if isinstance(o, tuple) else o)
        )
        with torch.no_grad():
            lm.model(torch.from_numpy(text).long()[None])
        handle.remove()
        expected.append(taken[0][0])
    torch.testing.assert_close(x, torch.cat(expected), atol=1e-5, rtol=1e-5)
    ids = torch.cat([torch.from_numpy(text) for text in texts])
    assert torch.equal(special, ids <= 2)  # PAD, BOS, END
    assert torch.equal(kept, ~special)
    ran.clear()
    read_residuals(lm, layer, texts[:1])
    assert ran == list(range(layer + 1))  # and no layer behind it


def test_massive_tokens_are_left_out(streamed: Streamed) -> None:
    """Whatever lies above the bound is counted and is not in the block."""
    whole = streamed.block(0)
    assert whole.counts.massive == 0
    assert whole.counts.special == whole.counts.texts  # BOS
    norms = whole.x.norm(dim=1)
    bound = float(norms.sort().values[-6:-4].mean())
    less = replace(streamed, bound=bound).block(0)
    assert less.counts.massive == 5
    assert torch.equal(less.x, whole.x[norms <= bound])
    assert less.following == whole.following


def test_blocks_follow_each_other(streamed: Streamed) -> None:
    """Each block holds the next texts, and can be made again."""
    first = streamed.block(0)
    second = streamed.block(first.following)
    again = streamed.block(first.following)
    assert torch.equal(second.x, again.x)
    assert 300 < len(first.x) < 500
    assert not torch.equal(first.x[:50], second.x[:50])


def test_a_recording_goes_on(streamed: Streamed, tmp_path: Path) -> None:
    """A recording that is cut off and continued is the one that was not."""
    of = {"model": "tiny", "layer": 1}
    record(streamed, tmp_path / "whole", of, 1500)

    class _CutOff(Exception):  # noqa: N818
        pass

    def stop(_tokens: int) -> None:
        raise _CutOff

    for _ in range(2):
        with pytest.raises(_CutOff):
            record(streamed, tmp_path / "cut", of, 1500, report=stop)
    (tmp_path / "cut" / ".shard-00002.safetensors.part").write_bytes(b"half of it")
    assert recorded_bound(tmp_path / "cut") == streamed.bound
    record(streamed, tmp_path / "cut", of, 1500)
    for entry in (tmp_path / "whole").iterdir():
        assert (tmp_path / "cut" / entry.name).read_bytes() == entry.read_bytes()
    before = (tmp_path / "cut" / "index.json").stat().st_mtime_ns
    record(streamed, tmp_path / "cut", of, 1500)  # there is nothing left to do
    assert (tmp_path / "cut" / "index.json").stat().st_mtime_ns == before


def test_a_recording_holds_the_residuals(streamed: Streamed, tmp_path: Path) -> None:
    """Shards hold the blocks in 16 bits; texts are read once at most, shards once an epoch."""
    record(streamed, tmp_path, {}, 10**9, dtype="float16")
    shards = read_index(tmp_path)["shards"]
    source = open_recording(tmp_path, {}, seed=3)
    blocks = [source.block(at).x for at in range(len(shards))]
    expected = streamed.block(0).x
    nearest = min(blocks, key=lambda x: float((x[:1] - expected[:1]).norm()))
    torch.testing.assert_close(nearest, expected, atol=1e-2, rtol=1e-3)
    assert sum(map(len, blocks)) == sum(shard["counts"][1] for shard in shards)
    assert sum(shard["counts"][0] for shard in shards) >= len(streamed.chunks)


def test_recordings_that_are_refused(streamed: Streamed, tmp_path: Path) -> None:
    """Another recording, none at all, and a type that is too narrow are named."""
    record(streamed, tmp_path / "a", {"layer": 1}, 100)
    with pytest.raises(TrainingError, match=r"settings\.layer: found 1, expected 2"):
        record(streamed, tmp_path / "a", {"layer": 2}, 100)
    with pytest.raises(TrainingError, match="expected a recording"):
        open_recording(tmp_path / "b", {}, 0)
    (tmp_path / "a" / "index.json").write_text("{}")
    with pytest.raises(TrainingError, match="schema: found None"):
        open_recording(tmp_path / "a", {}, 0)

    class _Loud:
        chunks, bound = streamed.chunks, 1e9

        def block(self, at: int) -> object:
            block = streamed.block(at)
            return block._replace(x=block.x * 1e6)

    with pytest.raises(TrainingError, match="--record-dtype bfloat16"):
        record(_Loud(), tmp_path / "c", {}, 100)  # type: ignore[arg-type]
