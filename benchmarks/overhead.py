"""What the guard costs a decode step of the real vLLM engine, and where that time goes.

One engine, one process, one batch of requests: the guard's state is switched between blocks of a
few steps, in random order within each round, so that drift of a shared machine falls on all
states alike. See README.md beside this file.
"""

# ruff: noqa: E402 - vLLM reads the environment as it is imported
from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import random
import re
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from safetensors.torch import save_file

from saeguard.guard import tap as tapping
from saeguard.guard.install_taps import install_taps
from saeguard.guard.tap import TAPS, Tap
from saeguard.reload.versions import clamps_digest
from saeguard.reload.worker_updates import Admitted
from saeguard.vllm.engine_core.guard import EngineGuard
from saeguard.vllm.engine_core.hooks import memory_of
from saeguard.vllm.settings import Settings, start
from saeguard.vllm.worker.guard import WorkerGuard
from tests.models import random_policies, write_feature_set, write_policy

HIDDEN, LAYERS, VOCABULARY, LATENTS = 1024, 14, 2048, 65_536
HOOKED = LAYERS // 2
WATCHED = tuple(range(0, LATENTS, LATENTS // 32))
MAX_LENGTH = 544
IDLE = "idle"
STATES = (IDLE, "idle again", "armed", "firing", "clamping")
MEANING = {
    IDLE: "plugin installed, no policy loaded",
    "idle again": "the same once more: how far apart two equal states look here",
    "armed": "8 policies on 32 latents, none fires",
    "firing": "the same policies, firing on most tokens",
    "clamping": "the same, and a policy that clamps 4 latents from an early token on",
}
PARTS = (
    "worker.before",
    "op",
    "worker.after",
    "collect",
    "engine.rules",
    "engine.finish",
)
"""Host time by part; `engine.finish` comes once a request, the others on each step."""
SPENT: dict[str, int] = defaultdict(int)
"""Nanoseconds by part since it was cleared."""


# --- what is served -----------------------------------------------------------------------------


def make_model(path: Path) -> int:
    """Save a random model of Qwen3's shape; return its number of parameters."""
    import transformers  # noqa: PLC0415 - after the environment is set

    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=3 * HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(path)
    return sum(p.numel() for p in model.parameters())


def make_sae(path: Path) -> Path:
    """Write a random JumpReLU SAE in SAELens' format, without holding it twice."""
    path.mkdir(parents=True)
    torch.manual_seed(0)
    save_file(
        {
            "W_enc": torch.randn(HIDDEN, LATENTS).mul_(HIDDEN**-0.5),
            "b_enc": torch.zeros(LATENTS),
            "W_dec": torch.randn(LATENTS, HIDDEN).mul_(1e-3),
            "b_dec": torch.zeros(HIDDEN),
            "threshold": torch.full((LATENTS,), 1e-4),
        },
        path / "sae_weights.safetensors",
    )
    cfg = {
        "architecture": "jumprelu",
        "d_in": HIDDEN,
        "d_sae": LATENTS,
        "dtype": "float32",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "metadata": {"hook_name": f"blocks.{HOOKED}.hook_resid_post", "sae_lens_version": "6.0.0"},
    }
    (path / "cfg.json").write_text(json.dumps(cfg))
    return path


def make_policies(root: Path, state: str, sae: Path) -> Settings:
    """Write the policies of one state; how far features range decides whether they fire."""
    folder = root / state
    high = 1e6 if state == "armed" else 1e-6
    write_feature_set(
        folder / "feature_sets" / "tiny.yaml", sae, latents=WATCHED, layers=LAYERS, high=high
    )
    random_policies(folder / "policies", WATCHED, seed=1, count=8)
    if state == "clamping":
        features = [f"f{latent}" for latent in WATCHED[:4]]
        write_policy(
            folder / "policies" / "clamped.yaml",
            id="test.clamped",
            action="clamp",
            detect={
                x: {"feature": f, "above": 0.01} for x, f in zip("abcd", features, strict=True)
            },
            condition="a or b or c or d",
            clamp={"features": features, "to": 0},
        )
    return Settings(
        policies=str(folder / "policies"),
        feature_sets=str(folder / "feature_sets"),
        events=str(folder / "events.jsonl"),
    )


# --- one engine, several guards -----------------------------------------------------------------


@dataclass(frozen=True)
class Guards:
    """All that makes the engine's process guarded in one way; empty where it is idle."""

    taps: Mapping[int, Tap]
    worker: WorkerGuard | None = None
    engine: EngineGuard | None = None


@dataclass(frozen=True)
class Bench:
    """The engine and the guards that take turns on it."""

    llm: Any
    guards: Mapping[str, Guards]

    @property
    def core(self) -> Any:
        """The engine core of vLLM, in this process."""
        return self.llm.llm_engine.engine_core.engine_core

    @property
    def runner(self) -> Any:
        """The model runner of vLLM."""
        return self.core.model_executor.driver_worker.worker.model_runner

    def switch(self, state: str) -> None:
        """Guard the requests in flight in another way from the next step on."""
        guards = self.guards[state]
        TAPS.clear()
        TAPS.update(guards.taps)
        self.runner.saeguard = guards.worker
        self.core.scheduler.saeguard = guards.engine
        if guards.engine is not None:
            ledger = guards.engine.ledger
            for name, request in self.core.scheduler.requests.items():
                # Steps under other guards are no gaps: the guard would be in place all along.
                ledger._state.next[ledger._slot[name]] = request.num_computed_tokens  # noqa: SLF001

    def start(self, batch: int, tokens: int) -> list[str]:
        """Admit a batch of requests, run their prompts, and announce them to every guard."""
        from vllm import SamplingParams  # noqa: PLC0415 - after the environment is set

        self.switch(IDLE)
        rng = random.Random(batch)
        params = SamplingParams(max_tokens=MAX_LENGTH - tokens, temperature=0, ignore_eos=True)
        for i in range(batch):
            prompt = {"prompt_token_ids": [rng.randrange(3, VOCABULARY) for _ in range(tokens)]}
            self.llm.llm_engine.add_request(str(i), prompt, params)
        requests = self.core.scheduler.requests
        while len(requests) < batch or any(
            r.num_computed_tokens < r.num_prompt_tokens for r in requests.values()
        ):
            self.step()
        for guards in self.guards.values():
            for name, request in requests.items():
                if guards.engine is not None and guards.worker is not None:
                    guards.engine.admit(request)
                    settled = guards.engine.admitted[name]
                    admitted = Admitted(settled.clamps, settled.enforced)
                    guards.worker.announced[name] = (request.num_prompt_tokens, admitted)
        return list(requests)

    def step(self) -> float:
        """Run one step of the engine core; return its seconds."""
        begin = time.perf_counter()
        _, executed = self.core.step_fn()
        self.core.post_step(model_executed=executed)
        return time.perf_counter() - begin

    def stop(self, names: list[str]) -> dict[str, dict[str, int]]:
        """End every request under every guard; return the verdicts of each by outcome."""
        self.switch(IDLE)
        said: dict[str, dict[str, int]] = {}
        for state, guards in self.guards.items():
            if guards.engine is None or guards.worker is None:
                continue
            said[state] = defaultdict(int)
            for name in names:
                requests = self.core.scheduler.requests
                verdicts = guards.engine.ledger.finish(
                    name, requests[name].num_tokens, forget=False
                )
                for verdict in verdicts:
                    said[state][verdict.outcome] += 1
            SPENT.clear()
            for name in names:
                guards.engine.finish(name, "length")
            said[state]["finish_ns"] = SPENT["engine.finish"] // len(names)
            guards.worker.release(names)
        self.llm.llm_engine.abort_request(names)
        while self.core.scheduler.has_requests():
            self.step()
        return said


@contextmanager
def timed_parts() -> Iterator[None]:
    """Add up the host time of each part of the guard, in every state alike."""

    def timed(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter_ns()
            try:
                return function(*args, **kwargs)
            finally:
                SPENT[part] += time.perf_counter_ns() - begin

        return wrapper

    methods: list[tuple[type, str, str]] = [
        (WorkerGuard, "before", "worker.before"),
        (WorkerGuard, "after", "worker.after"),
        (WorkerGuard, "collect", "collect"),
        (EngineGuard, "before_update", "engine.rules"),
        (EngineGuard, "after_update", "engine.rules"),
        (EngineGuard, "finish", "engine.finish"),
    ]
    originals = [(owner, name, getattr(owner, name)) for owner, name, _ in methods]
    for owner, name, part in methods:
        setattr(owner, name, timed(part, getattr(owner, name)))
    key = "CompositeExplicitAutograd"
    tapping._library.impl("tap", timed("op", tapping._tap), key, allow_override=True)  # noqa: SLF001
    try:
        yield
    finally:
        for owner, name, function in originals:
            setattr(owner, name, function)


def build(root: Path) -> tuple[Bench, dict[str, Any]]:
    """Make the model, the SAE and the policies; start vLLM; prepare a guard for each state."""
    parameters = make_model(root / "model")
    sae = make_sae(root / "sae")
    settings = {s: make_policies(root, s, sae) for s in ("armed", "firing", "clamping")}
    from vllm import LLM  # noqa: PLC0415 - after the environment is set

    llm = LLM(
        str(root / "model"),
        skip_tokenizer_init=True,
        dtype="float32",
        max_model_len=MAX_LENGTH,
        max_num_seqs=32,
        async_scheduling=False,
        seed=0,
        disable_log_stats=True,
        additional_config={"saeguard": settings["clamping"].model_dump(exclude_none=True)},
    )
    bench = Bench(llm, {})
    first: WorkerGuard = bench.runner.saeguard
    slots = len(first.free) + len(first.slots)
    guards = {IDLE: Guards({}), "idle again": Guards({})}
    for state, wanted in settings.items():
        started = start(wanted)
        watchlist = started.watchlist
        taps = install_taps(
            watchlist, max_tokens=len(first.taps[0].f), slots=slots, device=first.device
        )
        worker = WorkerGuard(
            watchlist=watchlist,
            taps=taps,
            rows=taps[0].rows,
            excluded=first.excluded,
            device=first.device,
            free=list(range(1, slots + 1))[::-1],
            clamp_lists={clamps_digest(watchlist): watchlist},
            tested=True,
        )
        prefix_store = memory_of(bench.core.scheduler, watchlist, wanted)
        guards[state] = Guards(
            dict(TAPS), worker, EngineGuard(started, wanted, "bench", prefix_store=prefix_store)
        )
    about = {
        "parameters": parameters,
        "watch_list": {
            "policies": {
                s: len(g.engine.watchlist.policies) for s, g in guards.items() if g.engine
            },
            "latents": len(WATCHED),
            "d_sae": LATENTS,
        },
        "compilation": str(llm.llm_engine.vllm_config.compilation_config.mode),
        "kv_cache_gib": os.environ["VLLM_CPU_KVCACHE_SPACE"],
        "block_steps_interleaved": True,
    }
    return Bench(llm, guards), about


# --- measuring ----------------------------------------------------------------------------------


@dataclass
class Sample:
    """One block of steps under one state."""

    step_s: list[float]
    parts_us: dict[str, float]
    """Host time a step, by part."""


def measure(
    bench: Bench, batch: int, args: argparse.Namespace, tick: Callable[[], None]
) -> tuple[dict[str, list[Sample]], dict[str, dict[str, int]]]:
    """Run rounds of one block a state, in random order; restart requests that grow too long."""
    samples: dict[str, list[Sample]] = {state: [] for state in STATES}
    rng = random.Random(batch)
    names: list[str] = []
    said: dict[str, dict[str, int]] = {}
    room = 0
    for _ in range(args.rounds):
        needed = len(STATES) * args.steps + 1
        if room < needed:
            if names:
                said = bench.stop(names)
            names, room = bench.start(batch, args.tokens), MAX_LENGTH - args.tokens - 1
            for state in STATES:  # each state's first step allocates
                bench.switch(state)
                bench.step()
            room -= len(STATES)
        room -= len(STATES) * args.steps
        for state in rng.sample(STATES, len(STATES)):
            bench.switch(state)
            SPENT.clear()
            seconds = [bench.step() for _ in range(args.steps)]
            if len(bench.core.scheduler.running) != batch:
                raise SystemExit("requests were preempted: raise VLLM_CPU_KVCACHE_SPACE")
            samples[state].append(
                Sample(seconds, {p: SPENT[p] / 1e3 / args.steps for p in PARTS if p in SPENT})
            )
            tick()
    return samples, bench.stop(names) or said


def bootstrap(values: np.ndarray, statistic: Callable[..., Any], draws: int = 4000) -> list[float]:
    """Return the statistic with its 95 % interval; rows of `values` [rounds, ...] are drawn."""
    rng = np.random.default_rng(0)
    picked = values[rng.integers(len(values), size=(draws, len(values)))]
    low, high = np.percentile(statistic(picked, axis=1), [2.5, 97.5])
    return [float(statistic(values[None], axis=1)[0]), float(low), float(high)]


def _throughput(pairs: np.ndarray, axis: int) -> np.ndarray:
    """Return idle time over own time for [..., rounds, (idle, own)]: tokens/s compared."""
    total = pairs.sum(axis=axis)
    ratio: np.ndarray = total[..., 0] / total[..., 1]
    return ratio


def summarise(
    samples: Mapping[str, list[Sample]], batch: int, said: Mapping[str, Mapping[str, int]]
) -> dict[str, Any]:
    """Return the numbers of one batch size."""
    medians = {s: np.array([np.median(x.step_s) for x in blocks]) for s, blocks in samples.items()}
    totals = {s: np.array([sum(x.step_s) for x in blocks]) for s, blocks in samples.items()}
    out: dict[str, Any] = {}
    for state in STATES:
        step_s = float(np.median([t for x in samples[state] for t in x.step_s]))
        parts = {
            p: float(np.median([x.parts_us.get(p, 0.0) for x in samples[state]]))
            for p in PARTS
            if any(p in x.parts_us for x in samples[state])
        }
        host = float(np.median([sum(x.parts_us.values()) for x in samples[state]]))
        out[state] = {
            "step_ms": step_s * 1e3,
            "tokens_per_s": batch / step_s,
            "step_ratio": bootstrap(medians[state] / medians[IDLE], np.median),
            "throughput_ratio": bootstrap(np.stack([totals[IDLE], totals[state]], 1), _throughput),
            "host_us": host,
            "host_share": host / 1e6 / step_s,
            "parts_us": parts,
        }
        if state in said:
            counts = dict(said[state])
            out[state]["finish_us_per_request"] = counts.pop("finish_ns", 0) / 1e3
            out[state]["verdicts"] = counts
    return out


def reference(root: Path, batches: list[int]) -> list[dict[str, Any]]:
    """Time what the guard avoids, a full encode, beside what it does, a product of 32 rows."""
    from safetensors import safe_open  # noqa: PLC0415 - used here only

    with safe_open(root / "sae" / "sae_weights.safetensors", framework="pt") as file:
        W, b, theta = (file.get_tensor(n) for n in ("W_enc", "b_enc", "threshold"))
    rows = W[:, list(WATCHED)].t().contiguous()
    at = list(WATCHED)
    few, few_b, few_theta = rows.t(), b[at], theta[at]

    def encode(x: torch.Tensor, W: torch.Tensor, b: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        pre = torch.addmm(b, x, W)
        return pre * (pre > t)

    def median_us(function: Callable[[], Any], repeats: int) -> float:
        times = []
        for _ in range(repeats + 3):
            begin = time.perf_counter_ns()
            function()
            times.append(time.perf_counter_ns() - begin)
        return float(np.median(times[3:])) / 1e3

    out = []
    for batch in batches:
        x = torch.randn(batch, HIDDEN)
        out.append(
            {
                "rows": batch,
                "full_us": median_us(functools.partial(encode, x, W, b, theta), 12),
                "watched_us": median_us(functools.partial(encode, x, few, few_b, few_theta), 300),
            }
        )
    return out


# --- telling ------------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    """Return what the numbers were measured on."""
    model = platform.processor() or "unknown"
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        found = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text())
        model = found.group(1).strip() if found else model
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "torch_threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "python": platform.python_version(),
    }


def revision() -> str:
    """Return the git revision, marked where files differ from it."""
    try:
        return subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],  # noqa: S607
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def rows_of(results: Mapping[str, Any]) -> Iterator[list[str]]:
    """Return the table's rows: batch, state, times, ratios, host time."""
    for batch, by_state in results["batches"].items():
        for state, r in by_state.items():
            ratio, low, high = r["step_ratio"]
            through, t_low, t_high = r["throughput_ratio"]
            yield [
                batch,
                state,
                f"{r['step_ms']:.1f}",
                "1" if state == IDLE else f"{ratio:.4f} [{low:.4f}, {high:.4f}]",
                "1" if state == IDLE else f"{through:.4f} [{t_low:.4f}, {t_high:.4f}]",
                f"{r['host_us']:.0f}",
                f"{100 * r['host_share']:.3f} %",
            ]


HEAD = ["batch", "guard", "step, ms", "step / idle", "throughput / idle", "host, µs", "of step"]


def part_rows(results: Mapping[str, Any]) -> Iterator[list[str]]:
    """Return the rows of the second table: host time by part."""
    for batch, by_state in results["batches"].items():
        for state, r in by_state.items():
            if state not in (IDLE, "idle again"):
                parts = [f"{r['parts_us'].get(p, 0):.0f}" for p in PARTS[:-1]]
                yield [batch, state, *parts, f"{r.get('finish_us_per_request', 0):.0f}"]


PART_HEAD = ["batch", "guard", *PARTS[:-1], "finish, once a request"]


def markdown(results: Mapping[str, Any]) -> str:
    """Return the tables as Markdown, with the conditions above them."""
    m, a = results["machine"], results["arguments"]

    def table(head: list[str], rows: Iterator[list[str]]) -> list[str]:
        ruler = ["---", "---", *["---:"] * (len(head) - 2)]
        return [f"| {' | '.join(cells)} |" for cells in [head, ruler, *rows]]

    lines = [
        (
            f"{m['cpu']}, {m['cores']} cores, {m['torch_threads']} threads; "
            f"vLLM {results['versions']['vllm']}, torch {results['versions']['torch']}, float32, "
            "compiled; "
            f"{results['model']['parameters'] / 1e6:.0f}M parameters; {a['rounds']} rounds of "
            f"{a['steps']} decode steps a state; medians, 95 % bootstrap intervals over rounds; "
            f"{results['date'][:10]}, {results['revision']}."
        ),
        "",
        *table(HEAD, rows_of(results)),
        "",
        "Host time of the guard a step by part, µs:",
        "",
        *table(PART_HEAD, part_rows(results)),
        "",
        "Beside it, on the same rows and threads, outside the engine:",
        "",
        *table(
            ["rows", "what", "µs"],
            (
                [str(r["rows"]), what, f"{r[key]:.0f}"]
                for r in results["reference"]
                for what, key in (
                    (f"full encode, {LATENTS:,} latents", "full_us"),
                    ("32 watched rows", "watched_us"),
                )
            ),
        ),
        "",
        f"The op left in the graph of an idle engine: {results['idle_op_us']:.1f} µs a step.",
    ]
    return "\n".join(lines)


def show(results: Mapping[str, Any], console: Console) -> None:
    """Print the tables."""
    for title, head, rows in (
        ("Decode step", HEAD, rows_of(results)),
        ("Host time of the guard a step, µs", PART_HEAD, part_rows(results)),
    ):
        table = Table(*head, title=title)
        for row in rows:
            table.add_row(*row)
        console.print(table)
    for r in results["reference"]:
        console.print(
            f"{r['rows']} rows: full encode of {LATENTS:,} latents {r['full_us']:,.0f} µs, "
            f"32 watched rows {r['watched_us']:,.0f} µs"
        )
    console.print(f"op of an idle engine: {results['idle_op_us']:.1f} µs a step")


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = functools.partial(parser.add_argument, metavar="N")
    add("--batches", default="1,8,32", help="requests in a step, at most 32 (default 1,8,32)")
    add("--rounds", type=int, default=24, help="rounds; each runs every state once (default 24)")
    add("--steps", type=int, default=16, help="decode steps of a state in a round (default 16)")
    add("--tokens", type=int, default=32, help="prompt tokens of a request (default 32)")
    parser.add_argument("--markdown", action="store_true", help="print the tables as Markdown")
    parser.add_argument("--out", type=Path, help="JSON file (default results/overhead-<cpu>.json)")
    args = parser.parse_args()
    args.batches = [int(b) for b in args.batches.split(",")]
    if not all(1 <= b <= 32 for b in args.batches):
        parser.error("--batches: between 1 and 32")
    room = MAX_LENGTH - args.tokens - len(STATES) - 1
    if len(STATES) * args.steps > room:
        parser.error(f"--steps: at most {room // len(STATES)} with --tokens {args.tokens}")
    return args


def main() -> None:
    """Measure, print and write the results."""
    args = parse()
    console = Console(stderr=True)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="saeguard-overhead-") as folder, timed_parts():
        root = Path(folder)
        console.print("making a model and an SAE, starting vLLM: a minute or two")
        bench, about = build(root)
        batches: dict[str, Any] = {}
        with Progress(console=console) as progress:
            total = len(args.batches) * args.rounds * len(STATES)
            task = progress.add_task("measuring", total=total)
            for batch in args.batches:
                progress.update(task, description=f"batch {batch}")
                samples, said = measure(
                    bench, batch, args, functools.partial(progress.advance, task)
                )
                batches[str(batch)] = summarise(samples, batch, said)
        idle_op = float(np.mean([b[IDLE]["parts_us"].get("op", 0.0) for b in batches.values()]))
        results = {
            "machine": machine(),
            "versions": {
                "saeguard": version("saeguard"),
                "vllm": sys.modules["vllm"].__version__,
                "torch": torch.__version__,
                "numpy": np.__version__,
            },
            "arguments": {k: str(v) if k == "out" else v for k, v in vars(args).items()},
            "revision": revision(),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "model": about,
            "states": MEANING,
            "batches": batches,
            "reference": reference(root, args.batches),
            "idle_op_us": idle_op,
        }
        for guards in bench.guards.values():
            if guards.engine is not None:
                guards.engine.close()
    results["seconds"] = round(time.perf_counter() - began)
    slug = re.sub(r"[^a-z0-9]+", "-", results["machine"]["cpu"].lower()).strip("-")
    out = args.out or Path(__file__).parent / "results" / f"overhead-{slug}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(results, indent=2) + "\n")
    show(results, console)
    console.print(f"{results['seconds']} s; written to {out}")
    if args.markdown:
        print(markdown(results))


if __name__ == "__main__":
    main()
