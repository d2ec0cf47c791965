"""How many texts a second each engine of `saeguard scan` judges, side by side in one run.

Both engines are loaded in one process tree, and take turns: in each round every engine judges the
same texts, which none has seen before. So other work on the machine slows both. See README.md
beside this file.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

from saeguard.api import load_watchlist
from saeguard.cli.engines import EngineChoice, open_engine
from saeguard.features.model_fit import read_shape
from saeguard.hf.model import load_tokenizer
from saeguard.hf.readings import Engine, see_texts
from saeguard.hf.texts import Text, make_text
from tests import models

ROOT = Path(__file__).parents[1]
SYSTEM = "You are a careful assistant. Answer what is asked, and say so if you do not know."
LATENTS = 32


def pieces(words: int) -> list[str]:
    """Return the documentation's text in pieces of about `words` words."""
    pages = sorted((ROOT / "docs").glob("*.md"))
    found = re.findall(r"\S+", " ".join(page.read_text(encoding="utf-8") for page in pages))
    return [" ".join(found[i : i + words]) for i in range(0, len(found) - words, words)]


def texts_of(tokenizer: Any, count: int, words: int) -> list[Text]:
    """Return chats with one system prompt, each with a piece of the documentation as its answer."""
    made = []
    for i, piece in enumerate(pieces(words)[:count]):
        chat = [("system", SYSTEM), ("user", f"Go on, part {i}.")]
        made.append(make_text(str(i), tokenizer, chat, piece))
    if len(made) < count:
        raise SystemExit(f"the documentation gives {len(made)} texts of {words} words, not {count}")
    return made


def guarded(folder: Path, model: Path, latents: int, high: float) -> tuple[Path, Path]:
    """Make a random SAE at the middle layer, a feature set and policies over it.

    Args:
        folder: for the files.
        model: folder of the model.
        latents: of the SAE.
        high: activation that is a share of 1.
    """
    shape = read_shape(model)
    layer = shape.num_layers // 2
    sae = models.make_sae(folder / "sae", layer=layer, d_in=shape.hidden_size, d_sae=latents)
    watched = tuple(range(0, LATENTS * 4, 4))
    sets = folder / "feature_sets"
    models.write_feature_set(
        sets / "tiny.yaml", sae, latents=watched, layers=shape.num_layers, high=high
    )
    models.random_policies(folder / "policies", watched, count=8)
    return sets, folder / "policies"


def judge(
    engine: Engine, watchlist: Any, tokenizer: Any, texts: Sequence[Text]
) -> tuple[float, list[tuple[str, float]]]:
    """Judge texts; return the seconds it took, and the outcome and score of each verdict."""
    began = time.monotonic()
    found = []
    for _, seen in see_texts(engine, watchlist, tokenizer, texts):
        found += [(v.outcome, v.score or 0.0) for v in seen.judge(watchlist.rules)]
    assert len(found) == len(texts) * len(watchlist.policies)
    return time.monotonic() - began, found


