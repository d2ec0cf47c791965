"""Measure parity and write the table of docs/parity.md: `make parity`.

`python -m tests.engine.parity_table [FAMILY...]` measures the families named, or all, and leaves
the other rows as they are. Each row is written as soon as it is known.
"""

from __future__ import annotations

import argparse
import re
import tempfile
from pathlib import Path

from tests import models
from tests.engine import engines
from tests.engine.test_parity import Row, measure

PAGE = engines.ROOT / "docs" / "parity.md"
BEGIN, END = "<!-- parity -->\n", "<!-- end -->\n"
HEAD = """\
| family | served by | a block returns | mode | largest difference | verdicts equal |
|---|---|---|---|---|---|
"""


def line_of(family: str) -> str:
    """Measure a family; return its row, or why there is none."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            row = measure(family, Path(folder))
        except AssertionError as error:
            reasons = re.findall(r"^.*?(\w*Error: .+)$", str(error), re.MULTILINE)
            reason = reasons[-1] if reasons else str(error).splitlines()[0]
            return f"| {family} | {reason} | | | | |\n"
    return line(row)


def line(row: Row) -> str:
    """Return a row as Markdown."""
    return (
        f"| {row.family} | {row.served_by} | {row.block} | {row.mode} | {row.difference:.1e} "
        f"| {row.verdicts} |\n"
    )


def main() -> None:
    """Measure the families that are named, or all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("families", nargs="*", metavar="FAMILY")
    parser.add_argument("--page", type=Path, default=PAGE)
    asked = parser.parse_args()
    if unknown := set(asked.families) - set(models.FAMILIES):
        parser.error(f"unknown: {', '.join(unknown)}; known: {', '.join(models.FAMILIES)}")
    for family in asked.families or models.FAMILIES:
        before, rest = asked.page.read_text().split(BEGIN)
        table, after = rest.split(END)
        lines = {row.split("|")[1].strip(): row for row in table.splitlines(keepends=True)[2:]}
        lines[family] = line_of(family)
        print(lines[family], end="", flush=True)
        rows = "".join(lines[f] for f in models.FAMILIES if f in lines)
        asked.page.write_text(before + BEGIN + HEAD + rows + END + after)


if __name__ == "__main__":
    main()
