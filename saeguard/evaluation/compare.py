"""Compute the baselines of one dataset, for the parts of a text that its policies read."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from tqdm import tqdm

from saeguard.evaluation import baselines
from saeguard.evaluation.ask import Question, ask, render
from saeguard.evaluation.choose import part_of
from saeguard.evaluation.datasets import Dataset, Part, chunks, lines_at, spelt
from saeguard.evaluation.figures import Detector
from saeguard.evaluation.judging import CHUNK, Keys
from saeguard.evaluation.store import Store
from saeguard.hf.model import LanguageModel
from saeguard.hf.text_lines import Line
from saeguard.policy.types import Policy


class Wanted(Protocol):
    """Which baselines are wanted."""

    @property
    def length(self) -> bool: ...  # noqa: D102
    @property
    def words(self) -> bool: ...  # noqa: D102
    @property
    def probe(self) -> bool: ...  # noqa: D102
    @property
    def judge(self) -> bool: ...  # noqa: D102


@dataclass(frozen=True, slots=True)
class Compared:
    """What baselines are computed from."""

    lm: LanguageModel | None
    policies: Sequence[Policy]
    keys: Keys
    store: Store
    benign: tuple[tuple[Dataset, np.ndarray], ...]
    """Ordinary texts, and a mask [texts] of those that baselines score."""


def compare(
    c: Compared,
    dataset: Dataset,
    policies: Sequence[int],
    read: Sequence[tuple[int, Part]],
    wanted: Wanted,
) -> tuple[list[Detector], list[str]]:
    """Return the baselines, and a note on each that cannot be computed.

    Args:
        c: what they are computed from.
        dataset: to be scored.
        policies: that are judged on it.
        read: the layers and parts that these read.
        wanted: which baselines.
    """
    found = list(_all(c, dataset, policies, read, wanted))
    detectors = [detector for _, detector in found if isinstance(detector, Detector)]
    return detectors, [f"{name}: {why}" for name, why in found if isinstance(why, str)]


def _all(
    c: Compared,
    dataset: Dataset,
    policies: Sequence[int],
    read: Sequence[tuple[int, Part]],
    wanted: Wanted,
) -> Iterator[tuple[str, Detector | str]]:
    both = all(dataset.counts)  # without both labels there is nothing to fit or to rank
    for part in dict.fromkeys(part for _, part in read if both):
        if wanted.length:
            yield "length", _length(c, dataset, part)
        if wanted.words:
            yield f"words, {part}", baselines.words(dataset, part, _spelt(c, part))
    for layer, part in read if wanted.probe and both else ():
        for row, name in enumerate(baselines.POOLED):
            why = f"probe, {name}, layer {layer}, {part}"
            yield why, _probe(c, dataset, layer, part, row)
    # A shadow policy and an enforced one may share an id and ask the same.
    asked = {(c.policies[i].id, c.policies[i].title, c.policies[i].scope): i for i in policies}
    for policy in asked.values() if wanted.judge else ():
        yield f"judge, {c.policies[policy].id}", _judge(c, dataset, c.policies[policy])


def _length(c: Compared, dataset: Dataset, part: Part) -> Detector:
    sizes = [d.length(part)[mask] for d, mask in c.benign]
    return baselines.length(dataset, part, np.concatenate([*sizes, np.empty(0)]))


def _spelt(c: Compared, part: Part) -> list[str]:
    return [spelt(line, part) for d, mask in c.benign for *_, line in lines_at(d, mask)]


def _probe(c: Compared, dataset: Dataset, layer: int, part: Part, row: int) -> Detector | str:
    key = c.keys.residuals[layer, part]
    x = _pooled(c.store.residuals(dataset.digest, key), row)
    if x is None:
        return "no residual was given out"
    benign = [
        _pooled(c.store.residuals(_digests(d, mask), key), row, x.shape[1]) for d, mask in c.benign
    ]
    ordinary = np.concatenate([x[:0], *(b for b in benign if b is not None)])
    ordinary = ordinary[~np.isnan(ordinary).any(1)]
    return baselines.probe(dataset, part, layer, row, x, ordinary)


def _pooled(kept: Sequence[np.ndarray | None], row: int, width: int = 0) -> np.ndarray | None:
    """Return one read-out of pooled residuals [texts, d], NaN for texts without any token."""
    width = max([k.shape[1] for k in kept if k is not None], default=0) or width
    if not width:
        return None
    nothing = np.full(width, np.nan, np.float32)
    return np.stack([k[row] if k is not None and k.size else nothing for k in kept])


def _digests(dataset: Dataset, mask: np.ndarray) -> list[bytes]:
    return [digest for digest, here in zip(dataset.digest, mask, strict=True) if here]


def _judge(c: Compared, dataset: Dataset, policy: Policy) -> Detector:
    """Return the model's own answers, of which those in the store are not asked for again."""
    everything = np.ones(len(dataset), bool)
    answered = [_answers(c, d, mask, policy) for d, mask in ((dataset, everything), *c.benign)]
    score = np.array([score for score, _ in answered[0]])
    cut = sum(was_cut for _, was_cut in answered[0])
    benign = np.array([score for of_one in answered[1:] for score, _ in of_one])
    return Detector(
        f"judge, {policy.id}",
        "judge",
        part_of(policy.scope),
        score,
        (benign,),
        np.zeros(len(dataset), np.int64),
        note=f"{cut} texts lost their beginning to fit the context" if cut else "",
    )


def _answers(
    c: Compared, dataset: Dataset, mask: np.ndarray, policy: Policy
) -> list[tuple[float, bool]]:
    """Return score, and whether the text was cut, of each text at the mask."""
    assert c.lm is not None  # the command refuses --judge without it
    asked = render(Question("", True, policy.title), "")
    key = hashlib.sha256(f"{c.keys.model}\n{policy.scope}\n{asked}".encode()).hexdigest()[:32]
    texts = _digests(dataset, mask)
    at = np.flatnonzero(mask)
    missing = np.zeros(len(dataset), bool)
    missing[at] = [kept is None for kept in c.store.answers(texts, key)]
    with tqdm(
        total=int(missing.sum()), desc=f"ask {dataset.name}", unit="text", leave=False
    ) as bar:
        for chunk in chunks(lines_at(dataset, missing), CHUNK):
            questions = [_question(line, policy) for *_, line in chunk]
            for i, score, cut in ask(c.lm, questions):
                c.store.put_answers([(dataset.digest[chunk[i][0]], key, score, cut)])
                bar.update()
            c.store.commit()
    answers = c.store.answers(texts, key)
    return [kept for kept in answers if kept is not None]


def _question(line: Line, policy: Policy) -> Question:
    """Ask about the part that the policy reads; a reply is shown with what it replies to."""
    part = part_of(policy.scope)
    reply = part == "output" and line.text is None and bool(spelt(line, "prompt"))
    return Question(spelt(line, "both" if reply else part), reply, policy.title)
