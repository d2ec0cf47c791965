"""Two engine cores behind one API server: one account of all requests, whoever served them."""

from __future__ import annotations

import signal
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests import models
from tests.server.serving import Server, alive, serving

pytestmark = [pytest.mark.server, pytest.mark.engine, pytest.mark.ranks]

REQUESTS = 60


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Start two engine cores."""
    root = tmp_path_factory.mktemp("data-parallel")
    more = ("--data-parallel-size", "2", "--max-model-len", "512", "--enforce-eager")
    more += ("--event-lines", "all")
    with serving(root, models.make_guarded(root), *more) as running:
        yield running


def test_one_account_of_all_requests(server: Server) -> None:
    """Responses, events and `/metrics` say the same, and both cores have their part in it."""
    before = server.metrics()

    def ask(i: int) -> Any:
        words = " ".join(f"{i}" for _ in range(1 + i % 9))
        return server.chat(messages=[{"role": "user", "content": words}], max_tokens=8 + i % 20)

    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(ask, range(REQUESTS)))
    alone = [ask(i) for i in range(0, REQUESTS, 10)]
    for a, b in zip(answers[::10], alone, strict=True):  # whichever core it came from
        assert a.choices[0].message.content == b.choices[0].message.content
        assert [v["policy"] for v in a.saeguard["verdicts"]] == [
            v["policy"] for v in b.saeguard["verdicts"]
        ]
        assert a.saeguard["coverage"] == b.saeguard["coverage"]

    answers += alone
    deadline = time.monotonic() + 30
    while len(server.told()) < len(answers) * server.policies and time.monotonic() < deadline:
        time.sleep(0.1)
    told = server.told()
    once = Counter((e["request_id"], e["policy"]) for e in told)
    assert set(once.values()) == {1}
    for answer in answers:
        mine = {e["policy"]: e for e in told if answer.id in e["request_id"]}
        assert len(mine) == server.policies
        assert {v["policy"] for v in answer.saeguard["verdicts"]} == {
            name for name, e in mine.items() if e["acted"] == "flag"
        }
    after = server.metrics()
    moved = {name: n - before.get(name, 0) for name, n in after.items()}
    assert moved["saeguard_requests_total"] == len(answers)
    assert moved["saeguard_tokens_total,state=evaluated"] == sum(
        a.saeguard["coverage"]["evaluated"] for a in answers
    )
    outcomes = Counter((e["policy"], e["verdict"]) for e in told)
    for (policy, verdict), n in outcomes.items():
        name = f"saeguard_verdicts_total,mode=enforce,policy={policy},verdict={verdict}"
        assert moved[name] == n
    served = server.metrics("vllm:request_success_total")
    for core in ("0", "1"):
        assert sum(n for name, n in served.items() if f",engine={core}," in name) > 5, served
    assert server.log.read_text().count("saeguard ready") == 2


def test_a_clean_end(server: Server) -> None:
    """SIGTERM ends both cores, with every event of both in the one file."""
    before = len(server.told())
    answers = [server.chat(max_tokens=5 + i) for i in range(4)]
    server.process.send_signal(signal.SIGTERM)
    server.process.wait(60)
    assert len(server.told()) - before == len(answers) * server.policies
    deadline = time.monotonic() + 20
    while (left := alive(server.process.pid)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not left
