"""Random mixes of requests on one real engine: every verdict and count is the reference's.

Requests share prefixes, come and go at random steps, are cut into chunks, preempted by a KV
cache that is too small for them, sampled several at a time, aborted, stopped by policies and
clamped beside each other. Each ended request is held against Transformers and SAELens.
`SAEGUARD_STORM=10000` sets how many requests are served (`make storm`).
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from saeguard.guard.judge import judge_text
from saeguard.guard.watchlist import WatchList
from tests import models
from tests.engine import engines

pytestmark = pytest.mark.engine

WHY_SKIPPED = {"not_forwarded", "special_token", "aborted"}
"""Reasons for which a token of a storm's request may not be evaluated."""
MARGIN = 1e-3
"""Around the threshold: within it either verdict is right, float32 sums differ in order."""
MOST = int(os.environ.get("SAEGUARD_STORM", "0"))
MIX = 20
"""Requests in a mix."""
STEMS = [[1, *row] for row in np.random.default_rng(21).integers(3, 512, (4, 120)).tolist()]
"""What prompts begin with."""


@dataclass
class Tally:
    """What was compared, and how far apart it was."""

    requests: int = 0
    verdicts: int = 0
    near: int = 0
    """Verdicts within the margin, which are not compared."""
    gap: float = 0.0
    seen: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        """Say it in one line."""
        return (
            f"{self.requests} requests, {self.verdicts} verdicts compared, {self.near} within "
            f"{MARGIN} of the threshold, largest difference of a score {self.gap:.1e}; "
            + ", ".join(f"{n} {what}" for what, n in sorted(self.seen.items()))
        )


