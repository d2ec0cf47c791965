"""Run every measure in every arm."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from saeguard.effect import measures
from saeguard.effect.arms import ASKED, OFF, Arm, Sample, sae_of
from saeguard.effect.measures import Analyser, Measured, Sampling
from saeguard.effect.prompts import Prompt, completion_of, tokens_of
from saeguard.effect.random_latents import usual_activity
from saeguard.errors import InputError
from saeguard.features.types import FeatureSet
from saeguard.hf.model import LanguageModel
from saeguard.hf.residuals import record

SAMPLE = 160
"""Texts on which the strength of edits is compared."""


@dataclass(frozen=True, slots=True)
class Inputs:
    """What the arms are measured on."""

    code: tuple[Prompt, ...] = ()
    pairs: tuple[tuple[str, tuple[Prompt, ...]], ...] = ()
    """Name and prompts of each file."""
    ordinary: tuple[Prompt, ...] = ()
    tests: tuple[tuple[str, tuple[Prompt, ...]], ...] = ()
    topic: tuple[Prompt, ...] = ()
    words: tuple[str, ...] = ()

    @property
    def groups(self) -> tuple[Sequence[Prompt], ...]:
        """The prompts of each file."""
        files = [prompts for _, prompts in (*self.pairs, *self.tests)]
        return tuple(g for g in (self.code, self.ordinary, self.topic, *files) if g)

    def __len__(self) -> int:
        """Return how many answers and scores an arm takes."""
        return sum(map(len, self.groups))


def sample_of(lm: LanguageModel, features: FeatureSet, inputs: Inputs, seed: int) -> Sample:
    """Return residuals of prompts, and of completions if there are any, as many of each file."""
    rng = np.random.default_rng(seed)
    each = max(1, SAMPLE // len(inputs.groups))
    chosen = [
        group[i] for group in inputs.groups for i in rng.permutation(len(group))[:each].tolist()
    ]
    texts = [[*tokens_of(p, lm.tokenizer), *completion_of(p, lm.tokenizer)] for p in chosen]
    sae = sae_of(features)
    layer = sae.layer
    excluded = np.array(features.exclude_tokens, np.int64)
    rows = [
        residuals[layer][torch.from_numpy(~np.isin(np.array(texts[i]), excluded))]
        for i, residuals in record(lm, texts, [layer])
    ]
    x = torch.cat(rows)
    x = x[x.norm(dim=1) <= features.max_norm.get(layer, math.inf)]  # sinks are not edited either
    info = sae.inspect()
    return Sample(x, usual_activity(info, x))


def check_lengths(
    inputs: Inputs, arms: Sequence[Arm], tokenizer: Any, max_tokens: int, most: int
) -> None:
    """Check that every prompt leaves room for its answer, before an hour is spent on others.

    Raises:
        InputError: a prompt is too long.
    """
    system = max((arm.system or "" for arm in arms), key=len) or None
    scored = {id(p) for g in (inputs.ordinary, *(g for _, g in inputs.pairs)) for p in g}
    for prompt in (p for group in inputs.groups for p in group):
        tokens = len(tokens_of(prompt, tokenizer, system))
        after = len(completion_of(prompt, tokenizer)) + 1 if id(prompt) in scored else max_tokens
        if tokens + after > most:
            raise InputError(
                f"{prompt.id}: {tokens} tokens and {after} more for the answer; expected at most "
                f"{most}: raise --max-model-len, lower --max-tokens or leave the line out"
            )


def more_arms(asked: str | None) -> tuple[Arm, ...]:
    """Return the arms without a clamp: nothing done, and the prompt that asks for the same."""
    return (Arm(OFF), *((Arm(ASKED, system=asked),) if asked else ()))


def measure(
    sampling: Sampling,
    inputs: Inputs,
    arm: Arm,
    analysers: Mapping[str, Analyser],
    say: Callable[[str], object],
) -> Measured:
    """Run every measure in one arm; report each to `say` first."""
    parts = []
    if inputs.code:
        say("code")
        parts.append(measures.code(sampling, inputs.code, arm, analysers))
    for name, prompts in inputs.tests:
        say(name)
        parts.append(measures.tests(sampling, prompts, arm, name))
    for name, prompts in inputs.pairs:
        say(name)
        parts.append(measures.preference(sampling, prompts, arm, name))
    if inputs.ordinary:
        say("ordinary text")
        parts.append(measures.loss(sampling, inputs.ordinary, arm))
    if inputs.topic:
        say("topic")
        parts.append(measures.topic(sampling, inputs.topic, arm, inputs.words))
    return Measured(
        tuple(m for part in parts for m in part.measures),
        tuple(row for part in parts for row in part.answers),
    )


def name_of(path: Path) -> str:
    """Return the name that a file has in the report."""
    return path.name.split(".")[0]
