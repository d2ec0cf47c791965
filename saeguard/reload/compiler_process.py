"""Read and compile policies in a process of their own, so that no step waits for it.

Reading YAML holds Python's interpreter lock, which would delay the engine core's steps from any of
its threads. So a process of its own watches the files, reads, verifies, compiles and dry-runs them,
and sends the result. It starts and ends with the server, and caches what it has read.

Both ends run this module, connected by a private socket pair. Watch lists travel as pickles, as
messages between vLLM's processes do. No file is ever unpickled.
"""

from __future__ import annotations

import gc
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, Pipe
from typing import Any, Literal, TypeAlias

import numpy as np

from saeguard.features.files import FeatureSetError
from saeguard.guard.watchlist import WatchList, WatchListError
from saeguard.policy.errors import BundleError, PolicyErrors
from saeguard.policy.signing import Manifest
from saeguard.policy.types import Policy
from saeguard.reload.columns import RowId, row_ids, row_tensors, without_weights
from saeguard.reload.dry_run import RehearsalError, rehearse
from saeguard.reload.file_watcher import Look, looks
from saeguard.reload.policy_source import Loaded, ReadCache, Source, SourceError, load
from saeguard.yaml_files.findings import bounded

Trigger: TypeAlias = Literal["files", "signal"]

RUN = "import sys; from saeguard.reload.compiler_process import main; main(*sys.argv[1:])"
CORES = sorted(os.sched_getaffinity(0))
"""The cores of this process before vLLM binds its threads, which keeps them for the model."""
NICE = 10
IDLE_S, MOST_READINGS = 1.0, 100
"""Idle seconds, or readings, after which the compiler process collects garbage."""
CHUNK = 25
"""Policies in a message, so that unpickling it takes well under a millisecond of a step."""
REFUSALS = (
    PolicyErrors,
    FeatureSetError,
    WatchListError,
    BundleError,
    SourceError,
    RehearsalError,
)


@dataclass(frozen=True, slots=True)
class CompilerReading:
    """The result of one reading of the files."""

    trigger: Trigger
    seconds: float
    """Duration of reading and compiling."""
    error: str | None = None
    """Why the files are refused; None if they are accepted."""
    watchlist: WatchList | None = None
    """The watch list without weights; None if refused, or if equal to the one sent last."""
    ids: tuple[tuple[RowId, ...], ...] = ()
    """By hook: ids of the encoder rows."""
    manifest: Manifest | None = None
    digest: str = ""
    doubts: tuple[str, ...] = ()
    """Reasons for which policies that are accepted may guard nothing."""


class Compiler:
    """The engine core's end of the pipe: it starts the compiler process and requests readings."""

    def __init__(self, source: Source, note: Callable[[Look], None] = lambda _: None) -> None:
        """Start the process.

        Args:
            source: the settings.
            note: called with each comparison of the files that the process reports.
        """
        ours, theirs = Pipe()
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(  # noqa: S603 - this program
            [sys.executable, "-c", RUN, str(theirs.fileno()), ",".join(map(str, CORES))],
            pass_fds=[theirs.fileno()],
            env=environment,
            stdin=subprocess.DEVNULL,
        )
        theirs.close()
        self._pipe = ours
        self._note = note
        self._changed = False
        self._policies: tuple[Policy, ...] = ()
        """The policies of the watch list that was received last."""
        _send(ours, source)

    @property
    def pid(self) -> int:
        """Return the process id."""
        return self._process.pid

    def changed(self, timeout_s: float) -> bool:
        """Wait for a change of the files since the last reading; return whether there was one.

        Raises:
            EOFError, OSError: the process has ended.
        """
        if not self._changed and self._pipe.poll(timeout_s):
            self._looked(_receive(self._pipe))  # the only message without a request
        return self._changed

    def _looked(self, look: Look) -> None:
        self._note(look)
        self._changed = self._changed or look.changed

    def read(self, trigger: Trigger) -> CompilerReading:
        """Request a reading of the files, whether they have changed or not, and return its result.

        Raises:
            EOFError, OSError: the process has ended.
        """
        self._changed = False
        _send(self._pipe, trigger)
        reading: CompilerReading = self._answer()
        if reading.watchlist is None:
            return reading
        order, pieces = self._answer()
        new = iter([policy for _ in range(pieces) for policy in self._answer()])
        known = self._policies
        self._policies = tuple(known[i] if i >= 0 else next(new) for i in order.tolist())
        return replace(reading, watchlist=_with_policies(reading.watchlist, self._policies))

    def rows(self, which: Sequence[np.ndarray]) -> list[dict[str, np.ndarray]]:
        """Return encoder rows of the watch list that was received last.

        Args:
            which: by hook, indices of the wanted encoder rows.

        Raises:
            EOFError, OSError: the process has ended.
        """
        _send(self._pipe, list(which))
        rows: list[dict[str, np.ndarray]] = self._answer()
        return rows

    def _answer(self) -> Any:
        while isinstance(message := _receive(self._pipe), Look):
            self._looked(message)
        return message

    def close(self) -> None:
        """End the process."""
        self._pipe.close()
        self._process.terminate()
        self._process.wait(10)


