"""What `benchmarks/encode.py` found, as the tables and the plot of docs/encoding.md."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.encode_cases import TOKENS, WIDTHS

FLOOR = {
    "saeguard": "product",
    "saelens": "product",
    "saeguard topk": "product rows",
    "sparsify topk": "product rows",
}
"""The bare product over weights that lie as each contestant keeps them."""
BEGIN, END = "<!-- bench-encode: begin -->", "<!-- bench-encode: end -->"


def clock(case: dict[str, Any]) -> str:
    """Return which clock's ratios are shown: a process's own where it is all of the work."""
    return "cpu" if case["about"]["device"] == "cpu" else "wall"


def ratio(case: dict[str, Any], name: str) -> float | None:
    """Return the median ratio."""
    found = case["ratios"][clock(case)].get(name)
    return None if found is None else float(found[0])


def line(case: dict[str, Any]) -> str:
    """Return a case on one line, by wall clock."""
    seconds, ratios = case["seconds"]["wall"], case["ratios"]["wall"]
    full = ", ".join(
        f"{name} {ratios[f'{name} / {floor}'][0]:.2f}" for name, floor in FLOOR.items()
    )
    return (
        f"{case['width']:,} latents, {case['tokens']:,} tokens, {case['rounds']} rounds, load "
        f"{case['load'][0]:.1f} to {case['load'][1]:.1f}: product "
        f"{1e3 * seconds['product']:.1f} ms; of the product: {full}"
    )


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 100 else f"{value:.2f}" if value < 10 else f"{value:.1f}"


def _spread(case: dict[str, Any], name: str) -> str:
    found = case["ratios"][clock(case)].get(name)
    if found is None:
        return "-"
    return f"{_number(found[0])} ({_number(found[1])}-{_number(found[2])})"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in (head, ["---:"] * len(head), *rows)]


def full_table(cases: list[dict[str, Any]]) -> list[str]:
    """Return time and memory of encoding all latents."""
    head = (
        "latents x d_in", "tokens", "product, ms", "saeguard", "SAELens", "SAELens / saeguard",
        "product of rows, ms", "saeguard TopK", "sparsify TopK",
        "MiB: saeguard, TopK, SAELens, sparsify",
    )  # fmt: skip
    rows = []
    for case in cases:
        took, peak = case["seconds"][clock(case)], case["peak_mib"]
        many = "" if case["library_calls"] == 1 else f" in {case['library_calls']} calls"
        names = ("saeguard", "saeguard topk", "saelens", "sparsify topk")
        rows.append([
            f"{case['width']:,} x {case['d_in']:,}",
            f"{case['tokens']:,}",
            f"{1e3 * took['product']:,.1f}",
            _spread(case, "saeguard / product"),
            _spread(case, "saelens / product"),
            _spread(case, "saelens / saeguard"),
            f"{1e3 * took['product rows']:,.1f}",
            _spread(case, "saeguard topk / product rows"),
            _spread(case, "sparsify topk / product rows"),
            ", ".join("-" if peak[name] is None else f"{peak[name]:,.0f}" for name in names) + many,
        ])  # fmt: skip
    return _table(head, rows)


def watched_table(cases: list[dict[str, Any]]) -> list[str]:
    """Return what watched rows save, and what screening adds to them."""
    head = (
        "latents x d_in", "tokens", "watched", "µs", "SAELens full / watched",
        "screened, none passes", "screened, 1 in 1,000 passes",
    )  # fmt: skip
    rows = [
        [
            f"{case['width']:,} x {case['d_in']:,}",
            f"{case['tokens']:,}",
            f"{n:,}",
            f"{1e6 * case['seconds'][clock(case)][f'watched {n}']:,.0f}",
            _spread(case, f"saelens / watched {n}"),
            _spread(case, f"screened {n} / watched {n}"),
            _spread(case, f"thousandth {n} / watched {n}"),
        ]
        for case in cases
        for n in watched(case)
    ]
    return _table(head, rows)


def watched(case: dict[str, Any]) -> list[int]:
    """Return how many latents were watched in a case."""
    return [int(n.split()[1]) for n in case["seconds"]["cpu"] if n.startswith("watched ")]


def aims(cases: list[dict[str, Any]]) -> list[str]:
    """Return each aim, at how many sizes it is met, and where it is not."""
    full = [(f"{c['width']:,} x {c['tokens']:,}", c) for c in cases]
    many = [(name, c) for name, c in full if c["tokens"] >= 512]
    some = [(f"{name}, {n:,} watched", c, n) for name, c in full for n in watched(c)]
    found = [
        ("JumpReLU within 1.15 of the product", 1.15, False,
         [(name, ratio(c, "saeguard / product")) for name, c in full]),
        ("TopK within 1.15 of the product of rows", 1.15, False,
         [(name, ratio(c, "saeguard topk / product rows")) for name, c in full]),
        ("1.4 times faster than SAELens from 512 tokens on", 1.4, True,
         [(name, ratio(c, "saelens / saeguard")) for name, c in many]),
        ("watched rows 50 times faster than the full encode", 50.0, True,
         [(name, ratio(c, f"saelens / watched {n}")) for name, c, n in some]),
        ("screening within 1.1 of watched rows, none passes", 1.1, False,
         [(name, ratio(c, f"screened {n} / watched {n}")) for name, c, n in some]),
        ("the same, one token in a thousand passes", 1.1, False,
         [(name, ratio(c, f"thousandth {n} / watched {n}")) for name, c, n in some]),
    ]  # fmt: skip
    rows = []
    for aim, bound, above, values in found:
        known = [(name, value) for name, value in values if value is not None]
        missed = [(n, v) for n, v in known if (v < bound if above else v > bound)]
        worst = sorted(missed, key=lambda pair: pair[1], reverse=not above)[:3]
        told = "; ".join(f"{name}: {_number(value)}" for name, value in worst)
        met = len(known) - len(missed)
        more = " …" if len(missed) > len(worst) else ""
        rows.append([aim, f"{met} of {len(known)}", told + more])
    peaks = {n: max(c["peak_mib"][n] or 0.0 for c in cases) for n in ("saeguard", "saelens")}
    told = f"at most {peaks['saeguard']:,.0f} MiB; SAELens up to {peaks['saelens']:,.0f} MiB"
    rows.append(["peak memory independent of width x tokens", "", told])
    return _table(("aim", "met at", "furthest off (latents x tokens)"), rows)


def document(result: dict[str, Any], docs: Path) -> None:
    """Write the tables between the markers of `encoding.md`, and the plot beside it.

    Raises:
        ValueError: the markers are not there.
    """
    path, cases = docs / "encoding.md", result["cases"]
    text = path.read_text()
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"{path}: needs one line {BEGIN!r} and one {END!r} for the tables")
    plot(cases, docs / "img" / "encode.svg")
    loads = [value for case in cases for value in case["load"]]
    abouts = {
        f"{a['cpu']}, {a['cores']} cores, {a['device']}, {a['threads']} thread(s), "
        + ", ".join(f"{name} {v}" for name, v in a["versions"].items())
        for a in (case["about"] for case in cases)
    }
    revisions = ", ".join(sorted({case["about"]["revision"] for case in cases}))
    rounds = [case["rounds"] for case in cases]
    there = {(case["width"], case["tokens"]) for case in cases}
    missing = [f"{w:,} x {t:,}" for w in WIDTHS for t in TOKENS if (w, t) not in there]
    parts = [
        BEGIN,
        "",
        "; or ".join(sorted(abouts))
        + f"; revision {revisions}; {cases[0]['when'][:10]}; load {min(loads):.1f} to "
        f"{max(loads):.1f}; {min(rounds)} to {max(rounds)} rounds a size."
        + (f" Not measured (latents x tokens): {'; '.join(missing)}." if missing else ""),
        "",
        *aims(cases),
        "",
        "![Time, memory, what watched rows save, and what screening adds](img/encode.svg)",
        "",
        *full_table(cases),
        "",
        *watched_table(cases),
        "",
        END,
    ]
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    path.write_text(before + "\n".join(parts) + after)


def plot(cases: list[dict[str, Any]], path: Path) -> None:
    """Draw time, memory, watched rows and screening."""
    import matplotlib as mpl  # noqa: PLC0415 - an extra

    mpl.use("Agg")
    mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "encode", "font.size": 8})
    from matplotlib import pyplot as plt  # noqa: PLC0415

    figure, axes = plt.subplots(2, 2, figsize=(10, 7))
    time, memory, saved, screen = axes.flat
    sizes = sorted({case["tokens"] for case in cases})
    for tokens, marker in zip(sizes, "osD^vx", strict=False):
        mine = [case for case in cases if case["tokens"] == tokens]
        widths = [case["width"] for case in mine]
        label = f"{tokens:,} token{'s' if tokens > 1 else ''}"
        for name, colour in (("saeguard", "C0"), ("saelens", "C1")):
            style = {"marker": marker, "color": colour, "label": f"{name}, {label}", "alpha": 0.8}
            time.plot(widths, [ratio(c, f"{name} / product") for c in mine], **style)
            memory.plot(widths, [c["peak_mib"][name] for c in mine], **style)
        for n, colour in zip(watched(mine[0]), ("C0", "C1", "C2", "C3"), strict=False):
            style = {"marker": marker, "color": colour, "label": f"{n:,} watched, {label}"}
            saved.plot(widths, [ratio(c, f"saelens / watched {n}") for c in mine], **style)
            values = [ratio(c, f"thousandth {n} / watched {n}") for c in mine]
            screen.plot(widths, values, **style)
    time.axhline(1.15, linestyle=":", color="grey")
    saved.axhline(50, linestyle=":", color="grey")
    screen.axhline(1.1, linestyle=":", color="grey")
    memory.set_yscale("symlog")
    saved.set_yscale("log")
    screen.set_yscale("log")
    titles = (
        (time, "all latents: time / bare product"),
        (memory, "all latents: peak memory, MiB"),
        (saved, "SAELens, all latents / watched rows"),
        (screen, "screened, 1 token in 1,000 passes / watched rows"),
    )
    for axis, title in titles:
        axis.set(xscale="log", xlabel="latents", title=title)
        axis.grid(alpha=0.3)
    time.legend(fontsize=5, ncols=2, loc="upper left")
    saved.legend(fontsize=5, ncols=2, loc="lower right")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