class Live:
    """An engine in a child process, and the reference for what it serves."""

    stops_above = (7.0, 8.7)
    """Shares at which its policies stop a request, in output and prompt."""

    def __init__(
        self,
        root: Path,
        engine: dict[str, Any],
        *,
        v2: bool = False,
        environment: dict[str, str] | None = None,
    ) -> None:
        """Start the engine."""
        self.events = root / "events.jsonl"
        given = self.prepare(root)
        self.watchlist: WatchList = engines.compile_policies(given)
        job = root / "engine.json"
        job.write_text(json.dumps({
            "model": str(self.guarded.model), "dtype": "float32", "seed": 0,
            "skip_tokenizer_init": True, "max_model_len": 192, "max_num_seqs": 6,
            "max_num_batched_tokens": 64, "enforce_eager": True,
            "additional_config": {"saeguard": given}, **engine,
        }))  # fmt: skip
        self.tally = Tally()
        self.cached = 0
        """Most tokens that a request of the last mix read from the prefix cache."""
        self.reloads: list[dict[str, Any]] = []
        self._read = 0
        ours, theirs = socket.socketpair()
        self._log = (root / "engine.log").open("w+")
        self._child = subprocess.Popen(
            [sys.executable, "-m", "tests.engine.live", str(job), str(theirs.fileno())],
            cwd=engines.ROOT, env={**engines.environment(v2=v2), **(environment or {})},
            pass_fds=[theirs.fileno()], stdout=self._log, stderr=self._log,
        )  # fmt: skip
        theirs.close()
        self._socket, self._lines = ours, ours.makefile("rw")
        assert self._hear() == {"ready": True}

    def prepare(self, root: Path) -> dict[str, Any]:
        """Make random policies, two that stop and one that clamps; return the guard's settings."""
        self.guarded = models.make_guarded(root, most=7.0)
        output, prompt = self.stops_above
        detect = {"a": {"feature": "f4", "above": output}}
        more = {"condition": "a", "action": "stop", "on_error": "stop"}
        models.write_policy(self.guarded.policies / "s.yaml", id="stop.output", scope="output",
                            detect=detect, **more)  # fmt: skip
        models.write_policy(self.guarded.policies / "t.yaml", id="stop.prompt", scope="prompt",
                            detect={"a": {"feature": "f8", "above": prompt}}, **more)  # fmt: skip
        models.write_policy(
            self.guarded.policies / "c.yaml", id="test.clamp", mode="shadow", action="clamp",
            detect={"a": {"feature": "f12", "above": 0.5}}, condition="a",
            clamp={"features": ["f12"], "to": -6.0},
        )  # fmt: skip
        self.reference = engines.Reference(self.guarded.model, self.guarded.sae)
        return self.guarded.settings(events=str(self.events), request_may_enforce=["test.clamp"])

    def shares(self, tokens: list[int], ended: dict[str, Any]) -> np.ndarray | None:
        """Return the reference's [tokens, features]; None where it cannot tell."""
        if ended["enforced"]:
            return None  # under a clamp; tests/engine/test_clamp.py has the reference
        columns = [int(name.rsplit("/f", 1)[1]) for name in self.watchlist.features]
        return self.reference.latents(tokens)[:, columns].astype(np.float32)

    def recognise(self, events: dict[str, Any]) -> None:
        """Make the list that judged a request `watchlist`, where it can be another."""

    def _hear(self) -> dict[str, Any]:
        line = self._lines.readline()
        if not line:
            self._child.wait(60)
            self._log.seek(0)
            raise AssertionError(self._log.read()[-6000:])
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """Hang up, upon which the engine ends."""
        self._socket.shutdown(socket.SHUT_RDWR)
        self._child.wait(60)

    def serve(self, mix: list[dict[str, Any]], *, reset: bool = False) -> Any:
        """Serve a mix and check every verdict, count and end of it; return what clients got."""
        return self.ask("mix", mix=mix, reset=reset)["said"]

    def ask(self, what: str, **more: Any) -> dict[str, Any]:
        """Have the child do something, see `tests/engine/live.py`, and check what it served."""
        with suppress(BrokenPipeError):  # what the child died of is said by `_hear`
            print(json.dumps({"what": what, **more}), file=self._lines, flush=True)
        answer = self._hear()
        assert (answer["left"], answer["dropped"]) == (0, 0)
        self.cached = int(answer["cached"])
        self.tally.seen["cached"] += bool(self.cached)
        with self.events.open() as file:
            file.seek(self._read)
            lines = file.readlines()
            self._read = file.tell()
        events: dict[str, dict[str, Any]] = {}
        requests: dict[str, dict[str, Any]] = {}
        for event in map(json.loads, lines):
            if event["event"] == "policy.reload":
                self.reloads.append(event)
                continue
            if event["event"] == "request":
                assert event["request_id"] not in requests
                requests[event["request_id"]] = event
                continue
            assert event["event"] == "verdict", event
            events.setdefault(event["request_id"], {})[event["policy"]] = event
        assert set(events) == set(requests) == set(answer["ended"])
        for request_id, event in requests.items():
            mine = events[request_id].values()
            assert event["verdicts"] == Counter(e["verdict"] for e in mine)
            assert event["coverage"] == _whole_coverage(events[request_id])
        for request_id, ended in answer["ended"].items():
            self.check(ended, events[request_id])
        return answer

    def check(self, ended: dict[str, Any], events: dict[str, Any]) -> None:
        """Hold one ended request and its events by policy against the reference."""
        tokens, prompt = ended["tokens"], ended["prompt"]
        self.recognise(events)
        assert set(events) == {p.id for p in self.watchlist.policies}
        whole = _whole_coverage(events)
        for event in events.values():
            assert set(event["coverage"]["skipped"]) <= WHY_SKIPPED, event
        unread = sum(whole["skipped"].get(why, 0) for why in ("aborted", "not_forwarded"))
        seen = len(tokens) - unread
        excluded = np.isin(tokens[:seen], self.watchlist.exclude_tokens)
        assert whole["tokens"] == len(tokens)
        assert whole["evaluated"] == int((~excluded).sum()), (whole, ended)
        self.tally.requests += 1
        self.tally.seen["preempted"] += bool(ended["preempted"])
        early = ended["why"] in ("abort", "error")
        self.tally.seen["aborted"] += ended["why"] == "abort"
        stopped = str(ended["stop_reason"] or "").removeprefix("saeguard:")
        self.tally.seen["stopped"] += bool(stopped)
        if not early and not stopped:
            assert unread <= 1, (whole, ended)
        shares = self.shares(tokens[:seen], ended) if seen else None
        if shares is None:
            return
        for verdict in judge_text(self.watchlist.rules, shares, ~excluded, prompt):
            event = events[verdict.policy]
            if verdict.score is not None:
                self.tally.gap = max(self.tally.gap, abs(verdict.score - event["score"]))
                if abs(verdict.score - 1) < MARGIN:
                    self.tally.near += 1
                    continue
            self.tally.verdicts += 1
            assert (event["verdict"], event["first_token"], event["matched_tokens"]) == (
                verdict.outcome, verdict.first_token, verdict.matched_tokens
            ), (verdict, event, ended)  # fmt: skip
            if verdict.policy == stopped:
                at = verdict.first_token
                assert at is not None
                assert len(tokens) == max(at + 1, prompt), (verdict, ended)
            elif verdict.action == "stop" and verdict.outcome == "match":
                # Not what ended it: another one stopped it at the same token, or the client left.
                assert stopped or early, (verdict, ended)
        assert self.tally.gap < MARGIN


