"""Add to an evaluation the evidence of each token of its worst texts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from tqdm import tqdm

from saeguard.evaluation.datasets import Dataset
from saeguard.evaluation.judging import Engine
from saeguard.evaluation.results import Evaluation
from saeguard.evaluation.worst import Example, explained


def explain(found: Evaluation, engine: Engine, tokenizer: Any) -> Evaluation:
    """Read the worst texts again, once each, and return the evaluation with their tokens."""
    wanted: dict[str, dict[int, list[tuple[int, Example]]]] = defaultdict(dict)
    datasets = {str(d.path): d for d in (*found.benign, *(s.dataset for s in found.sections))}
    places = {path: {id_: i for i, id_ in enumerate(d.ids)} for path, d in datasets.items()}
    for policy, dataset, example in _examples(found):
        path = str(dataset.path)
        wanted[path].setdefault(places[path][example.id], []).append((policy, example))
    read: dict[tuple[int, Example], Example] = {}
    for path, texts in tqdm(wanted.items(), desc="worst texts", unit="set"):
        before = {(p, e.id): e for some in texts.values() for p, e in some}
        for policy, example in explained(datasets[path], texts, engine, tokenizer):
            read[policy, before[policy, example.id]] = example
    sections = [
        replace(
            section,
            rows=tuple(
                row
                if row.policy is None
                else replace(row, worst=tuple(read[row.policy, e] for e in row.worst))
                for row in section.rows
            ),
        )
        for section in found.sections
    ]
    ordinary = [
        replace(o, worst=tuple(read[policy, e] for e in o.worst))
        for policy, o in enumerate(found.ordinary)
    ]
    return replace(found, sections=tuple(sections), ordinary=tuple(ordinary))


def _examples(found: Evaluation) -> Iterator[tuple[int, Dataset, Example]]:
    """Yield policy, dataset and example, of all examples."""
    for section in found.sections:
        for row in section.rows:
            for example in row.worst if row.policy is not None else ():
                yield row.policy or 0, section.dataset, example
    by_name = {d.name: d for d in found.benign}
    for policy, ordinary in enumerate(found.ordinary):
        for example in ordinary.worst:
            yield policy, by_name[example.dataset], example
