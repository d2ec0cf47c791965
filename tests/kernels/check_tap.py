"""Child of test_kernels.py: the tap's kernels in Triton's interpreter beside plain torch."""

from __future__ import annotations

import itertools

import torch

from saeguard.guard.kernels import tap
from saeguard.sae.encoder import NORMS, column_scales


def plain(hidden, residual, halves, W, b, theta, norm):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN201
    """Return activations and scales as the tap's torch path computes them."""
    x = hidden.float()
    if residual is not None:
        x = torch.addcmul(x, residual.float(), halves)
    scale = column_scales(norm, x)
    pre = torch.mm(x, W.t())
    pre = (pre if scale is None else pre * scale) + b
    return pre * (pre > theta), scale


def check_read() -> int:
    """Compare the activations over shapes, dtypes, halves, norms, probes and NaN."""
    checked = 0
    shapes = [(1, 3, 24), (5, 17, 40), (16, 33, 96), (33, 70, 130)]
    for (rows, columns, d_in), dtype, second, half, normed in itertools.product(
        shapes, (torch.float32, torch.bfloat16, torch.float16), (True, False), (0.0, 1.0), (0, 1)
    ):
        hidden = torch.randn(rows, d_in).to(dtype)
        residual = torch.randn(rows, d_in).to(dtype) if second else None
        halves = torch.tensor(half)
        W, b = torch.randn(columns, d_in), torch.randn(columns)
        theta = torch.rand(columns)
        theta[::3] = -torch.inf  # probes
        norm = torch.arange(columns) % len(NORMS) if normed else None
        if rows > 2:
            hidden[1, 3], hidden[2, 0] = torch.nan, torch.inf
        f = torch.full((rows + 2, columns + 1), 7.0)  # rows behind the pass stay as they are
        scale = torch.zeros_like(f) if normed else None
        tap.read(
            hidden, residual, halves, W, b, theta, f[:rows], norm,
            None if scale is None else scale[:rows],
        )  # fmt: skip
        expected, scales = plain(hidden, residual, halves, W, b, theta, norm)
        got = f[:rows, :-1]
        sure = ~((expected != got) & ((expected == 0) | (got == 0)))
        assert sure.float().mean() > 0.99  # within rounding of a threshold either is right
        torch.testing.assert_close(got[sure], expected[sure], rtol=2e-4, atol=2e-4, equal_nan=True)
        x = hidden.float() if residual is None else hidden.float() + half * residual.float()
        torch.testing.assert_close(f[:rows, -1], x.norm(dim=1), equal_nan=True)
        if rows > 2:
            assert f[1].isnan().all(), "NaN is seen in every column"
        if scales is not None:
            assert scale is not None
            torch.testing.assert_close(
                scale[:rows, :-1], scales, rtol=2e-4, atol=2e-4, equal_nan=True
            )
        assert (f[rows:] == 7.0).all()
        checked += 1
    return checked


def check_edit() -> int:
    """Compare the edit over dtypes and scales, rows with NaN among those that do not act."""
    checked = 0
    for (rows, d_in, clamped), dtype, scaled in itertools.product(
        [(1, 24, 1), (7, 130, 5), (20, 1500, 3)], (torch.float32, torch.bfloat16), (False, True)
    ):
        hidden = torch.randn(rows, d_in).to(dtype)
        f, rules = torch.rand(rows, 9), 4
        acted = torch.rand(rows, rules) < 0.5
        acted[-1] = False
        f[-1] = torch.nan
        columns, owner = torch.randint(0, 9, (clamped,)), torch.randint(0, rules, (clamped,))
        target, W_dec = torch.randn(clamped), torch.randn(clamped, d_in)
        scale = torch.rand(rows, 9) + 0.5 if scaled else None
        change = target - f[:, columns]
        if scale is not None:
            change = change / scale[:, columns]
        delta = torch.where(acted[:, owner], change, 0.0) @ W_dec
        expected = hidden.clone().add_(delta.to(dtype))
        tap.edit(hidden, f, acted, columns, owner, target, W_dec, scale)
        rounding = 1e-5 if dtype == torch.float32 else 0.05
        torch.testing.assert_close(hidden, expected, rtol=rounding, atol=rounding)
        checked += 1
    return checked


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(1)
    print(f"read {check_read()} edit {check_edit()}")