def _whole_coverage(events: dict[str, Any]) -> dict[str, Any]:
    """Return the coverage of a policy that looks at all of a request."""
    coverage: dict[str, Any] = max(
        (e["coverage"] for e in events.values()), key=lambda c: c["tokens"]
    )
    assert coverage["evaluated"] + sum(coverage["skipped"].values()) == coverage["tokens"]
    for event in events.values():
        own = event["coverage"]
        assert own["evaluated"] + sum(own["skipped"].values()) == own["tokens"], event
    return coverage


L = TypeVar("L", bound=Live)


@st.composite
def mixes(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Draw a mix of requests."""
    count = draw(st.integers(4, MIX))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    busy = draw(st.integers(1, 12))
    mix = []
    for _ in range(count):
        stem = STEMS[int(rng.integers(len(STEMS)))]
        shared = stem[: int(rng.choice([0, 1, 17, 33, 64, 80, 97, 120]))]
        own = rng.integers(3, 512, int(rng.choice([1, 2, 5, 20, 40]))).tolist()
        params: dict[str, Any] = {
            "temperature": 0.0,
            "max_tokens": int(rng.choice([1, 2, 8, 24])),
            "ignore_eos": bool(rng.random() < 0.8),
        }
        kind = rng.random()
        if kind < 0.12:
            params |= {"n": int(rng.integers(2, 4)), "temperature": 1.0}
        elif kind < 0.24:
            params["extra_args"] = {"saeguard_enforce": "test.clamp"}
        elif kind < 0.3:
            params["prompt_logprobs"] = 1  # reads no prefix
        mix.append({
            "step": int(rng.integers(0, 1 + count // busy * 4)),
            "prompt": shared + own,
            "params": params,
            "leaves": int(rng.integers(0, 12)) if rng.random() < 0.12 else None,
            "salt": "tenant" if rng.random() < 0.1 else None,
        })  # fmt: skip
    return mix


@contextmanager
def living(root: Path, engine: dict[str, Any], kind: type[L] = Live, **more: Any) -> Iterator[L]:  # type: ignore[assignment]
    """Run a live engine and say what it has shown at the end."""
    live = kind(root, engine, **more)
    try:
        yield live
    finally:
        live.close()
        print(f"\n{root.name}: {live.tally}")


def storm(live: Live, requests: int, seed: int = 0) -> None:
    """Serve mixes until so many requests have ended."""

    @settings(
        max_examples=max(2, requests // 12),  # of 1 to MIX requests, some of several samples
        derandomize=seed == 0,
        deadline=None,
        database=None,
        phases=[Phase.generate],  # an engine has a history: a mix alone is no example
        suppress_health_check=list(HealthCheck),
    )
    @given(mixes(), st.booleans())
    def serve(mix: list[dict[str, Any]], reset: bool) -> None:
        live.serve(mix, reset=reset and len(mix) % 5 == 0)

    while live.tally.requests < requests:
        serve()


SMALL_CACHE = {"block_size": 32, "num_gpu_blocks_override": 10}
"""320 tokens for six requests of up to 192: most mixes preempt."""
NGRAM = {
    "method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2, "prompt_lookup_min": 1
}  # fmt: skip


@pytest.fixture(scope="module")
def v1(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """An engine on Model Runner V1."""
    with living(tmp_path_factory.mktemp("v1"), SMALL_CACHE) as live:
        yield live


def test_what_an_aborted_request_computed_is_seen(v1: Live) -> None:
    """Its client leaves while its prompt is in the forward; the next one reads that KV."""
    prompt = np.random.default_rng(5).integers(3, 512, 100).tolist()
    params = {"temperature": 0.0, "max_tokens": 4, "ignore_eos": True}
    leaving = {"step": 0, "prompt": prompt, "params": params, "leaves": 0}
    v1.serve([leaving, {**leaving, "step": 1, "leaves": None}], reset=True)
    assert v1.cached == 64
    assert v1.tally.seen["aborted"]


def test_a_request_that_ends_in_error(v1: Live) -> None:
    """Within the scheduler's update, which the guard is around, beside others that go on."""
    prompts = engines.random_prompts(4, seed=6, longest=60)
    mix = [{"step": 0, "prompt": p, "params": {**engines.GREEDY}} for p in prompts]
    ended = v1.ask("mix", mix=mix, between={"3": "fail", "5": "fail"})["ended"].values()
    assert sum(e["why"] == "error" for e in ended) == 2


def test_model_runner_v1(v1: Live) -> None:
    """Thousands of requests at night, hundreds in CI."""
    storm(v1, MOST or 600)
    for what in ("preempted", "aborted", "stopped", "cached"):
        assert v1.tally.seen[what] > 1, what


@pytest.fixture(scope="module")
def drafting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """An engine with n-gram drafts."""
    root = tmp_path_factory.mktemp("drafting")
    with living(root, {**SMALL_CACHE, "speculative_config": NGRAM}) as live:
        yield live


def test_clients_leave_among_their_drafts(drafting: Live) -> None:
    """In the middle of a step, when the forward has read drafts that nobody will accept."""
    prompts = [([n, n + 1, n + 2] * 20)[: 50 + n] for n in range(3, 11)]
    mix = [
        {"step": 0, "prompt": p, "params": {**engines.GREEDY, "max_tokens": 30}, "leaves": 2 * i}
        for i, p in enumerate(prompts)
    ]
    drafting.serve(mix)
    assert drafting.tally.seen["aborted"] > 4


def test_speculative_decoding(drafting: Live) -> None:
    """With n-gram drafts, some of which reach behind what ends their request."""
    storm(drafting, MOST // 5 or 150)


@pytest.mark.slow
def test_speculative_decoding_on_model_runner_v2(tmp_path: Path) -> None:
    """Its drafts are made and checked on the device, here in Triton's interpreter."""
    with living(tmp_path, {**SMALL_CACHE, "speculative_config": NGRAM}, v2=True) as live:
        storm(live, MOST // 50 or 20)


def test_model_runner_v2(tmp_path: Path) -> None:
    """The runner of GPUs, through Triton's interpreter."""
    with living(tmp_path, SMALL_CACHE, v2=True) as live:
        storm(live, MOST // 20 or 20)
