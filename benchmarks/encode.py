"""Encoders side by side in one process: ours, SAELens', sparsify's, and the bare matrix product.

`python benchmarks/encode.py` prints tables, writes `results/encode-<cpu>.json` and plots into
`docs/img`. Every ratio compares medians of calls that took turns in this process.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import platform
import random
import statistics
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from saeguard.guard.ranked import RankedRows, make_ranked, settle
from saeguard.sae import EncoderRows, encode_full, encoder_in_memory

ROOT = Path(__file__).parents[1]
WIDTHS = {16_384: 1024, 65_536: 1024, 262_144: 512, 1_048_576: 128}
"""Latents, and the residual's width: narrower for the widest, so that it fits this memory."""
TOKENS = (1, 32, 512, 4096)
WATCHED = (1, 32, 256, 1024)
ACTIVE = 64
"""Latents that fire on a token, about; `k` of TopK."""
AIMS = {"product": 1.15, "saelens": 1.4, "watched": 50.0, "screened": 1.1}


def medians(
    calls: dict[str, Callable[[], Any]], args: argparse.Namespace, *, most: int = 31
) -> dict[str, float]:
    """Return each call's median time in seconds; the calls take turns in random order."""
    clock = time.process_time if args.clock == "cpu" else time.perf_counter
    spent: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    order, began = list(calls), clock()
    rng = random.Random(0)
    for round_ in range(most):
        if round_ >= 2 and clock() - began > args.seconds:
            break
        rng.shuffle(order)
        for name in order:
            start = clock()
            calls[name]()
            spent[name].append(clock() - start)
    return {name: statistics.median(times) for name, times in spent.items()}


def peak_mib(call: Callable[[], Any]) -> float | None:
    """Return by how much a call raises the process's resident memory at most (Linux)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    except OSError:
        return None
    before = _status("VmRSS")
    call()
    return (_status("VmHWM") - before) / 1024


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1])
    raise KeyError(key)


def saelens_sae(width: int, d_in: int) -> Any:
    """Return SAELens' JumpReLU SAE of which about `ACTIVE` latents fire on a random token."""
    from sae_lens import JumpReLUSAE, JumpReLUSAEConfig  # noqa: PLC0415 - seconds

    sae = JumpReLUSAE(JumpReLUSAEConfig(d_in=d_in, d_sae=width, apply_b_dec_to_input=False))
    share = torch.tensor(1 - ACTIVE / width, dtype=torch.float64)
    with torch.no_grad():
        sae.W_enc.normal_(0, d_in**-0.5)
        sae.b_enc.zero_()
        sae.threshold.fill_(float(torch.special.ndtri(share)))
        sae.W_dec = torch.nn.Parameter(torch.empty(0), requires_grad=False)  # not needed, large
    return sae.eval()


def sparsify_coder(W: torch.Tensor) -> Any:
    """Return sparsify's TopK coder over the same rows."""
    from sparsify import SparseCoder, SparseCoderConfig  # noqa: PLC0415 - seconds

    coder = SparseCoder(
        W.shape[1], SparseCoderConfig(num_latents=8, k=ACTIVE, transcode=True), device="cpu"
    )
    coder.encoder = torch.nn.Linear(1, 1)
    coder.encoder.weight = torch.nn.Parameter(W, requires_grad=False)
    coder.encoder.bias = torch.nn.Parameter(torch.zeros(len(W)), requires_grad=False)
    return coder.eval()


