"""Folders whose policies change under an engine, held against whichever list judged a request."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from saeguard.guard.watchlist import WatchList
from tests import models
from tests.engine import engines
from tests.engine.test_storm import Live

SETS = tuple(
    (i, latents)
    for i, latents in enumerate(
        [
            (0, 4, 8, 12, 16, 20),
            (0, 4, 8, 12, 16, 20),  # the same rows, other thresholds
            (1, 5, 9, 13, 17, 21, 4),  # other rows
            (2, 6, 10),
            (0, 4, 8, 12, 16, 20, 24, 28, 32, 36, 3, 7, 11),
            (40, 41, 42, 43, 44, 45, 46, 47, 48),
        ]
    )
)
"""Seed and latents of each folder of policies."""
LATENTS = tuple(sorted({latent for _, latents in SETS for latent in latents}))


class Folder:
    """A policy folder as Kubernetes mounts one: what is in it changes by turning one link."""

    def __init__(self, root: Path) -> None:
        """Make an empty one."""
        self.path = root / "policies"
        self.path.mkdir()
        (self.path / "set").symlink_to("..data/set")
        self._versions = 0

    def turn(self, fill: Callable[[Path], None]) -> Path:
        """Fill a new version and turn the link to it; return its folder of policies."""
        version = self.path / f"..v{self._versions}"
        self._versions += 1
        (version / "set").mkdir(parents=True)
        fill(version / "set")
        part = self.path / "..data_tmp"
        part.symlink_to(version.name)
        part.rename(self.path / "..data")
        shutil.rmtree(self.path / f"..v{self._versions - 3}", ignore_errors=True)
        return version / "set"


def fill_good(i: int) -> Callable[[Path], None]:
    """Return what writes policy set `i`: some that flag, one that stops, one that clamps."""
    seed, latents = SETS[i]

    def fill(folder: Path) -> None:
        models.random_policies(folder, latents, seed=seed, count=4 + i % 3, most=7.0)
        a, b = latents[0], latents[-1]
        models.write_policy(
            folder / "s.yaml", id="stop.output", scope="output", action="stop", on_error="stop",
            detect={"a": {"feature": f"f{a}", "above": 6.0 + i}}, condition="a",
        )  # fmt: skip
        models.write_policy(
            folder / "c.yaml", id="test.clamp", mode="shadow", action="clamp",
            detect={"a": {"feature": f"f{b}", "above": 0.5 + i / 10}}, condition="a",
            clamp={"features": [f"f{b}"], "to": -6.0 + i},
        )  # fmt: skip

    return fill


def _stricter(folder: Path) -> None:
    """Write set 0 with another threshold, and so the same rows."""
    fill_good(0)(folder)
    path = folder / "s.yaml"
    path.write_text(path.read_text().replace("above: 6.0", "above: 5.5"))


STRICTER = len(SETS)
GOOD = {**{i: fill_good(i) for i in range(len(SETS))}, STRICTER: _stricter}
"""What fills a folder that must be taken."""


def _syntax(folder: Path) -> None:
    fill_good(0)(folder)
    (folder / "p1.yaml").write_text("schema: [")


def _feature(folder: Path) -> None:
    fill_good(1)(folder)
    models.write_policy(
        folder / "x.yaml", detect={"a": {"feature": "f77", "above": 1.0}}, condition="a"
    )


def _nothing(folder: Path) -> None:
    folder.rmdir()


def _empty(_folder: Path) -> None:
    """Write nothing."""


def _no_clamp(folder: Path) -> None:
    fill_good(3)(folder)
    (folder / "c.yaml").unlink()  # which the settings name


def _layer(folder: Path) -> None:
    fill_good(2)(folder)
    models.write_policy(
        folder / "x.yaml", feature_set="other", detect={"a": {"feature": "f1", "above": 1.0}},
        condition="a",
    )  # fmt: skip


def _too_many(folder: Path) -> None:
    fill_good(4)(folder)
    detect = {f"a{n}": {"feature": f"f{n}", "above": 5.0} for n in LATENTS[:32]}
    models.write_policy(folder / "x.yaml", detect=detect, condition=" or ".join(detect))


def _role(folder: Path) -> None:
    fill_good(1)(folder)
    path = folder / "s.yaml"
    path.write_text(path.read_text().replace("scope: output", "scope: assistant"))


BAD: dict[str, tuple[Callable[[Path], None], str]] = {
    "syntax": (_syntax, "p1.yaml:1:"),
    "feature": (_feature, "f77"),
    "gone": (_nothing, "no such file"),
    "empty": (_empty, "found none; write NAME.yaml files"),
    "named": (_no_clamp, "test.clamp"),
    "layer": (_layer, "layer 2"),
    "capacity": (_too_many, "hold 24"),
    "role": (_role, "s.yaml: scope: assistant, but the model's chat template does not identify"),
}
"""What fills a folder that must be refused, and what the reason says."""
CAPACITY = 24


class Reloading(Live):
    """An engine whose policies change; each request is held against the list that judged it."""

    def prepare(self, root: Path) -> dict[str, Any]:
        """Make the model and the folders, and begin with set 0."""
        guarded = models.make_guarded(root / "made", most=7.0)
        other = models.make_sae(root / "other", layer=2)
        models.write_feature_set(guarded.feature_sets / "other.yaml", other, latents=(1,))
        models.write_feature_set(guarded.feature_sets / "tiny.yaml", guarded.sae, latents=LATENTS)
        self.folder = Folder(root)
        self.guarded = guarded
        self.reference = engines.Reference(guarded.model, guarded.sae)
        self.lists: dict[str, WatchList] = {}
        self.good: dict[int, str] = {}
        self.judged: dict[str, int] = {}
        """Requests by the digest of the list that judged them."""
        self._settings = guarded.settings(
            policies=str(self.folder.path),
            events=str(self.events),
            request_may_enforce=["test.clamp"],
            reload=True,
            watch_capacity=CAPACITY,
            state=str(root / "state"),
        )
        self.unseen = 0
        """Cached tokens that the list had not seen, which the guard says; they are not compared."""
        self.state = root / "state" / "engine-0.json"
        self.turn(0)
        return self._settings

    def turn(self, i: int) -> str:
        """Make policy set `i` what the files hold; return its digest, known before it can act."""
        if i not in self.good:
            ahead = self.folder.path.parent / f"ahead{i}"
            ahead.mkdir()
            GOOD[i](ahead)
            watchlist = engines.compile_policies({**self._settings, "policies": str(ahead)})
            self.lists[watchlist.digest] = watchlist
            self.good[i] = watchlist.digest
        self.folder.turn(GOOD[i])
        return self.good[i]

    def spoil(self, kind: str) -> None:
        """Make the files hold what must be refused."""
        self.folder.turn(BAD[kind][0])

    def recognise(self, events: dict[str, Any]) -> None:
        """Take the list that judged a request, which must be one that was good, and only one."""
        (digest,) = {event["watchlist"] for event in events.values()}
        self.watchlist = self.lists[digest]
        self.judged[digest] = self.judged.get(digest, 0) + 1

    def check(self, ended: dict[str, Any], events: dict[str, Any]) -> None:
        """Hold a request against its list, unless that had not seen all of its prefix."""
        unseen = max(e["coverage"]["skipped"].get("prefix_cached", 0) for e in events.values())
        if not unseen:
            super().check(ended, events)
            return
        self.recognise(events)
        assert set(events) == {p.id for p in self.watchlist.policies}
        for event in events.values():
            covered = event["coverage"]
            assert covered["evaluated"] + sum(covered["skipped"].values()) == covered["tokens"]
        self.unseen += unseen
        self.tally.seen["read a prefix that its list had not seen"] += 1

    def wait(self, what: Callable[[dict[str, Any]], bool], seconds: float = 60) -> dict[str, Any]:
        """Wait until the engine says of itself that something holds; return what it says."""
        deadline = time.monotonic() + seconds
        status: dict[str, Any] = {}
        while time.monotonic() < deadline:
            if self.state.exists():
                status = json.loads(self.state.read_text())
                if what(status):
                    return status
            time.sleep(0.02)
        raise AssertionError(status)
