"""What a server's processes report of its start, so that `saeguard serve` ends it in one box.

`saeguard serve` makes a folder and names it in the environment. Each process leaves its part there:
the ranks what the taps cost, whichever fails first why. The API server shows the parts when it
answers, and the process that the operator started shows the error as the last thing it prints.
Without the folder, as under `vllm serve`, nothing is reported.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

VARIABLE = "SAEGUARD_START"
"""The process id of the server, a colon, and the folder."""
ABOUT, ERROR = "about.json", "error.txt"


def begin(about: Mapping[str, Any]) -> None:
    """Make the folder; this process becomes the server.

    Args:
        about: `watches`, `events`, `edits`: what only the command line knows, in words.
    """
    folder = Path(tempfile.mkdtemp(prefix="saeguard-start-"))
    (folder / ABOUT).write_text(json.dumps(dict(about)))
    os.environ[VARIABLE] = f"{os.getpid()}:{folder}"


def is_server() -> bool:
    """Return whether this process is the one that the operator started."""
    return os.environ.get(VARIABLE, "").partition(":")[0] == str(os.getpid())


def rank_ready(cost: Mapping[str, Any]) -> None:
    """Report a rank whose self-test has passed.

    Args:
        cost: `layers`, `held_mib`, `pass_us`, `pass_rows`, as the log line "saeguard ready".
    """
    folder = _folder()
    if folder is not None:
        with contextlib.suppress(OSError):
            (folder / f"rank-{os.getpid()}.json").write_text(json.dumps(dict(cost)))


def failed(error: BaseException) -> None:
    """Report why the server does not start; the first report counts, as others follow from it."""
    folder = _folder()
    if folder is not None:
        with contextlib.suppress(OSError), (folder / ERROR).open("x") as file:
            file.write(str(error))


def show_ready(address: str) -> None:
    """Print what is watched, what it costs, and where events go; only the first caller prints."""
    folder = _folder()
    if folder is None:
        return
    with contextlib.suppress(OSError):
        about = json.loads((folder / ABOUT).read_text())
        ranks = [json.loads(path.read_text()) for path in sorted(folder.glob("rank-*.json"))]
        (folder / ABOUT).unlink()  # raises in all callers but one
        shutil.rmtree(folder)
        _print("saeguard is ready", _ready_lines(about, ranks, address), "green")


def show_error() -> None:
    """Print why the server did not start, if one of our own checks is the reason."""
    folder = _folder()
    if folder is None:
        return
    with contextlib.suppress(OSError):
        error = folder / ERROR
        found = error.read_text() if error.exists() else ""
        shutil.rmtree(folder)
        if found:
            _print("saeguard: the server did not start", found.splitlines(), "red")


def _ready_lines(
    about: Mapping[str, Any], ranks: list[Mapping[str, Any]], address: str
) -> list[str]:
    layers = sorted({layer for rank in ranks for layer in rank["layers"]})
    held, slowest = sum(r["held_mib"] for r in ranks), max((r["pass_us"] for r in ranks), default=0)
    rows = max((r["pass_rows"] for r in ranks), default=0)
    at = f"at layer {', '.join(map(str, layers))}" if layers else "at no layer"
    return [
        f"watches   {about['watches']}, {at}",
        f"costs     {held:.2f} MiB, {slowest:.0f} microseconds for a pass of {rows} tokens",
        f"events    {about['events']}",
        f"edits     {about['edits']}",
        f"answers   {address}",
    ]


def _folder() -> Path | None:
    name = os.environ.get(VARIABLE, "").partition(":")[2]
    return Path(name) if name and os.path.isdir(name) else None  # noqa: PTH112 - no Path for none


def _print(title: str, lines: Sequence[str], colour: str) -> None:
    from rich.console import Console  # noqa: PLC0415 - as seldom as it is needed
    from rich.panel import Panel  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    # The descriptor itself: vLLM puts the name of its process before each line of sys.stderr.
    with open(2, "w", closefd=False) as stderr:
        body = Text("\n".join(lines), no_wrap=False)
        Console(file=stderr).print(Panel(body, title=title, border_style=colour))
