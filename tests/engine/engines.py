"""Start engines for tests, and the reference they are held against: Transformers and SAELens."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from saeguard.guard.judge import judge_text
from saeguard.guard.verdict import Verdict
from saeguard.guard.watchlist import WatchList
from saeguard.vllm.settings import parse_settings
from saeguard.vllm.startup import load_watchlist
from tests import engine_starts

ROOT = Path(__file__).parents[2]
GREEDY = {"temperature": 0.0, "max_tokens": 12, "ignore_eos": True}


@dataclass(frozen=True)
class Served:
    """What a child process served."""

    results: list[dict[str, Any]]
    activations: dict[str, tuple[np.ndarray, np.ndarray]]
    """By request id: positions and activations."""
    left: int
    blocks: list[str]
    """What each tapped block returns."""
    graph: str
    """vLLM's hash of what shapes the compiled graph."""
    log: str


def environment(*, v2: bool = False, triton: bool = False) -> dict[str, str]:
    """Return the environment of a child that runs vLLM on a CPU.

    Args:
        v2: run Model Runner V2, in Triton's interpreter.
        triton: run Triton's kernels in its interpreter, whichever runner it is.
    """
    env = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "PYTHONPATH": str(ROOT),
    }
    env.pop("VLLM_PLUGINS", None)
    if prelude := os.environ.get("SAEGUARD_TEST_PRELUDE"):  # tests/mutants.py breaks things
        env["PYTHONPATH"] = f"{prelude}:{ROOT}"
    if v2:
        env["VLLM_USE_V2_MODEL_RUNNER"] = "1"
        # What vLLM compiles even when eager, on several ranks, asks Triton for a GPU.
        env["TORCHDYNAMO_DISABLE"] = "1"
    if v2 or triton:
        env["SAEGUARD_TRITON_INTERPRET"] = "1"
        env["PYTHONPATH"] = f"{ROOT / 'tests' / 'v2_runner_on_cpu'}:{ROOT}"
    return env


def mutation() -> str:
    """Return what tests/mutants.py breaks, for tests whose children run code of their own first."""
    prelude = os.environ.get("SAEGUARD_TEST_PRELUDE")
    return (Path(prelude) / "sitecustomize.py").read_text() if prelude else ""


def run(
    folder: Path,
    engine: dict[str, Any],
    batches: Sequence[Any],
    *,
    more: Mapping[str, str] | None = None,
    **how: bool,
) -> subprocess.CompletedProcess[str]:
    """Run a job in a child process and return how it ended.

    Args:
        folder: for its files.
        engine: arguments of `vllm.LLM`.
        batches: of requests.
        more: what is added to its environment.
        how: as for `environment`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    defaults = {"dtype": "float32", "max_model_len": 256, "seed": 0, "skip_tokenizer_init": True}
    job = folder / "job.json"
    job.write_text(json.dumps({"engine": {**defaults, **engine}, "batches": list(batches)}))
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "tests.engine.drive", str(job), str(folder / "out.npz")],
        cwd=ROOT,
        env={**environment(**how), **(more or {})},
        capture_output=True,
        text=True,
        check=False,
        timeout=800,
    )
    if done.returncode:
        engine_starts.record("refused", time.monotonic() - began)
    return done


def serve(folder: Path, engine: dict[str, Any], batches: Sequence[Any], **how: Any) -> Served:
    """Serve `batches` with the real vLLM; fail with its log if it does. Takes what `run` takes."""
    done = run(folder, engine, batches, **how)
    log = done.stdout + done.stderr
    assert done.returncode == 0, log[-6000:]
    out = json.loads((folder / "out.json").read_text())
    arrays = np.load(folder / "out.npz")
    ids = {name.split(".")[0] for name in arrays.files}
    return Served(
        out["results"],
        {i: (arrays[f"{i}.positions"], arrays[f"{i}.f"]) for i in ids},
        out["left"],
        out["blocks"],
        out["graph"],
        log,
    )


def random_prompts(
    count: int, *, seed: int, shortest: int = 2, longest: int = 120, vocabulary: int = 512
) -> list[list[int]]:
    """Return `count` random prompts that begin with BOS (1)."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(shortest, longest, count)
    return [[1, *rng.integers(3, vocabulary, int(n)).tolist()] for n in lengths]


def requests(prompts: Sequence[list[int]], **params: Any) -> list[dict[str, Any]]:
    """Return greedy requests for `prompts`."""
    return [{"prompt": p, "params": {**GREEDY, **params}} for p in prompts]


def blocks(model: Any) -> torch.nn.ModuleList:
    """Return the decoder blocks of a Transformers model, whatever it calls them."""
    depth = model.config.get_text_config().num_hidden_layers
    return next(
        m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == depth
    )


class Reference:
    """Transformers computes the residual stream, SAELens encodes it."""

    def __init__(self, model: Path, sae: Path, layer: int = 1) -> None:
        """Load both."""
        from sae_lens import SAE
        from transformers import AutoModelForCausalLM

        self.layer = layer
        # Transformers' other attention leaves out the soft cap of Gemma 2's logits.
        self.model = AutoModelForCausalLM.from_pretrained(
            model, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        self.sae = SAE.load_from_disk(str(sae))
        self._last: list[torch.Tensor] = []
        blocks(self.model)[layer].register_forward_hook(self._note)

    def _note(self, _module: Any, _args: Any, output: Any) -> None:
        self._last = [output[0] if isinstance(output, tuple) else output]

    @torch.no_grad()
    def residual(self, tokens: Sequence[int]) -> torch.Tensor:
        """Return the residual stream at every token, [tokens, d_in]."""
        out = self.model(torch.tensor([list(tokens)]), output_hidden_states=True)
        x: torch.Tensor = out.hidden_states[self.layer + 1]
        if self.layer + 2 == len(out.hidden_states):  # which is behind the final norm
            x = self._last[0]
        return x[0]

    @torch.no_grad()
    def latents(self, tokens: Sequence[int]) -> np.ndarray:
        """Return every latent at every token, [tokens, d_sae]."""
        encoded: np.ndarray = self.sae.encode(self.residual(tokens)).numpy()
        return encoded

    def verdicts(
        self,
        watchlist: WatchList,
        prompt: list[int],
        output: list[int],
        roles: np.ndarray | None = None,
    ) -> list[Verdict]:
        """Judge a served text: all but its last token, which the engine never reads."""
        tokens = [*prompt, *output][:-1]
        columns = [int(name.rsplit("/f", 1)[1]) for name in watchlist.features]
        shares = self.latents(tokens)[:, columns].astype(np.float32)
        evaluable = ~np.isin(tokens, watchlist.exclude_tokens)
        return judge_text(watchlist.rules, shares, evaluable, len(prompt), roles)


def compile_policies(settings: dict[str, Any]) -> WatchList:
    """Return the watch list that a server with these settings runs."""
    return load_watchlist(parse_settings(settings))


def events_by_request(path: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """Return the verdicts of a log by request id and policy."""
    events: dict[str, dict[str, dict[str, Any]]] = {}
    for line in path.read_text().splitlines():
        event = json.loads(line)
        if event["event"] != "verdict":
            continue
        events.setdefault(event["request_id"].split("-")[0], {})[event["policy"]] = event
    return events