def full_width(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure encodes of all latents."""
    out = []
    for width in args.widths:
        d_in = WIDTHS[width]
        sae = saelens_sae(width, d_in)
        rows = EncoderRows(sae.W_enc.data.t(), sae.b_enc.data, sae.threshold.data)
        ours = encoder_in_memory(rows)
        W = sae.W_enc.data.t().contiguous()  # sparsify stores it so
        coder = sparsify_coder(W)
        topk = encoder_in_memory(EncoderRows(W, sae.b_enc.data, torch.zeros(width)), k=ACTIVE)
        for tokens in args.tokens:
            case: dict[str, Any] = {"width": width, "d_in": d_in, "tokens": tokens}
            gflop, gib = 2e-9 * width * d_in * tokens, 4 * width * tokens / 2**30
            if gflop > args.most_gflop or gib > args.most_gib:
                out.append(case | {"skipped": f"{gflop:.0f} GFLOP, {gib:.1f} GiB of output"})
                continue
            x = torch.randn(tokens, d_in)
            z = torch.empty(tokens, width)
            calls: dict[str, Callable[[], Any]] = {
                "product": partial(torch.mm, x, sae.W_enc.data, out=z),
                "saeguard": partial(encode_full, ours, x),
                "saelens": partial(sae.encode, x),
                "saeguard topk": partial(encode_full, topk, x),
                "sparsify topk": partial(coder.encode, x),
            }
            with torch.no_grad():
                case |= {"seconds": medians(calls, args)}
                case |= {"peak_mib": {name: peak_mib(call) for name, call in calls.items()}}
            out.append(case)
            print(_line(case), flush=True)
    return out


def _line(case: dict[str, Any]) -> str:
    s = case["seconds"]
    return f"{case['width']:>8} {case['tokens']:>5} " + "  ".join(
        f"{name} {1e3 * t:.2f} ms ({t / s['product']:.2f})" for name, t in s.items()
    )


@torch.no_grad()
def watched_rows(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure watched rows, with and without screening for TopK, beside the full encode."""
    width, d_in = args.watch_width, WIDTHS[args.watch_width]
    sae = saelens_sae(width, d_in)
    W = sae.W_enc.data.t().contiguous()
    topk = encoder_in_memory(EncoderRows(W, sae.b_enc.data, torch.zeros(width)), k=ACTIVE)
    out = []
    for tokens in args.tokens:
        if 2e-9 * width * d_in * tokens > args.most_gflop:
            continue
        x = torch.randn(tokens, d_in)
        for watched in args.watched:
            picked = torch.randperm(width)[:watched]
            Wt, b, theta = W[picked].t(), torch.zeros(watched), torch.zeros(watched)
            f = torch.empty(tokens, watched)

            def read(x=x, Wt=Wt, b=b, theta=theta, f=f) -> torch.Tensor:  # type: ignore[no-untyped-def] # noqa: ANN001
                pre = torch.addmm(b, x, Wt)
                return torch.mul(pre, pre > theta, out=f)

            # A bar that one token in a thousand clears, at least one of each batch of 1,000.
            peak = read().amax(1).sort(descending=True).values
            passing = tokens // 1000
            bar = float(peak[passing - 1 : passing + 1].mean()) if passing else float(peak[0]) + 1
            rows = RankedRows(
                topk, slice(0, watched), tuple(picked.tolist()), torch.full((watched,), bar)
            )
            ranked = make_ranked(rows, torch.device("cpu"))

            def screened(read=read, ranked=ranked, x=x) -> None:  # type: ignore[no-untyped-def] # noqa: ANN001
                settle(ranked, x, read())

            calls = {"watched": read, "screened": screened, "full": partial(sae.encode, x)}
            case = {
                "width": width, "d_in": d_in, "tokens": tokens, "watched": watched,
                "passing": passing, "seconds": medians(calls, args),
            }  # fmt: skip
            out.append(case)
            s = case["seconds"]
            print(
                f"{tokens:>5} tokens {watched:>5} watched: {1e3 * s['watched']:.3f} ms, full "
                f"{s['full'] / s['watched']:.0f} times, "
                f"screened {s['screened'] / s['watched']:.2f} "
                f"({passing} pass)",
                flush=True,
            )
    return out


def plot(result: dict[str, Any], folder: Path) -> None:
    """Draw time and memory against width, and watched rows against the full encode."""
    import matplotlib as mpl  # noqa: PLC0415 - an extra

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    cases = [c for c in result["full"] if "seconds" in c]
    figure, axes = plt.subplots(1, 3, figsize=(13, 4))
    names = ("saeguard", "saelens", "saeguard topk", "sparsify topk")
    for axis, key, label in (
        (axes[0], "seconds", "time / bare product"), (axes[1], "peak_mib", "peak memory, MiB"),
    ):  # fmt: skip
        for name, marker in zip(names, "osDx", strict=True):
            mine = [c for c in cases if c["tokens"] == 512 and c[key][name] is not None]
            values = [c[key][name] / (c[key]["product"] if key == "seconds" else 1) for c in mine]
            axis.plot([c["width"] for c in mine], values, marker=marker, label=name)
        axis.set(xscale="log", xlabel="latents (512 tokens)", ylabel=label)
        axis.legend(fontsize=8)
    axes[0].axhline(AIMS["product"], linestyle=":", color="grey")
    axes[1].set_yscale("symlog")
    for tokens in sorted({c["tokens"] for c in result["watched"]}):
        mine = [c for c in result["watched"] if c["tokens"] == tokens]
        ratio = [c["seconds"]["full"] / c["seconds"]["watched"] for c in mine]
        axes[2].plot([c["watched"] for c in mine], ratio, marker="o", label=f"{tokens} tokens")
    axes[2].axhline(AIMS["watched"], linestyle=":", color="grey")
    axes[2].set(
        xscale="log", yscale="log", xlabel="watched latents", ylabel="full encode / watched rows"
    )
    axes[2].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(folder / "encode.png", dpi=110)


def about(args: argparse.Namespace) -> dict[str, Any]:
    """Return what the figures depend on."""
    cpu = next(
        (
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    revision = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],  # noqa: S607
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    return {
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "load": Path("/proc/loadavg").read_text().split()[:3],
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
        "revision": revision.stdout.strip(),
        "arguments": {k: v for k, v in vars(args).items() if k != "out"},
    }


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__)

    def numbers(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    parser.add_argument("--widths", type=numbers, default=list(WIDTHS))
    parser.add_argument("--tokens", type=numbers, default=list(TOKENS))
    parser.add_argument("--watched", type=numbers, default=list(WATCHED))
    parser.add_argument("--watch-width", type=int, default=65_536)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=6.0, help="a case, at least 2 rounds")
    parser.add_argument("--most-gflop", type=float, default=1200.0, help="a product, else skipped")
    parser.add_argument("--most-gib", type=float, default=2.1, help="[tokens, latents], likewise")
    parser.add_argument(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="cpu: the process's own time, for a machine that others use; take --threads 1",
    )
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plots", type=Path, default=ROOT / "docs" / "img")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    args.plots, plots = str(args.plots.name), args.plots
    result = {"about": about(args), "full": full_width(args), "watched": watched_rows(args)}
    slug = "-".join(result["about"]["cpu"].lower().split()[:3])
    out = args.out or ROOT / "benchmarks" / "results" / f"encode-{slug}.json"
    out.write_text(json.dumps(result, indent=1))
    plot(result, plots)


if __name__ == "__main__":
    main()
