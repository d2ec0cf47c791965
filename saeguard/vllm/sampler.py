"""Generate and score texts offline with a guarded engine, with one clamp policy enforced at a time.

All policies are in shadow; each call names the one that its requests have enforced. So one engine
serves every condition of a comparison, by the path that serves requests.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from saeguard.errors import CannotRunError
from saeguard.vllm.messages import KEY

BATCH = 256
"""Texts that are given to the engine at a time, between two steps of a progress bar."""


class SamplerError(CannotRunError):
    """The guard did not do what a condition asks for, so that nothing would be measured."""


class Sampled(NamedTuple):
    """One generated answer."""

    tokens: tuple[int, ...]
    text: str


class Sampler:
    """Generates and scores texts."""

    def __init__(self, llm: Any) -> None:
        """Take a guarded `vllm.LLM`; `open_sampler` makes one."""
        self._llm = llm

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        enforce: str | None,
        *,
        max_tokens: int,
        temperature: float,
        done: Callable[[int], object],
    ) -> list[Sampled]:
        """Return an answer to each prompt.

        Args:
            prompts: token ids.
            enforce: the clamp policy, None for no clamp.
            max_tokens: of an answer.
            temperature: 0 is greedy.
            done: called with the number of prompts answered since the last call.

        Raises:
            SamplerError: the clamp did not act on a request.
        """
        outputs = self._run(prompts, enforce, done, temperature=temperature, max_tokens=max_tokens)
        return [Sampled(tuple(o.outputs[0].token_ids), o.outputs[0].text) for o in outputs]

    def log_probabilities(
        self,
        texts: Sequence[tuple[Sequence[int], int]],
        enforce: str | None,
        *,
        done: Callable[[int], object],
    ) -> list[float]:
        """Return the sum of the log-probabilities of each text's last tokens, in nats.

        Args:
            texts: token ids, and how many of them come before the scored ones; at least one.
            enforce: the clamp policy, None for no clamp.
            done: called with the number of texts scored since the last call.

        Raises:
            SamplerError: the clamp did not act on a request.
        """
        outputs = self._run(
            [tokens for tokens, _ in texts], enforce, done,
            temperature=0.0, max_tokens=1, prompt_logprobs=0, detokenize=False,
        )  # fmt: skip
        return [
            sum(
                output.prompt_logprobs[i][tokens[i]].logprob
                for i in range(max(1, start), len(tokens))
            )
            for (tokens, start), output in zip(texts, outputs, strict=True)
        ]

    def _run(
        self,
        prompts: Sequence[Sequence[int]],
        enforce: str | None,
        done: Callable[[int], object],
        **parameters: Any,
    ) -> list[Any]:
        from vllm import SamplingParams

        extra = {"saeguard_enforce": enforce} if enforce else None
        params = SamplingParams(extra_args=extra, **parameters)
        outputs: list[Any] = []
        for start in range(0, len(prompts), BATCH):
            part = [{"prompt_token_ids": [*ids]} for ids in prompts[start : start + BATCH]]
            outputs += self._llm.generate(part, params, use_tqdm=False)
            done(len(part))
        for output in outputs:
            _check(output.outputs[0], enforce)
        return outputs


def open_sampler(
    model: Path,
    policies: Path,
    feature_sets: Path,
    may_enforce: Sequence[str],
    *,
    dtype: str,
    max_model_len: int,
    seed: int,
) -> Sampler:
    """Start an engine in this process with shadow policies that requests may have enforced.

    Args:
        model: folder of the model.
        policies: folder of the policies.
        feature_sets: folder of their feature sets.
        may_enforce: ids of the policies.
        dtype: of the weights and activations, such as bfloat16.
        max_model_len: most tokens of a prompt with its answer.
        seed: of the sampling.
    """
    for name, value in (
        ("VLLM_ENABLE_V1_MULTIPROCESSING", "0"),
        ("VLLM_CPU_KVCACHE_SPACE", "2"),
        ("VLLM_NO_USAGE_STATS", "1"),
        ("VLLM_LOGGING_LEVEL", "WARNING"),
        ("HF_HUB_OFFLINE", "1"),
    ):
        os.environ.setdefault(name, value)
    from vllm import LLM  # reads the environment

    settings = {
        "policies": str(policies),
        "feature_sets": str(feature_sets),
        "request_may_enforce": list(may_enforce),
        "reload": False,
    }
    return Sampler(
        LLM(
            str(model),
            dtype=dtype,
            max_model_len=max_model_len,
            max_num_seqs=BATCH,
            enforce_eager=True,
            seed=seed,
            additional_config={KEY: settings},
        )
    )


def _check(choice: Any, enforce: str | None) -> None:
    """Check that the guard acted: a clamp that is silently off would pass for one without effect.

    Raises:
        SamplerError: it did not.
    """
    said = getattr(choice, KEY, None)
    if said is None:
        raise SamplerError(
            "vLLM returned an answer without verdicts; expected the guard's. Is saeguard installed "
            "beside vLLM, and VLLM_PLUGINS unset?"
        )
    acted = {v["policy"] for v in said["verdicts"] if v["action"] == "clamp"}
    if acted != ({enforce} if enforce else set()):
        raise SamplerError(
            f"a request was to be clamped by {enforce or 'no policy'}, and the guard reports "
            f"{', '.join(sorted(acted)) or 'no clamp'}"
        )
