"""The reloading thread with its real compiler process, on real files; no model."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from structlog.testing import capture_logs

from saeguard.cli.reload import verb as reload_verb
from saeguard.events.record_schema import LINE, Reload
from saeguard.guard.install_taps import install_taps
from saeguard.policy import signing, signing_keys
from saeguard.policy.load import load_policies
from saeguard.reload import reload_state, state_dir
from saeguard.reload.difference import Difference
from saeguard.reload.reload_state import ReloadContext, Report
from saeguard.reload.reloader import Reloader
from saeguard.reload.versions import Pin, Versions, make_version
from saeguard.reload.worker_updates import Admitted, UpdateQueue
from saeguard.vllm.engine_core.telemetry import Telemetry
from saeguard.vllm.settings import Settings, parse_settings
from saeguard.vllm.startup import check_manifest, load, source_of, start
from saeguard.vllm.worker.guard import WorkerGuard
from tests import models

LATENTS = tuple(range(12))
PRIVATE, PUBLIC = signing_keys.keygen()
SLOTS = 2


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A feature set over a small SAE."""
    root = tmp_path_factory.mktemp("sets")
    models.write_feature_set(
        root / "sets" / "tiny.yaml", models.make_sae(root / "sae"), latents=LATENTS
    )
    return root / "sets"


def write(folder: Path, *latents: int, above: float = 0.5, **more: object) -> None:
    """Write a policy that watches latents."""
    detect = {f"a{n}": {"feature": f"f{n}", "above": above} for n in latents}
    part = folder / ".part"
    models.write_policy(part, id="test.one", detect=detect, condition=" or ".join(detect), **more)
    part.rename(folder / "one.yaml")


