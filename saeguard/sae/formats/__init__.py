"""The families of checkpoints that are read, each by the set of files it is published in.

| family | files | module |
|---|---|---|
| SAELens | `cfg.json`, `sae_weights.safetensors` | `saelens` |
| Gemma Scope | `params.npz` | `gemma_scope` |
| Gemma Scope 2 | `config.json`, `params.safetensors` | `gemma_scope_2` |
| Llama Scope | `hyperparams.json`, `checkpoints/final.safetensors` | `llama_scope` |
| Llama Scope R1 | `config.json`, `sae_weights.safetensors` | `llama_scope` |
| sparsify | `cfg.json`, `sae.safetensors` | `sparsify` |
| converted | `saeguard_sae.json`, `saeguard_sae.safetensors` | `converted` |

Pickled families (Goodfire, dictionary_learning, OpenAI, Qwen-Scope) are in `pickled` and
`dictionary_learning`; only `saeguard sae convert` reads them, and what it writes is of the last
kind.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from saeguard.sae.checkpoint_info import SaeInfo
from saeguard.sae.formats import (
    converted,
    gemma_scope,
    gemma_scope_2,
    llama_scope,
    saelens,
    sparsify,
)
from saeguard.sae.formats.source import Source

__all__ = ["FAMILIES", "Family"]


@dataclass(frozen=True, slots=True)
class Family:
    """One way in which SAEs are published."""

    title: str
    weights: str
    """Relative to the checkpoint's folder, as `config`."""
    config: str | None
    describe: Callable[[Source], SaeInfo]

    @property
    def files(self) -> tuple[str, ...]:
        """The files that a folder must hold."""
        return (self.weights,) if self.config is None else (self.config, self.weights)


FAMILIES: tuple[Family, ...] = (
    Family("SAELens checkpoints", saelens.WEIGHTS, saelens.CONFIG, saelens.describe),
    Family("Gemma Scope", gemma_scope.WEIGHTS, None, gemma_scope.describe),
    Family("Gemma Scope 2", gemma_scope_2.WEIGHTS, gemma_scope_2.CONFIG, gemma_scope_2.describe),
    Family("Llama Scope", llama_scope.WEIGHTS, llama_scope.CONFIG, llama_scope.describe),
    Family(
        "Llama Scope R1", llama_scope.R1_WEIGHTS, llama_scope.R1_CONFIG, llama_scope.describe_r1
    ),
    Family("sparsify checkpoints", sparsify.WEIGHTS, sparsify.CONFIG, sparsify.describe),
    Family("converted checkpoints", converted.WEIGHTS, converted.CONFIG, converted.describe),
)
