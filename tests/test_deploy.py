"""The files for Prometheus and Grafana name series that exist, and raise what they promise."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from saeguard.events.metrics import GAUGES, HISTOGRAMS, METRICS

ROOT = Path(__file__).parent.parent
PROMETHEUS = ROOT / "deploy" / "prometheus"
RULES = yaml.safe_load((PROMETHEUS / "alerts.yaml").read_text())["groups"][0]["rules"]
DASHBOARD = json.loads((ROOT / "deploy" / "grafana" / "saeguard.json").read_text())
SERIES: dict[str, set[str]] = {
    **{f"saeguard_{name}_total": set(labels) for name, (_, labels) in METRICS.items()},
    **{f"saeguard_{name}": set(labels) for name, (_, labels) in GAUGES.items()},
    **{f"saeguard_{name}_bucket": {"le"} for name in HISTOGRAMS},
    "up": set(),
}
"""By name: the labels that the guard gives it."""
BY_PROMETHEUS = {"job", "instance"}
SELECTOR = re.compile(r"\b(saeguard_\w+|up)\b(?:\{([^}]*)\})?")
GROUPED = re.compile(r"\b(?:by|on) \(([^)]*)\)")

PANELS = [(p["title"], t["expr"], t["legendFormat"]) for p in DASHBOARD["panels"]
          for t in p["targets"]]  # fmt: skip
QUERIES = [(rule["alert"], rule["expr"]) for rule in RULES] + [p[:2] for p in PANELS]


@pytest.mark.parametrize(("name", "query"), QUERIES)
def test_every_series_exists(name: str, query: str) -> None:
    """Its name, and each label that it is selected or grouped by."""
    found = SELECTOR.findall(query)
    assert found, name
    allowed = set(BY_PROMETHEUS)
    for series, selectors in found:
        assert series in SERIES, name
        allowed |= SERIES[series]
        labels = set(re.findall(r"(\w+)\s*=~?", selectors))
        assert labels <= SERIES[series] | BY_PROMETHEUS, name
    grouped = {x.strip() for labels in GROUPED.findall(query) for x in labels.split(",")}
    assert grouped <= allowed, name


def test_every_metric_is_on_the_dashboard() -> None:
    """What the guard counts can be seen."""
    shown = {series for _, query, _ in PANELS for series, _ in SELECTOR.findall(query)}
    assert set(SERIES) - shown == {"up"}


def test_the_dashboard_can_be_loaded() -> None:
    """Panels have ids of their own, lie beside each other, and use variables that exist."""
    panels: list[dict[str, Any]] = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        (x, y)
        for panel in panels
        for at in [panel["gridPos"]]
        for x in range(at["x"], at["x"] + at["w"])
        for y in range(at["y"], at["y"] + at["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) < 24
    known = {variable["name"] for variable in DASHBOARD["templating"]["list"]}
    text = json.dumps(DASHBOARD)
    assert set(re.findall(r"\$\{?(\w+)", text)) - {"__all"} == known
    for _, query, legend in PANELS:
        kept = {x.strip() for labels in GROUPED.findall(query) for x in labels.split(",")}
        if kept:
            assert set(re.findall(r"\{\{(\w+)\}\}", legend)) <= kept


def test_every_alert_is_tested() -> None:
    """Each is raised by a test, and says how bad it is."""
    cases = yaml.safe_load((PROMETHEUS / "alerts.test.yaml").read_text())["tests"]
    raised = {
        case["alertname"] for test in cases for case in test["alert_rule_test"]
        if case.get("exp_alerts")
    }  # fmt: skip
    assert raised == {rule["alert"] for rule in RULES}
    assert {rule["labels"]["severity"] for rule in RULES} == {"critical", "warning", "info"}


@pytest.mark.parametrize(
    "arguments",
    [
        ["check", "rules", "alerts.yaml"],
        ["check", "config", "prometheus.yaml"],
        ["test", "rules", "alerts.test.yaml"],
    ],
)
def test_promtool(arguments: list[str]) -> None:
    """Prometheus' own tool reads the rules, and its tests of them pass."""
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed: apt-get install prometheus")
    done = subprocess.run(
        [promtool, *arguments], cwd=PROMETHEUS, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