class Server:
    """What a reloader works on, without an engine."""

    def __init__(self, settings: Settings) -> None:
        """Start with what the files hold."""
        started = start(settings)
        self.reports: list[Report] = []
        self.lists = Versions(make_version(0, started.watchlist, started.reads))
        self.updates = UpdateQueue()
        where = ReloadContext(
            source=source_of(settings),
            versions=self.lists,
            columns=started.columns,
            updates=self.updates,
            report=self.reports.append,
            accept=lambda _: None,
            check_manifest=lambda manifest: check_manifest(settings, manifest),
            state=None if settings.state is None else Path(settings.state),
        )
        self.reloader = Reloader(where, started.manifest)

    def until(self, what: Callable[[Report], bool], seconds: float = 90) -> Report:
        """Wait for a report."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            for report in list(self.reports):
                if what(report):
                    return report
            time.sleep(0.01)
        raise AssertionError(self.reports)

    @property
    def now(self) -> str:
        """Return the digest of the list in use."""
        return self.lists.current.watchlist.digest


@pytest.fixture
def settings(sets: Path, tmp_path: Path) -> Settings:
    """Settings of a server with room for four rows."""
    (tmp_path / "policies").mkdir()
    write(tmp_path / "policies", 0, 1)
    return parse_settings({
        "policies": str(tmp_path / "policies"), "feature_sets": str(sets), "watch_capacity": 4,
        "state": str(tmp_path / "state"),
    })  # fmt: skip


@pytest.fixture
def server(settings: Settings) -> Iterator[Server]:
    """A server whose reloader has read the files for the first time."""
    server = Server(settings)
    deadline = time.monotonic() + 90
    while not server.reloader.status.outcomes and time.monotonic() < deadline:
        time.sleep(0.01)
    assert server.reloader.status.outcomes == {"unchanged": 1}
    yield server
    server.reloader.close()


def test_rows_are_written_where_nobody_reads(settings: Settings, server: Server) -> None:
    """Only new rows are told to the workers, into columns that no list in use reads."""
    folder, first = Path(settings.policies), server.lists.current
    write(folder, 1, 2)
    report = server.until(lambda r: r.outcome == "active")
    swap = server.updates.take({}).swap
    assert swap is not None
    (told,) = swap.writes
    assert report.encoder_rows == len(told.columns) == 1
    assert not set(told.columns.tolist()) & first.reads[1]
    assert (report.old, report.new) == (first.watchlist.digest, server.now)
    write(folder, 1, 2, above=0.9)
    report = server.until(lambda r: r.outcome == "active" and r.old != first.watchlist.digest)
    assert report.encoder_rows == 0
    swap = server.updates.take({}).swap
    assert swap is not None
    assert (swap.number, swap.writes) == (2, ())


def test_doubts_of_a_new_policy_are_logged(settings: Settings, server: Server) -> None:
    """A threshold that was meant as a percentage comes into use with a warning, as at start."""
    with capture_logs() as logs:
        write(Path(settings.policies), 0, above=60.0)
        server.until(lambda r: r.outcome == "active")
    found = [line["finding"] for line in logs if "finding" in line]
    assert any("60 lies above the calibrated range" in finding for finding in found), logs
    assert any("for 60 % write 0.6" in finding for finding in found)
    with capture_logs() as logs:
        write(Path(settings.policies), 0, above=0.6, accept_weak="a drill")
        server.until(lambda r: r.outcome == "active")
    findings = [line["finding"] for line in logs if "finding" in line]
    assert not any("is weak; remove the key" in finding for finding in findings)


def waits(settings: Settings, server: Server) -> tuple[Pin, str]:
    """Have a list wait: it fits beside the present one, but not beside the pinned one too."""
    pin = server.lists.pin()
    write(Path(settings.policies), 2)
    server.until(lambda r: r.outcome == "active")
    write(Path(settings.policies), 3, 4)
    deadline = time.monotonic() + 60
    while server.reloader.status.waiting is None and time.monotonic() < deadline:
        time.sleep(0.01)
    waiting = server.reloader.status.waiting
    assert waiting is not None
    while waiting not in [
        s["waiting"] for s in state_dir.read_statuses(state_of(settings)).values()
    ]:
        assert time.monotonic() < deadline
        time.sleep(0.01)  # it is written right after
    return pin, waiting


def state_of(settings: Settings) -> Path:
    """Return the state folder."""
    return Path(str(settings.state))


def test_a_list_waits_for_columns(settings: Settings, server: Server) -> None:
    """It fits, but not beside the one that a request began with; that one is waited for."""
    pin, waiting = waits(settings, server)
    (status,) = state_dir.read_statuses(Path(str(settings.state))).values()
    assert status["waiting"] == waiting != server.now
    del pin
    server.until(lambda r: r.new == waiting)
    assert server.now == waiting
    assert server.reloader.status.waiting is None


def test_a_list_that_waits_gives_way_to_a_later_one(settings: Settings, server: Server) -> None:
    """What comes after it is tried, whatever it waited for."""
    pin, waiting = waits(settings, server)
    write(Path(settings.policies), 2, above=0.7)
    server.until(lambda r: r.outcome == "active" and r.policies == 1 and r.encoder_rows == 0)
    assert server.lists.current.watchlist.policies[0].detect["a2"].above == 0.7
    assert pin.version in server.lists.live
    assert waiting not in {r.new for r in server.reports}


def test_a_later_reading_answers_a_request(settings: Settings, server: Server) -> None:
    """`saeguard reload` gets its answer if the files change while its reading waits for columns."""
    pin, _ = waits(settings, server)
    server.reloader.ask("signal")
    deadline = time.monotonic() + 60
    while server.reloader._asked or server.reloader.status.waiting is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert server.reloader.status.asked == 0
    write(Path(settings.policies), 2, above=0.7)
    server.until(lambda r: r.outcome == "active" and r.policies == 1 and r.encoder_rows == 0)
    assert server.reloader.status.asked == 1
    assert pin.version in server.lists.live


def test_more_rows_than_room(settings: Settings, server: Server) -> None:
    """What can never fit beside the present list is refused at once, with the numbers."""
    first = server.now
    write(Path(settings.policies), 3, 4, 5)
    report = server.until(lambda r: r.outcome == "refused")
    assert "3 of them new beside the 2 that are in use, the taps of this server hold 4" in str(
        report.error
    )
    assert server.now == first


def test_the_compiler_can_die(settings: Settings, server: Server) -> None:
    """It is noticed, told, and another is started that knows what the files hold."""
    (child,) = children(os.getpid())
    os.kill(child, signal.SIGKILL)
    server.until(lambda r: r.outcome == "failed")
    assert not server.reloader.status.current
    write(Path(settings.policies), 2)
    server.until(lambda r: r.outcome == "active")
    assert server.reloader.status.current


def children(pid: int) -> list[int]:
    """Return the compiler processes of a process."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text().rsplit(")", 1)[1].split()[1])
            command = (path.parent / "cmdline").read_bytes()
        except OSError:
            continue
        if parent == pid and b"saeguard.reload.compiler_process" in command:
            found.append(int(path.parent.name))
    return found


