"""All latents, or some with their rank: decisions do not depend on how they are computed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saeguard.sae import (
    Encoder,
    EncoderRows,
    Sparse,
    encode_blocks,
    encode_full,
    encode_latents,
    encoder_in_memory,
    max_per_text,
    what_fired,
)
from saeguard.sae.encoder import NORMS


def dense(found: Sparse, tokens: int, latents: int) -> torch.Tensor:
    """Return entries as a matrix."""
    f = torch.zeros(tokens, latents)
    f[found.token, found.latent] = found.value
    return f


def random_encoder(seed: int, *, d_in: int = 12, dtype: torch.dtype = torch.float32) -> Encoder:
    """Return a TopK or groupmax encoder with many equal and nearly equal latents."""
    rng = np.random.default_rng(seed)
    k = int(rng.integers(1, 9))
    width = k * int(rng.integers(1, 40))
    W = torch.from_numpy(rng.standard_normal((width, d_in))).float()
    b = torch.from_numpy(rng.standard_normal(width) * 0.3).float()
    copies = rng.integers(0, width, (2, int(rng.integers(0, width + 1))))
    W[copies[0]], b[copies[0]] = W[copies[1]], b[copies[1]]
    off = rng.integers(0, width, int(rng.integers(0, 5)))  # apart by less than float32 sees
    W[off] *= 1 + 2.0**-23
    norm = NORMS[int(rng.integers(len(NORMS)))]
    if norm == "layer_norm":
        W -= W.mean(1, keepdim=True)
    rows = EncoderRows(W.to(dtype), b, torch.zeros(width))
    return encoder_in_memory(rows, k=k, groups=bool(rng.integers(2)), norm=norm)


def plain(encoder: Encoder, x: torch.Tensor) -> torch.Tensor:
    """Return what fires, [tokens, latents] bool, by sorting in float64, the lower index first."""
    rows = encoder.block(0, encoder.d_sae)
    wide = x.float()
    z = (wide.double()[:, None] * rows.W.double()).sum(2)
    if encoder.norm == "layer_norm":
        z *= (1 / (wide.std(1, keepdim=True) + 1e-5)).double()
    if encoder.norm == "constant_norm_rescale":
        z *= (wide.shape[1] ** 0.5 / wide.norm(dim=1, keepdim=True)).double()
    z += rows.b.double()
    groups, limit = (encoder.k, 1) if encoder.groups else (1, encoder.k)
    assert groups is not None
    parts = z.view(len(x), groups, -1)
    order = parts.argsort(dim=2, descending=True, stable=True)
    stays = torch.zeros_like(parts, dtype=torch.bool).scatter(2, order[..., :limit], value=True)
    return stays.view(z.shape) & (z > 0)


@given(st.integers(0, 2**32 - 1), st.integers(1, 64), st.integers(1, 9))
@settings(derandomize=True, deadline=None, max_examples=150)
def test_the_same_decisions_however_computed(seed: int, block: int, rows: int) -> None:
    """By blocks of any size, by single latents, and by sorting in float64: bit for bit alike."""
    encoder = random_encoder(seed)
    torch.manual_seed(seed % 1000)
    x = torch.randn(7, encoder.d_in)
    stays = plain(encoder, x)
    found = dense(encode_full(encoder, x), 7, encoder.d_sae)
    assert torch.equal(found != 0, stays)
    in_blocks = encode_full(encoder, x, block=block, rows=rows)
    assert torch.equal(dense(in_blocks, 7, encoder.d_sae) != 0, stays)
    latents = torch.randperm(encoder.d_sae)[:5].tolist()
    some = encode_latents(encoder, latents, x)
    assert torch.equal(some != 0, stays[:, latents])
    torch.testing.assert_close(some, found[:, latents], rtol=1e-5, atol=1e-5)
    one = encode_latents(encoder, latents, x[2:3])  # alone as in a batch
    assert torch.equal(one != 0, stays[2:3, latents])


def test_decisions_are_those_of_topk_where_nothing_ties() -> None:
    """On plain random numbers `torch.topk` agrees."""
    torch.manual_seed(0)
    W, b, x = torch.randn(5000, 32), torch.zeros(5000), torch.randn(60, 32)
    encoder = encoder_in_memory(EncoderRows(W, b, b), k=20)
    value, at = (x @ W.t()).topk(20)
    expected = torch.zeros(60, 5000).scatter(1, at, value)
    found = dense(encode_full(encoder, x), 60, 5000)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_widened_exactly(dtype: torch.dtype) -> None:
    """Weights and residuals in half precision give what their float32 copies give."""
    torch.manual_seed(1)
    W, b = torch.randn(300, 24).to(dtype), torch.randn(300)
    x = torch.randn(20, 24).to(dtype)
    theta = torch.rand(300)
    half = encode_full(encoder_in_memory(EncoderRows(W, b, theta)), x)
    wide = encode_full(encoder_in_memory(EncoderRows(W.float(), b, theta)), x.float())
    assert torch.equal(dense(half, 20, 300), dense(wide, 20, 300))
    exact = (x.double() @ W.double().t() + b.double())[half.token, half.latent]
    bound = (24 + 4) * 2.0**-24 * x.float().norm(dim=1)[half.token] * W.float().norm(dim=1)[
        half.latent
    ] + 2.0**-23 * exact.abs()
    assert ((half.value.double() - exact).abs() <= bound).all()


def test_what_fired_is_sorted_and_cut() -> None:
    """Strongest first, at most as many as asked for, by token."""
    W = torch.eye(4)
    encoder = encoder_in_memory(EncoderRows(W, torch.zeros(4), torch.zeros(4)))
    x = torch.tensor([[1.0, 3.0, 2.0, -1.0], [0.0, 0.0, 0.0, 5.0]])
    assert what_fired(encoder, x, most=2) == [[(1, 3.0), (2, 2.0)], [(3, 5.0)]]


def test_a_token_that_is_not_finite_is_told() -> None:
    """NaN is not taken for silence."""
    encoder = encoder_in_memory(EncoderRows(torch.eye(2), torch.zeros(2), torch.zeros(2)))
    with pytest.raises(ValueError, match="token 1 is not finite"):
        encode_full(encoder, torch.tensor([[1.0, 0.0], [torch.nan, 0.0]]))


def test_tokens_whose_sum_overflows_are_finite() -> None:
    """Only what is not finite itself is refused."""
    encoder = encoder_in_memory(EncoderRows(torch.eye(2) / 1e38, torch.zeros(2), torch.zeros(2)))
    found = encode_full(encoder, torch.full((1, 2), 3e38))
    torch.testing.assert_close(found.value, torch.tensor([3.0, 3.0]))


@pytest.mark.parametrize("tokens", [1, 2, 300])
@pytest.mark.parametrize("block", [None, 70])
def test_weights_in_either_layout(tokens: int, block: int | None) -> None:
    """Rows, or SAELens' columns and parts of them, by whichever product is faster: one result."""
    torch.manual_seed(2)
    W, b, theta = torch.randn(500, 24), torch.randn(500), torch.rand(500)
    x = torch.randn(tokens, 24)
    z = x.double() @ W.double().t() + b.double()
    slack = (24 + 4) * 2.0**-24 * x.norm(dim=1, keepdim=True) * W.norm(dim=1) + 1e-6 * z.abs()
    for rows in (W, W.t().contiguous().t()):
        found = encode_full(encoder_in_memory(EncoderRows(rows, b, theta)), x, block=block)
        f = dense(found, tokens, 500).double()
        sure = (z - theta).abs() > slack
        assert torch.equal((f != 0) & sure, (z > theta) & sure)
        assert ((f - z).abs() <= slack)[f != 0].all()


