"""Totals are counted in one process and shown in another; nothing is lost or begins above 0."""

from __future__ import annotations

import threading
from dataclasses import dataclass

from prometheus_client import REGISTRY

from saeguard.events import metrics
from saeguard.events.first_counts import begin_counts, begin_policies
from saeguard.events.metrics import Counts, show


@dataclass
class Named:
    """What is read of a policy."""

    id: str
    mode: str
    action: str = "flag"


def test_policies_begin_at_zero() -> None:
    """Each verdict and action of each mode that a policy may have; others do not appear."""
    counts = Counts()
    begin_policies(
        counts, [Named("a", "shadow"), Named("b", "shadow"), Named("c", "enforce")], ["b"]
    )
    taken = {tuple(entry[:-1]): entry[-1] for entry in counts.take()}
    assert set(taken.values()) == {0}
    modes = {(name, mode) for kind, name, mode, _ in taken if kind == "verdicts"}
    assert modes == {("a", "shadow"), ("b", "shadow"), ("b", "enforce"), ("c", "enforce")}
    assert {key[1:] for key in taken if key[0] == "actions"} == {
        ("b", "enforce", "flag"), ("c", "enforce", "flag"),
    }  # fmt: skip
    assert len(taken) == 4 * 4 + 2


def test_a_report_of_zeros_makes_the_series() -> None:
    """What is reported at 0 is shown at 0."""
    counts = Counts()
    begin_counts(counts, [("unread_passes", ()), ("events", ("written", "dropped"))])
    show(counts.take())
    for name, labels in (("unread_passes", {}), ("events", {"state": "dropped"})):
        assert REGISTRY.get_sample_value(f"saeguard_{name}_total", labels) is not None


def test_a_histogram_travels() -> None:
    """Values are observed once, in the process that shows them; their number is bounded."""
    counts = Counts()
    before = REGISTRY.get_sample_value("saeguard_step_seconds_count") or 0
    for _ in range(2 * metrics.MOST_VALUES):
        counts.observe("step_seconds", 2e-5)
    show(counts.take())
    count = REGISTRY.get_sample_value("saeguard_step_seconds_count")
    assert count == before + metrics.MOST_VALUES
    assert counts.take() == []


def test_a_gauge_is_reported_when_it_changes() -> None:
    """Each of its labels on its own."""
    counts = Counts()
    counts.gauge("policies_current", "0", value=1)
    counts.gauge("policies_current", "1", value=1)
    assert counts.take() == [["policies_current", "0", 1], ["policies_current", "1", 1]]
    counts.gauge("policies_current", "0", value=1)
    counts.gauge("policies_current", "1", value=0)
    assert counts.take() == [["policies_current", "1", 0]]


def test_a_report_beside_the_steps_loses_nothing() -> None:
    """The engine core counts while another thread reports."""
    counts, total, stop = Counts(), [0], threading.Event()

    def report() -> None:
        while not stop.is_set():
            total[0] += sum(n for *_, n in counts.take())

    thread = threading.Thread(target=report)
    thread.start()
    for _ in range(20_000):
        counts.add("requests")
    stop.set()
    thread.join()
    assert total[0] + sum(n for *_, n in counts.take()) == 20_000