def test_a_folder_that_goes_and_comes_back(settings: Settings, server: Server) -> None:
    """Gone, it is refused; back, it is read again, although it is another folder."""
    folder, first = Path(settings.policies), server.now
    folder.rename(folder.with_name("away"))
    report = server.until(lambda r: r.outcome == "refused")
    assert "no such file or folder" in str(report.error)
    assert server.now == first
    folder.mkdir()
    write(folder, 3)
    server.until(lambda r: r.outcome == "active")
    write(folder, 3, above=0.6)  # which is noticed in the new folder, too
    server.until(lambda r: r.outcome == "active" and r.old != first)


@pytest.mark.parametrize("scope", ["user", "assistant"])
def test_a_policy_by_role_comes_into_use(scope: str, settings: Settings, server: Server) -> None:
    """Whether its roles are told is the engine's to say; the list itself is as good as any."""
    write(Path(settings.policies), 2, scope=scope)
    report = server.until(lambda r: r.outcome in ("active", "refused"))
    assert (report.outcome, report.error) == ("active", None)
    assert server.lists.current.watchlist.policies[0].scope == scope


def test_asked_for(settings: Settings, server: Server) -> None:
    """A reload that is asked for is answered, also where nothing has changed."""
    server.reloader.ask("signal")
    report = server.until(lambda r: r.trigger == "signal")
    assert (report.outcome, report.error) == ("unchanged", None)
    deadline = time.monotonic() + 30
    while True:  # it is written right after the report
        (status,) = state_dir.read_statuses(state_of(settings)).values()
        if status["asked"] or time.monotonic() > deadline:
            break
        time.sleep(0.01)
    assert (status["asked"], status["pid"]) == (1, os.getpid())


@pytest.fixture
def worker(server: Server) -> WorkerGuard:
    """A worker's guard as it starts with the server's first list."""
    watchlist = server.lists.current.watchlist
    device = torch.device("cpu")
    taps = install_taps(watchlist, max_tokens=8, slots=SLOTS, device=device)
    free = list(range(1, SLOTS + 1))
    return WorkerGuard(watchlist, taps, taps[0].rows, torch.zeros(1), device, free=free)


def turn(server: Server, folder: Path, latent: int, to: float) -> str:
    """Make a list that clamps the present one, and wait until what it replaces is let go."""
    clamp = {"features": [f"f{latent}"], "to": to}
    server.reports.clear()
    write(folder, latent, action="clamp", clamp=clamp)
    server.until(lambda r: r.outcome == "active")
    while len(server.lists.live) > 1:
        time.sleep(0.01)
    return server.lists.current.clamps


def test_clamps_come_back_between_two_passes(
    settings: Settings, server: Server, worker: WorkerGuard
) -> None:
    """A list that is taken back while no request is under way edits as it did."""
    folder = Path(settings.policies)
    first = turn(server, folder, 2, -6.0)
    worker.apply_update(server.updates.take({}))
    assert list(worker.taps[0].clamps) == [first]
    assert turn(server, folder, 3, -5.0) != first
    assert turn(server, folder, 2, -6.0) == first
    worker.apply_update(server.updates.take({}))
    assert list(worker.taps[0].clamps) == list(worker.clamp_lists) == [first]
    # Those of the list between, which the workers never had, are no news to them.
    update = server.updates.take({"r": Admitted(first, frozenset())})
    assert (update.dropped, update.swap) == ((), None)
    worker.apply_update(update)
    with pytest.raises(RuntimeError, match=r"at swap 3 .* expects swap 7"):
        worker.apply_update(update._replace(after=7))
    with pytest.raises(RuntimeError, match=r"this rank lacks the clamps \['other'\]"):
        worker.apply_update(server.updates.take({"r": Admitted("other", frozenset())}))