def _send(pipe: Connection, what: Any) -> None:
    pipe.send_bytes(pickle.dumps(what, protocol=pickle.HIGHEST_PROTOCOL))


def _receive(pipe: Connection) -> Any:
    return pickle.loads(pipe.recv_bytes())  # noqa: S301 - from the process that we started


# --- in the process -----------------------------------------------------------------------------


def read(
    source: Source, known: ReadCache, trigger: Trigger
) -> tuple[CompilerReading, Loaded | None]:
    """Read and compile the files once; never raise, whatever they hold."""
    began = time.perf_counter()
    try:
        loaded = load(source, known)
        rehearse(loaded.watchlist)
    except REFUSALS as error:
        message = bounded(str(error))
        return CompilerReading(trigger, time.perf_counter() - began, error=message), None
    except Exception as error:  # noqa: BLE001 - a bug must not end the process
        message = bounded(f"{type(error).__name__} while reading: {error}")
        return CompilerReading(trigger, time.perf_counter() - began, error=message), None
    reading = CompilerReading(
        trigger,
        time.perf_counter() - began,
        watchlist=without_weights(loaded.watchlist),
        ids=tuple(row_ids(hook) for hook in loaded.watchlist.hooks),
        manifest=loaded.manifest,
        digest=loaded.watchlist.digest,
        doubts=loaded.weak,
    )
    return reading, loaded


def serve(pipe: Connection) -> None:
    """Answer requests and report changes until the other end closes the pipe."""
    source: Source = _receive(pipe)
    known, last = ReadCache(), None
    sent: tuple[Policy, ...] = ()
    gc.disable()  # a collection walks over everything that is cached, in the middle of a reading
    one_at_a_time = threading.Lock()
    seen = looks([source.policies, source.feature_sets], threading.Event())
    threading.Thread(target=_report, args=(seen, pipe, one_at_a_time), daemon=True).start()
    readings = 0
    while True:
        if readings and (readings >= MOST_READINGS or not pipe.poll(IDLE_S)):
            gc.collect()
            readings = 0
        asked = _receive(pipe)
        if isinstance(asked, list):
            assert last is not None
            with one_at_a_time:
                _send(pipe, _rows(last.watchlist, asked))
            continue
        reading, loaded = read(source, known, asked)
        if loaded is not None:
            if last is not None and loaded.watchlist.digest == last.watchlist.digest:
                reading = replace(reading, watchlist=None, ids=())  # sent already
            last = loaded
        with one_at_a_time:
            _send_reading(pipe, reading, sent)
        if reading.watchlist is not None:
            sent = reading.watchlist.policies
        readings += 1


def _report(seen: Iterator[Look], pipe: Connection, one_at_a_time: threading.Lock) -> None:
    """Send every comparison of the files; without this thread, the process ends, too."""
    while True:
        try:
            look = next(seen)
        except BaseException:  # noqa: BLE001 - whatever it is, nothing is watched any more
            traceback.print_exc()
            os._exit(1)
        try:
            with one_at_a_time:
                _send(pipe, look)
        except OSError:  # the other end has gone
            os._exit(0)


def _send_reading(pipe: Connection, reading: CompilerReading, sent: Sequence[Policy]) -> None:
    """Send a reading without what the other end has, in messages that are quick to unpickle.

    Args:
        pipe: to the other end.
        reading: the result.
        sent: the policies sent last; unchanged policies are the same objects.
    """
    watchlist = reading.watchlist
    if watchlist is None:
        _send(pipe, reading)
        return
    _send(pipe, replace(reading, watchlist=_with_policies(watchlist, ())))
    where = {id(policy): i for i, policy in enumerate(sent)}
    order = [where.get(id(policy), -1) for policy in watchlist.policies]
    new = [policy for i, policy in zip(order, watchlist.policies, strict=True) if i < 0]
    starts = range(0, len(new), CHUNK)
    _send(pipe, (np.array(order, np.int64), len(starts)))
    for i in starts:
        _send(pipe, new[i : i + CHUNK])


def _with_policies(watchlist: WatchList, policies: tuple[Policy, ...]) -> WatchList:
    rules = watchlist.rules._replace(policies=policies)
    return replace(watchlist, policies=policies, rules=rules)


def _rows(watchlist: WatchList, which: Sequence[np.ndarray]) -> list[dict[str, np.ndarray]]:
    return [
        {name: tensor.numpy()[at] for name, tensor in row_tensors(hook).items()}
        for hook, at in zip(watchlist.hooks, which, strict=True)
    ]


def main(descriptor: str, cores: str) -> None:
    """Run the compiler process until the other end closes the pipe; ignore SIGINT and SIGHUP."""
    for ignored in (signal.SIGINT, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)
    os.sched_setaffinity(0, map(int, cores.split(",")))
    os.nice(NICE)
    try:
        serve(Connection(int(descriptor)))
    except (EOFError, OSError):
        os._exit(0)  # the watching thread may be waiting
