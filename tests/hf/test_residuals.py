"""The recorded residual is the block's own output, whatever the batch around the text."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from saeguard.hf.model import ModelError, find_layers, load_model
from saeguard.hf.residuals import record
from tests.models import make_model
from tests.tiny import LAYERS, D, save_model

TEXTS = [[1, 5, 6, 7], [1, 9], [1, *range(20, 60)], [], [1, 8, 8, 8, 8, 8, 8]]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "opt"])
class TestResidual:
    """`resid_post` of layer L is HF's `hidden_states[L + 1]`."""

    def test_equals_hidden_states(self, tmp_path: Path, family: str) -> None:
        """Every layer but the last equals `hidden_states`; the last is read before the norm."""
        lm = load_model(save_model(tmp_path, family))
        assert (len(lm.layers), lm.hidden_size) == (LAYERS, D)
        got = dict(record(lm, TEXTS, range(LAYERS)))
        assert got.keys() == {0, 1, 2, 4}
        for i, residuals in got.items():
            with torch.no_grad():
                states = lm.model(torch.tensor([TEXTS[i]]), output_hidden_states=True).hidden_states
            for layer in range(LAYERS - 1):
                torch.testing.assert_close(
                    residuals[layer], states[layer + 1][0], rtol=1e-4, atol=1e-4
                )
            assert not torch.allclose(residuals[LAYERS - 1], states[-1][0])

    def test_batching_changes_nothing(self, tmp_path: Path, family: str) -> None:
        """A text alone and in a padded batch has the same residual."""
        lm = load_model(save_model(tmp_path, family))
        together = dict(record(lm, TEXTS, [1], batch_tokens=10_000))
        alone = dict(record(lm, TEXTS, [1], batch_tokens=1))
        assert list(together) == [1, 0, 4, 2]
        for i, residuals in together.items():
            torch.testing.assert_close(residuals[1], alone[i][1], rtol=1e-4, atol=1e-4)


def test_soft_caps_are_kept(tmp_path: Path) -> None:
    """Gemma 2's attention logits are capped as vLLM caps them; Transformers' default drops it."""
    from transformers import AutoModelForCausalLM

    make_model("gemma2", tmp_path)
    lm = load_model(tmp_path)
    capped, default = (
        AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=attention).eval()
        for attention in ("eager", "sdpa")
    )
    tokens = torch.tensor([[1, *range(20, 60)]])
    with torch.no_grad():
        expected, other = (
            m(tokens, output_hidden_states=True).hidden_states[2] for m in (capped, default)
        )
        got = lm.model(tokens, output_hidden_states=True).hidden_states[2]

    assert torch.equal(expected, got)
    assert not torch.allclose(expected, other, rtol=0, atol=1e-4)


def test_hooks_are_removed(tmp_path: Path) -> None:
    """Nothing is left on the model, also where the reader stops half-way."""
    lm = load_model(save_model(tmp_path))
    reader = record(lm, TEXTS, [0])
    next(reader)
    reader.close()
    assert not lm.layers[0]._forward_hooks


def test_unknown_layer(tmp_path: Path) -> None:
    """A layer the model lacks is refused by number."""
    lm = load_model(save_model(tmp_path))
    with pytest.raises(ModelError, match="no layer 3; it has 3"):
        list(record(lm, TEXTS, [3]))


def test_tuple_outputs(tmp_path: Path) -> None:
    """Layers that return a tuple are read at its first entry."""
    lm = load_model(save_model(tmp_path))
    plain = dict(record(lm, TEXTS, [1]))

    class Wrapped(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, *args: object, **options: object) -> tuple[torch.Tensor, None]:
            return self.inner(*args, **options), None

    class Unwrapped(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: tuple[torch.Tensor, None], **options: object) -> torch.Tensor:
            return self.inner(x[0], **options)

    lm.layers[1] = Wrapped(lm.layers[1])
    lm.layers[2] = Unwrapped(lm.layers[2])
    for i, residuals in record(lm, TEXTS, [1]):
        assert torch.equal(residuals[1], plain[i][1])


def test_unknown_family() -> None:
    """A model without recognised layers is refused by class."""
    with pytest.raises(ModelError, match="Linear: the decoder layers were not found"):
        find_layers(nn.Linear(2, 2))


def test_not_a_model(tmp_path: Path) -> None:
    """A folder without a model is refused, and nothing is downloaded."""
    with pytest.raises(ModelError, match=r"no config\.json"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="cannot load"):
        load_model(tmp_path)
