"""Judge many texts by serving's rules, a chunk at a time, and keep the verdicts.

An engine reads texts and yields what was found; `transformers_engine` is one. Another one needs
only to yield the same `Judged`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from tqdm import tqdm

from saeguard import __version__
from saeguard.evaluation.datasets import PARTS, Dataset, Part, chunks, lines_at
from saeguard.evaluation.store import Kept, Store
from saeguard.features.pins import file_digest
from saeguard.features.types import FeatureSet
from saeguard.guard.verdict import Verdict
from saeguard.guard.watchlist import WatchList
from saeguard.hf import readings
from saeguard.hf.model import LanguageModel
from saeguard.hf.scan import see
from saeguard.hf.texts import Text, text_of

CHUNK = 512
"""Texts that are in memory at a time; what was found of them is kept before the next ones."""


class Judged(NamedTuple):
    """What an engine found of one text."""

    text: int
    """Its index among the texts that the engine was given."""
    verdicts: Sequence[Verdict]
    """One per policy of the watch list."""
    evaluable: np.ndarray
    """[tokens] bool: false for excluded tokens and attention sinks."""
    residuals: Mapping[int, torch.Tensor]
    """By layer, [tokens, d] float32; empty if the engine does not give them out."""
    evidence: np.ndarray | None = None
    """[tokens, policies], -inf at tokens that a policy does not look at; None if not asked for."""


Engine: TypeAlias = Callable[[Sequence[Text], bool], Iterator[Judged]]
"""Yields each text's `Judged`, in any order; the flag asks for the evidence of each token."""


def transformers_engine(lm: LanguageModel, watchlist: WatchList) -> Engine:
    """Return the engine that reads texts with Transformers, as `saeguard scan` does."""

    def read(texts: Sequence[Text], evidence: bool) -> Iterator[Judged]:
        for seen in see(lm, watchlist, texts):
            verdicts = list(seen.judge(watchlist.rules))
            scored = seen.score(watchlist.rules).evidence if evidence else None
            evaluable = seen.evaluable & ~seen.massive
            yield Judged(seen.text, verdicts, evaluable, seen.residuals, scored)

    return read


def reading_engine(reader: readings.Engine, watchlist: WatchList, tokenizer: Any) -> Engine:
    """Return an engine that judges feature values, which vLLM reads; it gives out no residuals."""

    def read(texts: Sequence[Text], evidence: bool) -> Iterator[Judged]:
        for _, seen in readings.see_texts(reader, watchlist, tokenizer, texts):
            verdicts = list(seen.judge(watchlist.rules))
            scored = seen.score(watchlist.rules).evidence if evidence else None
            yield Judged(seen.text, verdicts, seen.evaluable & ~seen.massive, {}, scored)

    return read


@dataclass(frozen=True, slots=True)
class Keys:
    """What a kept value depends on, besides the text."""

    model: str
    """Digest of the model."""
    policies: tuple[str, ...]
    """By policy of the watch list."""
    residuals: Mapping[tuple[int, Part], str]
    """By layer and part."""


def make_keys(
    model: str, engine: str, watchlist: WatchList, sets: Mapping[str, FeatureSet]
) -> Keys:
    """Return the keys of a model's verdicts and residuals.

    Args:
        model: its digest, see `model_digest`.
        engine: its name.
        watchlist: the policies.
        sets: their feature sets, by id.
    """
    excluded = ",".join(map(str, watchlist.exclude_tokens))
    common = (__version__, model, engine, excluded)
    return Keys(
        model,
        tuple(_key(*common, p.digest, sets[p.feature_set].digest) for p in watchlist.policies),
        {(h.layer, p): _key(*common, str(h.layer), p) for h in watchlist.hooks for p in PARTS},
    )


def model_digest(folder: Path) -> str:
    """Return the digest of the weights and configuration in a model's folder."""
    files = sorted([*folder.glob("*.safetensors"), folder / "config.json"])
    return _key(*(f"{file.name} {file_digest(file)}" for file in files))


def _key(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


@dataclass(frozen=True, slots=True)
class Work:
    """What is wanted of one dataset."""

    dataset: Dataset
    policies: tuple[int, ...]
    residuals: tuple[tuple[int, Part], ...] = ()
    """Layers and parts whose pooled residuals are wanted."""
    pooled: np.ndarray | None = None
    """[texts] bool: the texts whose residuals are wanted; None for all."""


def judge_all(
    work: Sequence[Work], engine: Engine, tokenizer: Any, store: Store, keys: Keys
) -> None:
    """Judge the texts whose verdicts or residuals are not in the store, and put them there."""
    missing = [_missing(w, store, keys) for w in work]
    total = sum(int(m.sum()) for m in missing)
    known = sum(len(m) for m in missing) - total
    note = f", {known} known" if known else ""
    with tqdm(total=total, desc=f"judge{note}", unit="text", disable=not total) as bar:
        for w, wanted in zip(work, missing, strict=True):
            bar.set_postfix_str(w.dataset.name)
            for chunk in chunks(lines_at(w.dataset, wanted), CHUNK):
                texts = [text_of(w.dataset.path, n, line, tokenizer) for _, n, line in chunk]
                at = [i for i, *_ in chunk]
                for judged in engine(texts, False):
                    _keep(w, at[judged.text], texts[judged.text], judged, store, keys)
                    bar.update()
                store.commit()


def _missing(w: Work, store: Store, keys: Keys) -> np.ndarray:
    """Return the texts [texts] bool of which something wanted is not in the store."""
    texts = w.dataset.digest
    out = np.zeros(len(texts), bool)
    for i in w.policies:
        out |= [kept is None for kept in store.verdicts(texts, keys.policies[i])]
    pooled = np.ones(len(texts), bool) if w.pooled is None else w.pooled
    for wanted in w.residuals:
        some = [d for d, p in zip(texts, pooled, strict=True) if p]
        out[pooled] |= [kept is None for kept in store.residuals(some, keys.residuals[wanted])]
    return out


def _keep(w: Work, i: int, text: Text, judged: Judged, store: Store, keys: Keys) -> None:
    digest = w.dataset.digest[i]
    verdicts = (judged.verdicts[policy] for policy in w.policies)
    store.put_verdicts(
        (digest, keys.policies[policy], _kept(verdict))
        for policy, verdict in zip(w.policies, verdicts, strict=True)
    )
    if judged.residuals and (w.pooled is None or w.pooled[i]):
        store.put_residuals(
            (digest, keys.residuals[layer, part], pool(judged, text, layer, part))
            for layer, part in w.residuals
        )


def _kept(verdict: Verdict) -> Kept:
    coverage = verdict.coverage
    return Kept(verdict.outcome, verdict.score, coverage.tokens, coverage.evaluated)


def pool(judged: Judged, text: Text, layer: int, part: Part) -> np.ndarray:
    """Return the mean and the last [2, d] of a part's evaluable residuals; [2, 0] if none is."""
    is_output = np.arange(len(text.tokens)) >= text.prompt_tokens
    of_part = {"output": is_output, "prompt": ~is_output, "both": np.ones_like(is_output)}[part]
    x = judged.residuals[layer][torch.from_numpy(of_part & judged.evaluable)].float()
    x = x[x.isfinite().all(1)]
    if not len(x):
        return np.empty((2, 0), np.float32)
    return torch.stack([x.mean(0), x[-1]]).numpy()