def test_maxima_of_a_topk_encoder() -> None:
    """Each text's maxima are those of its own dense activations."""
    encoder = random_encoder(5)
    x = torch.randn(9, encoder.d_in)
    f = dense(encode_full(encoder, x), 9, encoder.d_sae)
    expected = np.stack([part.amax(0).numpy() for part in f.split([4, 5])])
    np.testing.assert_array_equal(max_per_text(encoder, x, [4, 5]), expected)


def test_memory_does_not_grow_with_tokens_times_width() -> None:
    """The largest tensor of an encode is a block, whatever is encoded."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        most = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN204
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, tuple | list) else (out,):
                if isinstance(t, torch.Tensor):
                    self.most = max(self.most, t.numel())
            return out

    W = torch.randn(20_000, 8)
    rows = EncoderRows(W, torch.zeros(20_000), torch.full((20_000,), 10.0))
    for encoder in (encoder_in_memory(rows), encoder_in_memory(rows, k=4)):
        with Largest() as seen:
            encode_full(encoder, torch.randn(600, 8), block=1000, rows=64)
        assert seen.most <= max(64 * 1000, W.numel())


@pytest.mark.parametrize(
    ("k", "groups", "says"),
    [(0, False, "1 to 6"), (7, False, "1 to 6"), (4, True, "equal groups")],
)
def test_impossible_k(k: int, groups: bool, says: str) -> None:
    """A `k` that no SAE can have is refused with what is allowed."""
    rows = EncoderRows(torch.randn(6, 2), torch.zeros(6), torch.zeros(6))
    with pytest.raises(ValueError, match=says):
        encoder_in_memory(rows, k=k, groups=groups)


def test_blocks_may_be_kept() -> None:
    """What a block holds stays when the next ones come."""
    torch.manual_seed(4)
    W, b = torch.randn(90, 12), torch.randn(90)
    x = torch.randn(20, 12)
    blocks = list(encode_blocks(encoder_in_memory(EncoderRows(W, b, b * 0)), x, block=30, rows=8))
    f = torch.zeros(20, 90)
    for token, latent, part in blocks:
        f[token : token + len(part), latent : latent + part.shape[1]] = part
    torch.testing.assert_close(f, (x @ W.t() + b).relu(), rtol=1e-5, atol=1e-5)


def test_topk_may_keep_what_is_below_zero() -> None:
    """Without a threshold, exactly `k` stay, negative ones in their order."""
    torch.manual_seed(5)
    W, b, x = torch.randn(400, 16), torch.full((400,), -30.0), torch.randn(50, 16)
    encoder = encoder_in_memory(EncoderRows(W, b, torch.full((400,), -torch.inf)), k=9)
    value, at = (x @ W.t() + b).topk(9)
    assert (value < 0).any()
    expected = torch.zeros(50, 400).scatter(1, at, value)
    for block in (None, 20):
        found = dense(encode_full(encoder, x, block=block), 50, 400)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_of_many_equals_the_lower_stay() -> None:
    """However many have to be computed again: here 100 a token, in parts."""
    torch.manual_seed(6)
    W = torch.randn(1, 16).expand(100, 16).contiguous()
    x = torch.randn(60, 16).abs() * W[0].sign()
    encoder = encoder_in_memory(EncoderRows(W, torch.zeros(100), torch.zeros(100)), k=7)
    expected = torch.zeros(60, 100)
    expected[:, :7] = (x @ W[0])[:, None]
    for block in (None, 11):
        found = dense(encode_full(encoder, x, block=block), 60, 100)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("few", [1, 3])
def test_topk_of_a_few_tokens_is_that_of_exact_arithmetic(few: int) -> None:
    """They are sorted at once: equal rows, and rows that differ in a last bit, are told apart."""
    torch.manual_seed(few)
    W, b = torch.randn(120, 16), torch.randn(120)
    W[1::2], b[1::2] = W[::2], b[::2]
    W[1::6, 0] = torch.nextafter(W[1::6, 0], torch.full((), torch.inf))
    W[50:] = W[:1]  # more equals than are looked at
    b[50:] = b[0]
    encoder = encoder_in_memory(EncoderRows(W, b, torch.zeros(120)), k=11)
    x = torch.randn(90, 16)
    z = x.double() @ W.double().t() + b.double()
    place = z.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    expected = (place < 11) & (z > 0)
    for first in range(0, 90, few):
        found = encode_full(encoder, x[first : first + few])
        fires = torch.zeros(few, 120, dtype=torch.bool)
        fires[found.token, found.latent] = True
        assert torch.equal(fires, expected[first : first + few])
