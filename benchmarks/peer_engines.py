"""The engines of `benchmarks/peers.py`: plain, a hook by hand, vllm-lens, saeguard."""

from __future__ import annotations

import importlib.util
import os
import random
import time
from pathlib import Path
from typing import Any

from benchmarks.overhead_model import VOCABULARY, Size

PLAIN = "plain"
MEANING = {
    PLAIN: "vLLM alone",
    "hook": "a forward hook that encodes all latents, and keeps those that policies read",
    "vllm-lens": "vllm-lens captures the layer's residual stream; nothing is encoded",
    "saeguard": "8 policies on 32 latents, none fires",
}


def unavailable(kind: str) -> str | None:
    """Return why an engine cannot be measured here, None if it can."""
    if kind == "vllm-lens" and importlib.util.find_spec("vllm_lens") is None:
        return (
            "vllm_lens is not installed; 1.3.0, the newest of the package index, needs Python 3.12 "
            "and vllm 0.30.0"
        )
    return None


def serve(kind: str, root: Path, size: Size, log: Path, line: Any) -> None:
    """Start an engine in this process, and answer each batch with its seconds and what was read."""
    with log.open("wb") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")
    engine = Engine(kind, root, size)
    line.send("ready")
    while True:
        try:
            asked = line.recv()
        except EOFError:
            return
        line.send(engine.generate(*asked))


class Engine:
    """A vLLM engine that is read in one way."""

    def __init__(self, kind: str, root: Path, size: Size) -> None:
        """Start it.

        A hook that is registered on a loaded model is not called by a compiled graph, so all
        engines run eagerly.
        """
        from vllm import LLM  # noqa: PLC0415 - after the environment is set

        self.kind, self.size, self.seen = kind, size, 0
        more: dict[str, Any] = {}
        if kind == "saeguard":
            armed = root / "armed"
            more["additional_config"] = {
                "saeguard": {
                    "policies": str(armed / "policies"),
                    "feature_sets": str(armed / "feature_sets"),
                    "events": str(armed / "peers.jsonl"),
                    "reload": False,
                }
            }
        self.llm = LLM(
            str(root / "model"), skip_tokenizer_init=True, dtype="float32", max_model_len=512,
            max_num_seqs=32, enforce_eager=True, seed=0, disable_log_stats=True, **more,
        )  # fmt: skip
        if kind == "hook":
            self._hook(root / "sae" / "sae_weights.safetensors")

    @property
    def core(self) -> Any:
        """The engine core of vLLM, in this process."""
        return self.llm.llm_engine.engine_core.engine_core

    def _hook(self, weights: Path) -> None:
        """Register what a user writes by hand: encode everything, keep what is asked for."""
        import torch  # noqa: PLC0415 - after the environment is set
        from safetensors import safe_open  # noqa: PLC0415

        from saeguard.vllm.worker.layers import decoder_layers  # noqa: PLC0415

        with safe_open(weights, framework="pt") as file:
            W, b, theta = (file.get_tensor(n) for n in ("W_enc", "b_enc", "threshold"))
        watched = torch.tensor(self.size.watched)
        model = self.core.model_executor.driver_worker.worker.model_runner.model

        def encode(_module: Any, _args: Any, output: Any) -> None:
            x = output[0] + output[1] if isinstance(output, tuple) else output
            z = torch.addmm(b, x.float(), W)
            f = (z * (z > theta))[:, watched].cpu()
            self.seen += len(f)

        decoder_layers(model, self.size.layers)[self.size.hooked].register_forward_hook(encode)

    def generate(self, batch: int, steps: int, tokens: int, seed: int) -> tuple[float, int]:
        """Return the seconds of `steps` output tokens of a batch, and how much was read."""
        from vllm import SamplingParams  # noqa: PLC0415

        rng = random.Random(f"{batch} {seed}")
        prompts = [
            {"prompt_token_ids": [rng.randrange(3, VOCABULARY) for _ in range(tokens)]}
            for _ in range(batch)
        ]
        asked = {"output_residual_stream": [self.size.hooked]} if self.kind == "vllm-lens" else None
        params = SamplingParams(
            max_tokens=steps, temperature=0, ignore_eos=True, detokenize=False, extra_args=asked
        )
        before, began = self._read(), time.perf_counter()
        outputs = self.llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - began
        if self.kind == "vllm-lens":
            self.seen += sum(1 for output in outputs if output.activations)
        return seconds, self._read() - before

    def _read(self) -> int:
        """Return how much was read so far: tokens by the hook, requests by the others."""
        if self.kind != "saeguard":
            return self.seen
        from saeguard.vllm.attributes import ENGINE_GUARD  # noqa: PLC0415

        telemetry = ENGINE_GUARD.get(self.core.scheduler).telemetry
        return int(telemetry.sink.produced)
