"""A process of its own that reads and compiles policies, so that no step waits for it.

Reading YAML is Python at work, and Python at work in the engine core's process would hold up the
steps, in whichever thread. So this process watches the files, reads, verifies, compiles and
rehearses, and sends what is ready. It is started with the server, knows what it has read before,
and ends when the server does.

Both ends are this program, on a socket pair that nobody else can open: pickle carries the lists
between them as vLLM's own does between its processes. No file is ever unpickled.
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
from collections.abc import Sequence
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
from saeguard.reload.file_watcher import changes
from saeguard.reload.policy_source import Loaded, ReadCache, Source, SourceError, load

Trigger: TypeAlias = Literal["files", "signal"]

RUN = "import sys; from saeguard.reload.compiler_process import main; main(*sys.argv[1:])"
CORES = sorted(os.sched_getaffinity(0))
"""Of this process before vLLM binds its threads to cores, which are the model's from then on."""
NICE = 10
CHANGED = None
"""Said unasked: files have changed."""
IDLE_S, MOST_READINGS = 1.0, 100
"""Garbage is looked for when nothing was asked for so long, or after so many readings."""
CHUNK = 25
"""Policies in a message: what unpickles in well under a millisecond holds nobody up."""
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
    """What one reading of the files came to."""

    trigger: Trigger
    seconds: float
    """From the start of reading to being ready."""
    error: str | None = None
    """Why it is refused."""
    watchlist: WatchList | None = None
    """Without weights; None where it is refused, or what was sent last."""
    ids: tuple[tuple[RowId, ...], ...] = ()
    """By hook: the rows."""
    manifest: Manifest | None = None
    digest: str = ""


class Compiler:
    """The engine core's end: start the process, ask it, hear from it."""

    def __init__(self, source: Source) -> None:
        """Start the process."""
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
        self._changed = False
        self._policies: tuple[Policy, ...] = ()
        """Of the list that was heard of last."""
        _send(ours, source)

    @property
    def pid(self) -> int:
        """Return the process' number."""
        return self._process.pid

    def changed(self, timeout_s: float) -> bool:
        """Return whether files have changed since they were read last; wait a while for it.

        Raises:
            EOFError, OSError: the process has ended.
        """
        if not self._changed and self._pipe.poll(timeout_s):
            assert _receive(self._pipe) is CHANGED  # it says nothing else unasked
            self._changed = True
        return self._changed

    def read(self, trigger: Trigger) -> CompilerReading:
        """Have the files read, whether they have changed or not.

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
        """Return rows of the list that was heard of last.

        Args:
            which: by hook, the rows wanted.

        Raises:
            EOFError, OSError: the process has ended.
        """
        _send(self._pipe, list(which))
        rows: list[dict[str, np.ndarray]] = self._answer()
        return rows

    def _answer(self) -> Any:
        while (heard := _receive(self._pipe)) is CHANGED:
            self._changed = True
        return heard

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
    """Read everything once; never raises, whatever the files hold."""
    began = time.perf_counter()
    try:
        loaded = load(source, known)
        rehearse(loaded.watchlist)
    except REFUSALS as error:
        return CompilerReading(trigger, time.perf_counter() - began, error=str(error)), None
    except Exception as error:  # noqa: BLE001 - a fault of ours must not end the watching
        told = f"{type(error).__name__} while reading: {error}"
        return CompilerReading(trigger, time.perf_counter() - began, error=told), None
    reading = CompilerReading(
        trigger,
        time.perf_counter() - began,
        watchlist=without_weights(loaded.watchlist),
        ids=tuple(row_ids(hook) for hook in loaded.watchlist.hooks),
        manifest=loaded.manifest,
        digest=loaded.watchlist.digest,
    )
    return reading, loaded


def serve(pipe: Connection) -> None:
    """Read whenever asked, and tell of changes, until the other end hangs up."""
    source: Source = _receive(pipe)
    known, last = ReadCache(), None
    sent: tuple[Policy, ...] = ()
    gc.disable()  # a look at everything that is known would come in the middle of a reading
    one_at_a_time = threading.Lock()
    threading.Thread(target=_notice, args=(source, pipe, one_at_a_time), daemon=True).start()
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
                reading = replace(reading, watchlist=None, ids=())  # it was sent already
            last = loaded
        with one_at_a_time:
            _send_reading(pipe, reading, sent)
        if reading.watchlist is not None:
            sent = reading.watchlist.policies
        readings += 1


def _notice(source: Source, pipe: Connection, one_at_a_time: threading.Lock) -> None:
    for _ in changes([source.policies, source.feature_sets], threading.Event()):
        with one_at_a_time:
            _send(pipe, CHANGED)


def _send_reading(pipe: Connection, reading: CompilerReading, sent: Sequence[Policy]) -> None:
    """Send what the other end does not have, in pieces none of which takes long to take in.

    Args:
        pipe: to the other end.
        reading: what to send.
        sent: the policies sent last; those that a file gave again are the same objects.
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
    """Serve until the other end hangs up; what is signalled to the terminal is for that end."""
    for ignored in (signal.SIGINT, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)
    os.sched_setaffinity(0, map(int, cores.split(",")))
    os.nice(NICE)
    try:
        serve(Connection(int(descriptor)))
    except (EOFError, OSError):
        os._exit(0)  # the watching thread may be in the middle of waiting
