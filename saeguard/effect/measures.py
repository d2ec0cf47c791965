"""What is measured in each arm: findings in code, preferred answers, loss, tests, topic words."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from saeguard.effect.arms import Arm
from saeguard.effect.intervals import How, Units, units
from saeguard.effect.prompts import Prompt, completion_of, tokens_of
from saeguard.effect.python_code import python_code
from saeguard.effect.run_tests import passes

Done = Callable[[int], object]
Analyser = Callable[[Sequence[str]], list[tuple[str, ...]]]


class Generated(Protocol):
    """One answer."""

    @property
    def text(self) -> str:
        """The answer without special tokens."""


class Engine(Protocol):
    """What generates and scores; `saeguard.vllm.sampler.Sampler`."""

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        enforce: str | None,
        *,
        max_tokens: int,
        temperature: float,
        done: Done,
    ) -> Sequence[Generated]:
        """Return an answer to each prompt."""

    def log_probabilities(
        self, texts: Sequence[tuple[Sequence[int], int]], enforce: str | None, *, done: Done
    ) -> list[float]:
        """Return the summed log-probability of each text's last tokens."""


@dataclass(frozen=True, slots=True)
class Measure:
    """One number of an arm, and how it is compared."""

    name: str
    how: How
    units: Units


@dataclass(frozen=True, slots=True)
class Measured:
    """What one arm gave."""

    measures: tuple[Measure, ...] = ()
    answers: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True, slots=True)
class Sampling:
    """How answers are generated."""

    engine: Engine
    tokenizer: Any
    max_tokens: int
    temperature: float
    done: Done = field(default=lambda _count: None)

    def answers(self, prompts: Sequence[Prompt], arm: Arm) -> list[str]:
        """Return an answer to each prompt under an arm."""
        ids = [tokens_of(p, self.tokenizer, arm.system) for p in prompts]
        found = self.engine.generate(
            ids,
            arm.enforce,
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            done=self.done,
        )
        return [answer.text for answer in found]

    def scores(self, prompts: Sequence[Prompt], arm: Arm) -> tuple[list[float], list[int]]:
        """Return each completion's log-probability under an arm, and its number of tokens."""
        texts, lengths = [], []
        for prompt in prompts:
            before = tokens_of(prompt, self.tokenizer, arm.system)
            after = completion_of(prompt, self.tokenizer)
            texts.append(([*before, *after], len(before)))
            lengths.append(len(after))
        return self.engine.log_probabilities(texts, arm.enforce, done=self.done), lengths


def code(
    sampling: Sampling, prompts: Sequence[Prompt], arm: Arm, analysers: Mapping[str, Analyser]
) -> Measured:
    """Let analysers judge the code of an arm's answers.

    Findings are counted per answer whose code parses: a clamp that breaks the model has no findings
    either, so the share of answers that parse is a measure of its own.
    """
    answers = sampling.answers(prompts, arm)
    sources = [python_code(answer) for answer in answers]
    parsed = [float(bool(source)) for source in sources]
    template = [p.template for p in prompts]
    found = {name: judge(sources) for name, judge in analysers.items()}
    measures = [Measure("answers with code", "difference", units(parsed, template))]
    for name, per_source in found.items():
        counts = [float(len(names)) for names in per_source]
        any_ = [float(bool(names)) for names in per_source]
        measures += [
            Measure(f"{name} findings per answer", "ratio", units(counts, template, parsed)),
            Measure(f"answers with a {name} finding", "ratio", units(any_, template, parsed)),
        ]
    # Less code has fewer findings.
    lines = [float(len(source.split("\n"))) if source else 0.0 for source in sources]
    measures.append(Measure("lines of code per answer", "ratio", units(lines, template, parsed)))
    rows = [
        {
            **_row(prompt, arm, answer),
            "label": int(any(per_source[i] for per_source in found.values())),
            "findings": {name: list(per_source[i]) for name, per_source in found.items()},
        }
        for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True))
    ]
    return Measured(tuple(measures), tuple(rows))


