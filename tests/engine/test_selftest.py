"""The self-test refuses a tap that does not read what the next block consumes, and no other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from saeguard.guard.install_taps import install_taps
from saeguard.guard.tap import TAPS
from saeguard.policy.types import Name, Selection
from saeguard.vllm.messages import SelfTestError
from saeguard.vllm.worker.layers import hook_layer
from saeguard.vllm.worker.selftest import Observation, observe_layers
from tests.guard.watchlists import FEATURES, make_hook, make_policy, make_watchlist

ROWS = 6


@pytest.fixture(autouse=True)
def _no_taps_left() -> Iterator[None]:
    """Leave no tap behind for other tests."""
    yield
    TAPS.clear()


class Norm(nn.Module):
    """vLLM's: given two halves, it adds them up and returns the sum too."""

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
        """Normalise."""
        total = x if residual is None else x + residual
        normed = total / total.norm(dim=-1, keepdim=True)
        return normed if residual is None else (normed, total)


class Ignoring(nn.Module):
    """Cohere's: hands the second value through, whatever it is."""

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> Any:
        """Normalise."""
        return x / x.norm(dim=-1, keepdim=True), residual


class Adding(nn.Module):
    """Adds up and tells nobody."""

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """Normalise."""
        return (x + residual) / 2


class Attention(nn.Module):
    """A mixing of rows, by keyword as Transformers calls it."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(FEATURES, FEATURES)
        self.norm = Norm()

    def forward(self, *, hidden_states: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Return what Transformers' do."""
        normed: torch.Tensor = self.norm(self.query(hidden_states))
        return normed, None


class Halves(nn.Module):
    """Most of vLLM's blocks: `(hidden, residual)`, not yet added up."""

    norm: type[nn.Module] = Norm

    def __init__(self) -> None:
        super().__init__()
        self.input_layernorm = self.norm()

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> Any:
        """Return two halves."""
        normed, residual = self.input_layernorm(x, residual)
        return 3 * normed, residual


class PreNorm(Halves):
    """One tensor, normalised first."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the stream."""
        return x + 3 * self.input_layernorm(x)


class PostNorm(nn.Module):
    """One tensor, normalised last: OLMo 2. The first norm inside sees queries."""

    def __init__(self) -> None:
        super().__init__()
        self.self_attn = Attention()
        self.norm = Norm()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the stream."""
        return x + self.norm(self.self_attn(hidden_states=x)[0])


class Stale(Halves):
    """Two values, of which the second is what came in and is ignored: Cohere, StableLM."""

    norm = Ignoring

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> Any:
        """Return the stream and what it was before."""
        normed, residual = self.input_layernorm(x, x)
        return residual + 3 * normed, residual


class Untold(Halves):
    """Two halves, of which the next block does not show what it makes."""

    norm = Adding

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> Any:
        """Return two halves."""
        return 3 * self.input_layernorm(x, residual), residual


class Model(nn.Module):
    """Two blocks and a final norm."""

    def __init__(self, block: type[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList([block(), block()])
        self.norm = getattr(block, "norm", Norm)()

    def forward(self, *state: torch.Tensor) -> Any:
        """Return what the final norm makes of the last block's output."""
        for layer in self.layers:
            out = layer(*state)
            state = out if isinstance(out, tuple) else (out,)
        return self.norm(*state)


def self_test(block: type[nn.Module], layer: int, shape: tuple[int, ...]) -> None:
    """Tap a model of such blocks and compare as the worker does."""
    torch.manual_seed(0)
    model = Model(block)
    policy = make_policy("p", Name("a"), {"a": Selection("f0", 0.5)})
    watchlist = make_watchlist([policy], [make_hook(layer=layer)])
    taps = install_taps(watchlist, max_tokens=64, slots=1, device=torch.device("cpu"))
    hook_layer(model.layers, layer)
    observation = Observation()
    hooks = observe_layers(model, model.layers, taps, observation)
    halves = 2 if issubclass(block, Halves) and block is not PreNorm else 1
    state = torch.randn(halves, *shape)
    with torch.no_grad():
        model(*state)
        observation.choose_halves(taps)
        for hook in hooks:
            hook.remove()
        taps[0].ticks.zero_()
        model(*state)
    observation.compare(taps, ROWS, torch.float32)


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("shape", [(ROWS, FEATURES), (1, ROWS, FEATURES)])
@pytest.mark.parametrize("block", [Halves, PreNorm, PostNorm])
def test_accepts(block: type[nn.Module], shape: tuple[int, ...], layer: int) -> None:
    """Both forms of output, norms before or after, with and without a batch dimension."""
    self_test(block, layer, shape)


def test_a_left_over_is_not_added() -> None:
    """The next block shows that it consumes the first of two values alone."""
    self_test(Stale, 0, (ROWS, FEATURES))


def test_a_left_over_before_the_final_norm_is_refused() -> None:
    """That norm is given both, and does not show which it ignores."""
    with pytest.raises(SelfTestError, match="does not read the residual stream"):
        self_test(Stale, 1, (ROWS, FEATURES))


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize(
    ("block", "shape", "message"),
    [
        (Untold, (ROWS, FEATURES), "nothing could be observed"),
        (
            PreNorm,
            (4, ROWS, FEATURES),
            r"shape \[4, 6, 5\] behind layer \d, expected \[tokens, 5\]",
        ),
    ],
)
def test_refuses(block: type[nn.Module], shape: tuple[int, ...], message: str, layer: int) -> None:
    """A sum that nobody shows, several streams a token."""
    with pytest.raises(SelfTestError, match=message):
        self_test(block, layer, shape)