def differences(
    found: Sequence[tuple[str, float]], first: Sequence[tuple[str, float]]
) -> dict[str, Any]:
    """Return how verdicts differ from those of the first engine on the same texts."""
    change = np.abs([a[1] - b[1] for a, b in zip(found, first, strict=True)])
    changed = sum(a[0] != b[0] for a, b in zip(found, first, strict=True))
    low, high = np.quantile(change, [0.5, 0.99])
    return {
        "verdicts": len(found),
        "changed": changed,
        "score_median": float(f"{low:.3g}"),
        "score_p99": float(f"{high:.3g}"),
        "score_most": float(f"{change.max():.3g}"),
    }


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Load every engine, let them take turns, and return the figures."""
    tokenizer = load_tokenizer(args.model)
    sets, policies = guarded(folder, args.model, args.latents, args.high)
    watchlist = load_watchlist(policies, sets)
    per_round = args.texts
    texts = texts_of(tokenizer, per_round * (args.rounds + 1), args.words)
    engines: dict[str, Engine] = {}
    verdicts: dict[str, list[tuple[str, float]]] = {}
    states: dict[str, dict[str, Any]] = {}
    for name in args.engines:
        engine, dtype = name.split(":")
        choice = EngineChoice(engine, dtype, vllm_args=args.vllm_args if engine == "vllm" else "")
        began = time.monotonic()
        engines[name] = open_engine(choice, args.model, tokenizer, sets, watchlist.features)
        states[name] = {"start_s": round(time.monotonic() - began, 3), "seconds": []}
        judge(engines[name], watchlist, tokenizer, texts[:per_round])  # warm
    for r in range(1, args.rounds + 1):
        batch = texts[r * per_round : (r + 1) * per_round]
        for name, engine in engines.items():
            taken, found = judge(engine, watchlist, tokenizer, batch)
            verdicts.setdefault(name, []).extend(found)
            states[name]["seconds"].append(round(taken, 3))
    for engine in engines.values():
        engine.close()
    tokens = [
        sum(len(text.tokens) for text in texts[r * per_round : (r + 1) * per_round])
        for r in range(1, args.rounds + 1)
    ]
    for state in states.values():
        total = sum(state["seconds"])
        state["texts_per_s"] = round(per_round * args.rounds / total, 2)
        state["tokens_per_s"] = round(sum(tokens) / total, 1)
    ratios = {
        name: [
            round(a / b, 2)
            for a, b in zip(states[args.engines[0]]["seconds"], state["seconds"], strict=True)
        ]
        for name, state in states.items()
    }
    return {
        "engines": states,
        "times_faster_than_first": ratios,
        "differs_from_first": {
            name: differences(found, verdicts[args.engines[0]]) for name, found in verdicts.items()
        },
        "tokens_a_text": round(float(np.mean([len(text.tokens) for text in texts])), 1),
        "rounds": args.rounds,
        "texts_a_round": per_round,
        "policies": len(watchlist.policies),
        "latents": {"watched": LATENTS, "sae": args.latents},
    }


def conditions(args: argparse.Namespace) -> dict[str, Any]:
    """Return what the figures hold for."""
    git = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    return {
        "model": args.model.resolve().name,
        "machine": platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": os.environ.get("OMP_NUM_THREADS", "default"),
        "load": round(os.getloadavg()[0], 1),
        "vllm_args": args.vllm_args,
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "revision": subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip(),
        "date": datetime.now(UTC).date().isoformat(),
    }


def main() -> None:
    """Measure, print a table, write the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="folder of a model; none with --tiny")
    parser.add_argument("--texts", type=int, default=64, help="of a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--words", type=int, default=120, help="of an answer")
    parser.add_argument("--latents", type=int, default=8192, help="of the random SAE")
    parser.add_argument("--high", type=float, default=50, help="activation that is a share of 1")
    parser.add_argument(
        "--engines", nargs="+",
        default=["transformers:float32", "transformers:bfloat16", "vllm:float32", "vllm:bfloat16"],
        help="engine:dtype, the first is what the others are compared with",
    )  # fmt: skip
    parser.add_argument("--vllm-args", default="--max-model-len 1024")
    parser.add_argument("--tiny", action="store_true", help="the least that shows that it works")
    parser.add_argument("--out", type=Path, help="JSON file")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if args.tiny:
            args.model = models.make_model("llama", folder / "model")
            args.texts, args.rounds, args.words, args.latents = 2, 1, 10, 256
            args.engines = ["transformers:float32", "vllm:float32"]
            args.vllm_args = "--enforce-eager --max-model-len 300"
        if args.model is None:
            parser.error("--model: give the folder of a model")
        result = {**conditions(args), **measure(args, folder)}
    table = Table("engine", "start, s", "texts/s", "tokens/s", f"times {args.engines[0]}")
    for state, figures in result["engines"].items():
        ratio = ", ".join(map(str, result["times_faster_than_first"][state]))
        shown = (figures["start_s"], figures["texts_per_s"], figures["tokens_per_s"], ratio)
        table.add_row(state, *map(str, shown))
    Console().print(table)
    Console().print_json(data=result["differs_from_first"])
    if args.out is not None:
        args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