def preference(sampling: Sampling, prompts: Sequence[Prompt], arm: Arm, name: str) -> Measured:
    """Measure how probable the completions with label 1 are among all those of their question.

    The probabilities of a question's completions are normalised to sum to 1, as TruthfulQA's MC2
    does (Lin et al. 2022, section 3.3). Questions whose completions share one label are left out.
    """
    scores, lengths = sampling.scores(prompts, arm)
    questions: dict[str, list[int]] = {}
    for i, prompt in enumerate(prompts):
        questions.setdefault(prompt.question, []).append(i)
    mass, template = [], []
    for members in questions.values():
        labels = [prompts[i].label for i in members]
        if len(set(labels)) == 1:
            continue
        top = max(scores[i] for i in members)
        weight = [math.exp(scores[i] - top) for i in members]
        mass.append(sum(w for w, label in zip(weight, labels, strict=True) if label) / sum(weight))
        template.append(prompts[members[0]].template)
    total = [-score for score in scores]
    every = [p.template for p in prompts]
    return Measured(
        (
            Measure(f"{name}: probability of label 1", "difference", units(mass, template)),
            # A clamp that makes both completions improbable has broken the model instead.
            Measure(
                f"{name}: loss per token", "ratio", units(total, every, list(map(float, lengths)))
            ),
        )
    )


def loss(sampling: Sampling, prompts: Sequence[Prompt], arm: Arm) -> Measured:
    """Measure the loss on ordinary completions, in nats per token."""
    scores, lengths = sampling.scores(prompts, arm)
    measured = units(
        [-score for score in scores], [p.template for p in prompts], list(map(float, lengths))
    )
    return Measured((Measure("loss per token on ordinary text", "ratio", measured),))


def tests(sampling: Sampling, prompts: Sequence[Prompt], arm: Arm, name: str) -> Measured:
    """Measure the share of answers whose code passes its tests."""
    answers = sampling.answers(prompts, arm)
    passed = [
        float(bool(source) and passes(source, prompt.tests))
        for prompt, answer in zip(prompts, answers, strict=True)
        for source in [python_code(answer)]
    ]
    measured = units(passed, [p.template for p in prompts])
    rows = [
        {**_row(prompt, arm, answer), "passed": bool(ok)}
        for prompt, answer, ok in zip(prompts, answers, passed, strict=True)
    ]
    return Measured(
        (Measure(f"{name}: answers that pass their tests", "difference", measured),), tuple(rows)
    )


def topic(
    sampling: Sampling, prompts: Sequence[Prompt], arm: Arm, words: Sequence[str]
) -> Measured:
    """Measure how many of an arm's words belong to a topic, and in how many answers they occur."""
    answers = sampling.answers(prompts, arm)
    wanted = re.compile(r"\b(?:" + "|".join(map(re.escape, words)) + r")\w*\b", re.IGNORECASE)
    hits = [float(len(wanted.findall(answer))) for answer in answers]
    said = [float(len(re.findall(r"\w+", answer))) for answer in answers]
    # A stuck model repeats itself: how many different words it uses shows that.
    different = [float(len(set(re.findall(r"\w+", answer.lower())))) for answer in answers]
    template = [p.template for p in prompts]
    return Measured(
        (
            Measure("topic words per word", "difference", units(hits, template, said)),
            Measure(
                "answers with a topic word",
                "difference",
                units([float(h > 0) for h in hits], template),
            ),
            Measure("different words per word", "difference", units(different, template, said)),
        ),
        tuple(_row(p, arm, a) for p, a in zip(prompts, answers, strict=True)),
    )


def _row(prompt: Prompt, arm: Arm, answer: str) -> dict[str, Any]:
    return {
        "id": f"{prompt.id}/{arm.name}",
        "template": prompt.template,
        "prompt": list(map(dict, prompt.messages)),
        "completion": answer,
        "arm": arm.name,
    }