def test_what_waits_does_not_grow(settings: Settings, server: Server) -> None:
    """Lists that came and went before any pass leave the columns that they wrote, and no clamps."""
    folder = Path(settings.policies)
    seen = [turn(server, folder, i % 6, -6.0 + i) for i in range(12)]
    assert len(set(seen)) == 12
    update = server.updates.take({})
    assert update.dropped == ()
    assert update.swap is not None
    assert (update.after, update.swap.number, list(update.swap.clamps)) == (0, 12, seen[-1:])
    written = [int(column) for write in update.swap.writes for column in write.columns]
    assert len(written) == len(set(written)) <= settings.watch_capacity  # type: ignore[operator]


class TestSigned:
    """A server that takes signed policies only."""

    @pytest.fixture
    def settings(self, settings: Settings, tmp_path: Path) -> Settings:
        """Settings with a key, and a signed folder."""
        (tmp_path / "key.pub").write_bytes(PUBLIC)
        self.sign(settings, 5)
        verify = {"public_key": str(tmp_path / "key.pub")}
        return parse_settings({**settings.model_dump(exclude_none=True), "verify": verify})

    def sign(self, settings: Settings, revision: int) -> None:
        """Sign the folder as it is."""
        unsigned = settings.model_copy(update={"verify": None})
        digests = {"tiny": _set_digest(unsigned)}
        folder = Path(settings.policies)
        signing.sign(folder, load_policies(folder), digests, revision, PRIVATE)

    def test_start_needs_a_signature(self, settings: Settings) -> None:
        """Without it, with another file, or with a key that is not there, nothing starts."""
        assert load(settings).manifest is not None
        (Path(settings.policies) / signing.BUNDLE).unlink()
        with pytest.raises(signing.BundleError, match="takes signed policies only"):
            start(settings)

    def test_a_replay_does_not_start(self, settings: Settings) -> None:
        """A server that has served revision 6 refuses 5 after it is started again."""
        state_dir.keep_revision(Path(str(settings.state)), 6, "f" * 64)
        with pytest.raises(signing.BundleError, match="revision 5, and 6 was in use"):
            start(settings)
        (Path(str(settings.state)) / state_dir.REVISION).write_text("{}")
        with pytest.raises(state_dir.StateError, match="cannot be read"):
            start(settings)

    def test_reload(self, settings: Settings, server: Server) -> None:
        """Each change needs a signature with a higher revision; what was seen is kept."""
        folder, first = Path(settings.policies), server.now
        kept = Path(str(settings.state))
        assert state_dir.read_revision(kept) is not None
        old = {p: p.read_bytes() for p in folder.iterdir()}
        write(folder, 2)
        server.until(lambda r: "one.yaml: found sha256" in str(r.error))
        self.sign(settings, 5)
        server.until(lambda r: "with other content" in str(r.error))
        assert server.now == first
        self.sign(settings, 6)
        report = server.until(lambda r: r.outcome == "active")
        assert report.revision == 6
        second = server.now
        for path, content in old.items():  # the whole old bundle, signature and all
            path.write_bytes(content)
        server.until(lambda r: "revision 5, and 6 was in use" in str(r.error))
        assert server.now == second
        seen = state_dir.read_revision(kept)
        assert seen is not None
        assert seen[0] == 6


def _set_digest(settings: Settings) -> str:
    from saeguard.features.load import load_feature_set

    return load_feature_set(Path(settings.feature_sets) / "tiny.yaml").digest


