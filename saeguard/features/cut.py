"""Cut labelled texts into parts that share no template, each with its share of every label."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

PARTS = ("search", "calibration", "holdout")
FRACTIONS = (0.5, 0.2, 0.3)
"""Of the labelled texts: to choose on, to set the range on, to measure on."""


def cut_by_template(
    texts: Iterable[tuple[str, str]], seed: int, fractions: Sequence[float] = FRACTIONS
) -> dict[str, int]:
    """Return the part of each template, so that every cell is cut by the fractions.

    Templates come in random order, and each goes where its texts are most missing. The result
    depends on the texts and the seed alone.

    Args:
        texts: the cell of each text, such as its file and label, and its template.
        seed: of the order.
        fractions: of the parts, in any unit.
    """
    counts: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    totals: dict[str, int] = defaultdict(int)
    for cell, template in texts:
        counts[template][cell] += 1
        totals[cell] += 1
    cells = {cell: i for i, cell in enumerate(sorted(totals))}
    size = np.array([totals[cell] for cell in cells], np.float64)
    wanted = size[:, None] * (np.array(fractions, np.float64) / sum(fractions))
    missing = wanted.copy()
    rng = np.random.default_rng(seed)
    part: dict[str, int] = {}
    for template in rng.permutation(np.array(sorted(counts), dtype=object)):
        here = np.zeros(len(cells))
        for cell, count in counts[template].items():
            here[cells[cell]] = count
        part[template] = int(((here / size) @ (missing / wanted)).argmax())
        missing[:, part[template]] -= here
    return part


def last_part(part: Mapping[str, int]) -> frozenset[str]:
    """Return the templates of the part that is measured on, which comes last."""
    return frozenset(template for template, i in part.items() if i == len(PARTS) - 1)
