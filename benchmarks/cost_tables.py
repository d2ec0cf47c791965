"""The tables of what a decode step costs, in README.md and docs/cost.md, from the results."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- cost: begin -->", "<!-- cost: end -->"
COMMAND = 'make bench ARGS="--docs ."'
PAGES: Mapping[str, Sequence[str]] = {
    "README.md": ("armed", "clamping"),
    "docs/cost.md": ("armed", "firing", "clamping"),
}
"""The guard's states in the table of each page."""


def document(results: Mapping[str, Any], root: Path) -> None:
    """Write the table between the markers of each page.

    Raises:
        ValueError: a page has no markers, or has them twice.
    """
    for page, states in PAGES.items():
        path = root / page
        text = path.read_text()
        if text.count(BEGIN) != 1 or text.count(END) != 1:
            raise ValueError(f"{path}: needs one line {BEGIN!r} and one {END!r} for the table")
        before, after = text.split(BEGIN)[0], text.split(END)[1]
        table = "\n".join(_table(results, states))
        path.write_text(f"{before}{BEGIN}\n{table}\n{END}{after}")


def _table(results: Mapping[str, Any], states: Sequence[str]) -> Iterator[str]:
    about, model = results["machine"], results["model"]
    watched = model["watch_list"]
    yield (
        f"{watched['policies']['armed']} policies on {watched['latents']} of {watched['d_sae']:,} "
        f"latents; a random model of {model['parameters'] / 1e6:.0f} million parameters, float32; "
        f"vLLM {results['versions']['vllm']}, {about['cpu']}, {about['cores']} cores, "
        f"{about['torch_threads']} threads; {results['date'][:10]}, revision "
        f"`{results['revision']}`; `{COMMAND}` makes this table."
    )
    yield ""
    head = ["batch", "step", "idle", *states, "full encode by hand"]
    yield f"| {' | '.join(head)} |"
    yield "|" + "---|" * len(head)
    beside = {row["rows"]: row["full_us"] for row in results["reference"]}
    for batch, figures in results["batches"].items():
        step = figures["idle"]["step_ms"]
        cells = [batch, f"{step:.0f} ms", f"{figures['idle']['host_us']:.0f} µs"]
        cells += [
            f"{figures[s]['host_us']:,.0f} µs ({100 * figures[s]['host_share']:.2f} %)"
            for s in states
        ]
        cells.append(f"{beside[int(batch)] / 1e3:.1f} ms")
        yield f"| {' | '.join(cells)} |"
