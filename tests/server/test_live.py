"""A server whose policies are signed, change, and hold for some: what operators and tenants see."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import vllm
import yaml

from saeguard.events.metrics import GAUGES, METRICS
from saeguard.features.load import load_feature_set
from saeguard.policy import signing, signing_keys
from saeguard.policy.load import load_policies
from saeguard.vllm.engine_core.telemetry import COUNTERS
from tests import models
from tests.engine import engines
from tests.server.serving import Server, environment, free_port, serving

pytestmark = [pytest.mark.server, pytest.mark.engine]

PRIVATE, PUBLIC = signing_keys.keygen()
ALWAYS = {"detect": {"a": {"feature": "f0", "above": 0.01}}, "condition": "a"}
EXCEPTION = {
    "id": "drill", "reason": "a drill", "owner": "rt@example.com", "expires": date(2099, 1, 1),
    "tenant": "red-team",
}  # fmt: skip


@dataclass
class Live:
    """The server, and what its operator has."""

    server: Server
    root: Path
    revision: int = 1

    def sign(self) -> None:
        """Sign the policies as they are, under the next revision."""
        folder = self.server.guarded.policies
        sign(self.server.guarded, self.revision + 1)
        self.revision += 1
        assert (folder / signing.BUNDLE).exists()

    def reload(self) -> subprocess.CompletedProcess[str]:
        """Run `saeguard reload`."""
        return subprocess.run(
            [sys.executable, "-m", "saeguard", "reload", str(self.root / "state")],
            env=environment(), capture_output=True, text=True, check=False, timeout=120,
        )  # fmt: skip

    def until(self, what: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """Wait for an event."""
        for _ in range(600):
            for event in self.server.lines():
                if what(event):
                    return event
            time.sleep(0.1)
        raise AssertionError(self.server.log.read_text()[-3000:])

    def metrics_when(self, what: Callable[[dict[str, float]], bool]) -> dict[str, float]:
        """Wait until `/metrics` says something; no request is sent to the model."""
        for _ in range(300):
            if what(found := self.server.metrics()):
                return found
            time.sleep(0.1)
        raise AssertionError(found)

    def client(self, key: str) -> openai.OpenAI:
        """Return a client with an API key of its own."""
        return self.server.client.with_options(api_key=key)

    def ask(self, key: str = "none", **more: Any) -> tuple[Any, dict[str, dict[str, Any]]]:
        """Ask with a key; return the answer, and its events by policy."""
        answer = self.client(key).chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "hello"}], max_tokens=4,
            temperature=0, **more,
        )  # fmt: skip
        for _ in range(100):
            told = [e for e in self.server.told() if answer.id in e.get("request_id", "")]
            if len(told) == answer.saeguard["policies"]:
                break
            time.sleep(0.05)
        return answer, {e["policy"]: e for e in told}


def sign(guarded: models.Guarded, revision: int) -> None:
    """Sign a folder of policies."""
    digests = {"tiny": load_feature_set(guarded.feature_sets / "tiny.yaml").digest}
    policies = load_policies(guarded.policies)
    signing.sign(guarded.policies, policies, digests, revision, PRIVATE)


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """Start it."""
    root = tmp_path_factory.mktemp("live")
    guarded = models.make_guarded(root)
    models.write_policy(guarded.policies / "b.yaml", id="bank.only", **ALWAYS)
    models.write_policy(guarded.policies / "d.yaml", id="drilled", exceptions=[EXCEPTION], **ALWAYS)
    models.write_policy(guarded.policies / "s.yaml", id="strict", mode="shadow", **ALWAYS)
    sign(guarded, 1)
    (root / "key.pub").write_bytes(PUBLIC)
    tenants = {
        name: hashlib.sha256(f"{name}-key".encode()).hexdigest() for name in ("bank", "red-team")
    }
    (root / "access.yaml").write_text(
        "schema: saeguard.access/v1\ntenants:\n"
        + "".join(f"  {name}: {{keys_sha256: [{key}]}}\n" for name, key in tenants.items())
        + "rules:\n"
        "  - {policies: [bank.*], tenants: [bank], how: only}\n"
        "  - {policies: [strict], tenants: [bank], how: may_enforce}\n"
    )
    more = ["--state", str(root / "state"), "--access", str(root / "access.yaml")]
    more += ["--verify", str(root / "key.pub"), "--enforce-eager", "--max-model-len", "512"]
    more += ["--event-lines", "all"]
    before = engines.compile_policies

    def known(settings: dict[str, Any]) -> Any:
        return before({**settings, "access": str(root / "access.yaml")})

    engines.compile_policies = known
    try:
        with serving(root, guarded, *more) as server:
            yield Live(server, root)
    finally:
        engines.compile_policies = before


def test_before_the_first_request(live: Live) -> None:
    """Every series is there, at 0: the first match is an increase, and a dead guard has none."""
    found = live.metrics_when(lambda m: "saeguard_requests_total" in m)
    assert found["saeguard_requests_total"] == 0
    for policy in load_policies(live.server.guarded.policies):
        for mode in {policy.mode, "enforce"} if policy.id == "strict" else {policy.mode}:
            for verdict in ("match", "no_match", "error", "not_evaluated"):
                labels = f"mode={mode},policy={policy.id},verdict={verdict}"
                assert found[f"saeguard_verdicts_total,{labels}"] == 0
            if mode == "enforce":
                labels = f"action={policy.action},mode=enforce,policy={policy.id}"
                assert found[f"saeguard_actions_total,{labels}"] == 0
    for name, labels in COUNTERS.items():
        (label,) = METRICS[name][1] or ("",)
        for series in [f",{label}={value}" for value in labels] or [""]:
            first = 1 if series == ",outcome=unchanged" else 0  # the reading at the start
            assert found[f"saeguard_{name}_total{series}"] in {0, first}
    assert found["saeguard_step_seconds_count"] > 0  # of the self-test
    build = f"version={metadata.version('saeguard')},vllm={vllm.__version__}"
    assert found[f"saeguard_build_info,{build}"] == 1
    assert found["saeguard_policies_current,engine=0"] == 1
    assert found["saeguard_policies_compared_only,engine=0"] == 0
    assert found["saeguard_policies,engine=0,mode=shadow"] == 1
    at = "saeguard_report_timestamp_seconds,engine=0"
    assert live.metrics_when(lambda m: m[at] > found[at])[at] > time.time() - 60


def test_a_prometheus_scrapes_it(live: Live, tmp_path: Path) -> None:
    """A real one finds every series of the alerts and the dashboard, and loads the rules."""
    program = shutil.which("prometheus")
    if program is None:
        pytest.skip("prometheus is not installed: apt-get install prometheus")
    deploy = Path(__file__).parents[2] / "deploy" / "prometheus"
    config = yaml.safe_load((deploy / "prometheus.yaml").read_text())
    target = str(live.server.client.base_url).removeprefix("http://").split("/")[0]
    config["scrape_configs"][0]["static_configs"][0]["targets"] = [target]
    config["scrape_configs"][0]["scrape_interval"] = "1s"
    config["rule_files"] = [str(deploy / "alerts.yaml")]
    (tmp_path / "prometheus.yaml").write_text(yaml.safe_dump(config))
    port = free_port()
    process = subprocess.Popen(
        [program, "--config.file", tmp_path / "prometheus.yaml", "--storage.tsdb.path",
         tmp_path / "data", "--web.listen-address", f"127.0.0.1:{port}"],
        stdout=subprocess.DEVNULL, stderr=(tmp_path / "log").open("w"),
    )  # fmt: skip
    try:
        wanted = {
            *(f"saeguard_{name}_total" for name in METRICS), "saeguard_step_seconds_bucket",
            *(f"saeguard_{name}" for name in GAUGES),
        }  # fmt: skip
        found: set[str] = set()
        for _ in range(300):
            try:
                names = httpx.get(f"http://127.0.0.1:{port}/api/v1/label/__name__/values").json()
                found = set(names.get("data", ()))
            except (httpx.HTTPError, ValueError):
                found = set()
            if found >= wanted:
                break
            time.sleep(0.1)
        assert wanted - found == set(), (tmp_path / "log").read_text()[-3000:]
        rules = httpx.get(f"http://127.0.0.1:{port}/api/v1/rules").json()["data"]["groups"]
        assert {rule["health"] for rule in rules[0]["rules"]} <= {"ok", "unknown"}
    finally:
        process.terminate()
        process.wait(10)


def test_counters_without_traffic(live: Live) -> None:
    """A refused file, its repair, and events that have been written show without a request."""
    current = "saeguard_policies_current,engine=0"
    refused = "saeguard_reloads_total,outcome=refused"
    policy = live.server.guarded.policies / "s.yaml"
    good, before = policy.read_bytes(), live.metrics_when(lambda m: m[current] == 1)
    broken = live.root / "broken.yaml"
    broken.write_bytes(good + b"oops")
    broken.replace(policy)  # at once, so that it is refused once
    assert live.metrics_when(lambda m: m[current] == 0)[refused] == before[refused] + 1
    policy.write_bytes(good)
    after = live.metrics_when(lambda m: m[current] == 1)
    states = ("produced", "written", "dropped")
    after = live.metrics_when(lambda m: m["saeguard_events_total,state=written"] ==
                              len(live.server.lines()))  # fmt: skip
    produced, written, dropped = (after[f"saeguard_events_total,state={s}"] for s in states)
    assert (produced, dropped) == (written, 0)


def test_whose_policies(live: Live) -> None:
    """The API key says whose request it is; the policies of others say nothing of it."""
    answer, told = live.ask()
    assert "bank.only" not in told
    assert {e["tenant"] for e in told.values()} == {None}
    assert answer.saeguard["policies"] == len(told)
    answer, told = live.ask("bank-key")
    assert told["bank.only"]["acted"] == "flag"
    assert {e["tenant"] for e in told.values()} == {"bank"}
    assert "bank.only" in {v["policy"] for v in answer.saeguard["verdicts"]}


def test_an_exception_waives_the_action(live: Live) -> None:
    """Of its tenant; the verdict is reached and told all the same."""
    for key, acted, exception in (("red-team-key", None, "drill"), ("bank-key", "flag", None)):
        answer, told = live.ask(key)
        event = told["drilled"]
        assert (event["verdict"], event["mode"]) == ("match", "enforce")
        assert (event["acted"], event["exception"]) == (acted, exception)
        shown = {v["policy"] for v in answer.saeguard["verdicts"]}
        assert ("drilled" in shown) is (acted is not None)


def test_a_request_may_ask_for_more_where_it_may(live: Live) -> None:
    """A tenant's right is not another's, and nobody may ask for less: 400, and an event."""
    strict = {"extra_body": {"vllm_xargs": {"saeguard_enforce": "strict"}}}
    _, told = live.ask("bank-key", **strict)
    assert (told["strict"]["mode"], told["strict"]["acted"]) == ("enforce", "flag")
    refused = [
        ("red-team-key", {"saeguard_enforce": "strict"}, "not a policy that these requests may"),
        ("bank-key", {"saeguard_enforce": "drilled"}, "allowed: strict"),
        ("none", {"saeguard_off": 1}, "can become stricter, never less strict"),
        ("none", {"saeguard_tenant": "red-team"}, 'unknown key "saeguard_tenant"'),
    ]
    for key, xargs, reason in refused:
        with pytest.raises(openai.BadRequestError, match=reason):
            live.ask(key, extra_body={"vllm_xargs": xargs})
    told_ = [live.until(lambda e, r=reason: r in e.get("reason", "")) for *_, reason in refused]  # type: ignore[misc]
    assert [e["tenant"] for e in told_] == ["red-team", "bank", None, None]
    assert {e["event"] for e in told_} == {"request.refused"}
    assert live.server.metrics()["saeguard_refusals_total"] == len(refused)


def test_a_tenant_cannot_be_forged_on_any_route(live: Live) -> None:
    """Extra arguments reach the engine by other routes too; whose a request is they never say."""
    base = str(live.server.client.base_url)
    xargs = {"vllm_xargs": {"saeguard_tenant": "red-team"}}
    for route, body in (
        ("completions", {"prompt": "hello", "max_tokens": 3}),
        ("responses", {"input": "hello", "max_output_tokens": 16}),
        ("messages", {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}),
    ):
        httpx.post(base + route, json={"model": "tiny", **body, **xargs}, timeout=60)
    live.ask()
    forged = [e for e in live.server.lines() if e.get("tenant") == "red-team"]
    assert {e["event"] for e in forged} <= {"request", "verdict", "request.refused"}
    assert all(e["exception"] == "drill" for e in forged if e.get("policy") == "drilled")
    since = [e for e in live.server.told() if e["event"] == "verdict"][-8:]
    assert {e["tenant"] for e in since} == {None}


def test_reload_by_command(live: Live) -> None:
    """An unsigned change is refused with its reason, a signed one comes into use; no restart."""
    policy = live.server.guarded.policies / "s.yaml"
    models.write_policy(policy, id="strict", mode="enforce", **ALWAYS)
    done = live.reload()
    assert done.returncode == 1, done
    assert "s.yaml: found sha256" in done.stderr
    answer, told = live.ask()
    assert told["strict"]["mode"] == "shadow"
    assert live.server.metrics()["saeguard_policies_current,engine=0"] == 0
    live.sign()
    done = live.reload()
    assert done.returncode == 0, done
    assert f"revision {live.revision}" in done.stdout
    later, told = live.ask()
    assert told["strict"]["mode"] == "enforce"
    assert later.saeguard["watchlist"] != answer.saeguard["watchlist"]
    assert later.saeguard["watchlist"] in done.stdout
    assert live.server.metrics()["saeguard_policies_current,engine=0"] == 1


def test_a_broken_file_is_told_with_its_place(live: Live) -> None:
    """The event holds what `saeguard check` says."""
    policy = live.server.guarded.policies / "s.yaml"
    good = policy.read_text()
    policy.write_text(good.replace("severity: low", "severity: lwo"))
    live.until(lambda e: e["event"] == "policy.reload" and "s.yaml" in str(e["error"]))
    policy.write_text(good)
    live.until(lambda e: e["event"] == "policy.reload" and e["outcome"] == "unchanged")


def test_sighup_reaches_the_engine(live: Live) -> None:
    """An operator signals the one process he knows; it reads the policies and goes on."""
    before = sum(e.get("trigger") == "signal" for e in live.server.lines())
    live.server.process.send_signal(signal.SIGHUP)
    for _ in range(600):
        told = [e for e in live.server.lines() if e.get("trigger") == "signal"]
        if len(told) > before:
            break
        time.sleep(0.1)
    assert len(told) == before + 1
    assert told[-1]["error"] is None
    assert live.server.process.poll() is None
    live.ask()


def test_every_line_is_of_the_schema(live: Live) -> None:
    """Reloads and refusals among them."""
    import jsonschema

    from saeguard.events.record_schema import json_schema

    kinds = set()
    for line in live.server.events.read_text().splitlines():
        event = json.loads(line)
        jsonschema.validate(event, json_schema())
        kinds.add(event["event"])
    assert kinds == {"request", "verdict", "policy.reload", "request.refused"}