def test_verifying_needs_a_place_to_remember(settings: Settings) -> None:
    """Without it an old bundle could be brought back by a restart."""
    raw = {**settings.model_dump(exclude_none=True), "verify": {"public_key": "key.pub"}}
    del raw["state"]
    with pytest.raises(ValueError, match=r"verify needs saeguard\.state"):
        load(parse_settings(raw))


class TestNames:
    """A reload names what came, vanished and changed; nothing that guarded goes unnamed."""

    def test_each_kind(
        self, settings: Settings, server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Ids in the report, in the status for `saeguard reload`, and in its output."""
        folder = Path(settings.policies)
        models.write_policy(
            folder / ".two", id="test.two", detect={"a": {"feature": "f2", "above": 0.5}},
            condition="a", mode="shadow",
        )  # fmt: skip
        (folder / ".two").rename(folder / "two.yaml")
        report = server.until(lambda r: r.outcome == "active")
        assert report.difference == Difference(came=("test.two",))
        (folder / "one.yaml").rename(tmp_path / "moved.yaml")
        report = server.until(lambda r: bool(r.difference.vanished))
        assert report.difference == Difference(
            vanished=("test.one",), no_longer_enforced=("test.one",)
        )
        write(folder, 0, 1, mode="shadow")
        server.until(lambda r: r.policies == 2 and r.old == report.new)
        write(folder, 0, 1)
        report = server.until(lambda r: bool(r.difference.changed))
        assert report.difference == Difference(changed=("test.one",))
        write(folder, 0, 1, mode="shadow")
        report = server.until(lambda r: r.difference.changed != () and r.old == report.new)
        assert report.difference.no_longer_enforced == ("test.one",)
        ask(server, settings)
        printed = capsys.readouterr().out
        assert "last change at " in printed
        assert "changed: test.one; no longer enforced: test.one" in printed

    def test_a_feature_set(self, server: Server, sets: Path) -> None:
        """Another range or title of a feature set changes the policies that use it."""
        file = sets / "tiny.yaml"
        old = file.read_text()
        part = file.with_name(".part")
        part.write_text(old.replace("title: ", "title: other ", 1))
        part.rename(file)
        try:
            report = server.until(lambda r: r.outcome == "active")
        finally:
            file.write_text(old)
        assert report.difference == Difference(changed=("test.one",), feature_sets=("tiny",))

    def test_a_vanished_guard_is_a_warning(
        self, settings: Settings, server: Server, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """The log has a warning of its own, and the event names it."""
        folder = Path(settings.policies)
        write(folder, 0, 1, mode="shadow")
        report = server.until(lambda r: r.outcome == "active")
        log = folder.parent / "events.jsonl"
        telemetry = Telemetry(settings.model_copy(update={"events": str(log)}), "m")
        telemetry.reloaded(report)
        telemetry.close()
        printed = capsys.readouterr()
        assert "not enforced any more" in printed.out + printed.err
        event = LINE.validate_json(log.read_bytes())
        assert isinstance(event, Reload)
        assert event.no_longer_enforced == event.changed == ("test.one",)


def ask(server: Server, settings: Settings) -> None:
    """Ask for a reload, as `saeguard reload` does, and print the answer."""
    before = signal.signal(signal.SIGHUP, lambda *_: server.reloader.ask("signal"))
    try:
        reload_verb(state_of(settings))
    finally:
        signal.signal(signal.SIGHUP, before)


def test_files_that_are_not_compared(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """If nothing is known of the files, as on a file system that hangs, they do not count as used.

    The compiler process is stopped, so nothing tells that it has ended.
    """
    monkeypatch.setattr(reload_state, "STALE_S", 4.0)
    deadline = time.monotonic() + 60
    while not server.reloader.status.in_use:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    (child,) = children(os.getpid())
    os.kill(child, signal.SIGSTOP)
    try:
        while server.reloader.status.in_use:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert server.reloader.status.current
    finally:
        os.kill(child, signal.SIGCONT)
    while not server.reloader.status.in_use:
        assert time.monotonic() < deadline
        time.sleep(0.05)
