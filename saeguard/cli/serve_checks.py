"""What `saeguard serve` checks before it starts vLLM, which would fail much later."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saeguard.cli.options import check_feature_sets, check_file
from saeguard.errors import InputError

if TYPE_CHECKING:
    from saeguard.policy.types import Policy

CONFIG = "--additional-config"
TEMPLATES = {"--chat-template", "--trust-request-chat-template"}
"""Options of vLLM by which prompts use another chat template than the tokenizer's."""


def split_additional(arguments: list[str]) -> tuple[list[str], dict[str, Any]]:
    """Return vLLM's options without `--additional-config`, and the value of that option.

    Raises:
        InputError: the option is not a JSON object, holds the key `saeguard`, or is given twice.
    """
    given = sum(word == CONFIG or word.startswith(f"{CONFIG}=") for word in arguments)
    if given > 1:
        raise InputError(f"{CONFIG}: found {given} times; give it once, as one JSON object")
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
        raise InputError(f"{CONFIG}: not JSON: {error}; found {raw!r}") from error
    if not isinstance(value, dict) or "saeguard" in value:
        raise InputError(
            f"{CONFIG}: expected a JSON object without the key `saeguard`, which the options of "
            "`saeguard serve` set; or use `vllm serve` directly"
        )
    return rest, value


def check_model_named_once(model: str, options: Sequence[str]) -> None:
    """Refuse a --model among vLLM's options, which would replace the model that is checked.

    Raises:
        InputError: the options hold a --model.
    """
    for i, word in enumerate(options):
        name, _, value = word.partition("=")
        if name == "--model":
            other = value or " ".join(options[i + 1 : i + 2])
            raise InputError(
                f"--model: found {other}, but the first argument names the model {model}; leave "
                "--model out"
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
    """Refuse options whose paths cannot work; the server would fail on them much later.

    Raises:
        InputError: a path is missing, or of the wrong kind.
    """
    from saeguard.policy.files import find_files

    if not os.path.lexists(policies):
        raise InputError(
            f"--policies: {policies}: there is no such file or folder; name a policy file, or a "
            "folder of them"
        )
    if policies.is_dir() and find_files(policies) == ([], []):
        raise InputError(
            f"--policies: {policies}: the folder holds no policy file (NAME.yaml); write one "
            "(`saeguard policy new`), or name the folder that holds them"
        )
    check_feature_sets(feature_sets)
    if events is not None:
        check_events(events)
    if state is not None and os.path.lexists(state) and not state.is_dir():
        raise InputError(f"--state: {state}: expected a folder, found a file; a missing folder is "
                         "made")  # fmt: skip
    for option, path in (("--access", access), ("--verify", verify)):
        if path is not None:
            check_file(path, option)


def check_events(events: Path) -> None:
    """Refuse a path that events cannot be appended to.

    Raises:
        InputError: the path is a folder, in a missing folder, or not writable.
    """
    if events.is_dir():
        raise InputError(
            f"--events: {events}: expected a file, found a folder; name a file in it, such as "
            f"{events / 'events.jsonl'}"
        )
    if not events.parent.is_dir():
        raise InputError(f"--events: {events.parent}: there is no such folder; make it, or "
                         "name a file in another")  # fmt: skip
    if not os.access(events if events.exists() else events.parent, os.W_OK):
        raise InputError(f"--events: {events}: this user may not write the file; name "
                         "another")  # fmt: skip


def startup_report(settings: dict[str, Any], options: Sequence[str] = ()) -> list[str]:
    """Load everything that the server will load, and return a summary of it in lines.

    Args:
        settings: of the guard, as `additional_config.saeguard` holds them.
        options: of vLLM, as written on the command line.

    Raises:
        SaeguardError: policies, feature sets, checkpoints or options are wrong.
    """
    from saeguard.reload.columns import allocate
    from saeguard.vllm.settings import parse_settings
    from saeguard.vllm.startup import load_watchlist

    parsed = parse_settings(settings)
    watchlist = load_watchlist(parsed)
    allocate(watchlist, parsed.watch_capacity)
    check_enforceable(parsed.request_may_enforce, watchlist.policies)
    check_templates(options, watchlist.policies)
    lines = [
        (
            f"{len(watchlist.policies)} policies ({_modes(watchlist.policies)}), "
            f"{len(watchlist.features)} features, watch list {watchlist.digest[:12]}, "
            f"{watchlist.nbytes() / 2**20:.2f} MiB of weights"
        )
    ]
    lines += [
        f"layer {hook.layer}: {hook.W.shape[0]} encoder rows of width {hook.d_in}"
        for hook in watchlist.hooks
    ]
    lines += [
        f"feature set {name}: TopK latents are {found.in_words}"
        for name, found in sorted(watchlist.approximations.items())
    ]
    lines += [f"feature set {name}: {found}" for name, found in sorted(watchlist.sinks.items())]
    lines += [f"{p.mode:8} {p.action:6} {p.severity:9} {p.id}" for p in watchlist.policies]
    return lines


def _modes(policies: Sequence[Policy]) -> str:
    enforced = sum(policy.mode == "enforce" for policy in policies)
    return f"{enforced} enforced, {len(policies) - enforced} in shadow"


def edits_in_words(settings: dict[str, Any]) -> str:
    """Return what becomes of edits of the policy files while the server runs."""
    signed = " if they are signed" if "verify" in settings else ""
    state = settings.get("state")
    ask = f"; `saeguard reload {state}` reports them" if state else ""
    return f"of {settings['policies']} come into use while serving{signed}{ask}"


def check_enforceable(ids: Sequence[str], policies: Sequence[Policy]) -> None:
    """Refuse a --request-may-enforce that names a policy which every request has enforced.

    Raises:
        InputError: the policy is in enforce mode.
    """
    shadow = sorted({policy.id for policy in policies if policy.mode == "shadow"})
    for id_ in ids:
        if id_ not in shadow:
            raise InputError(
                f"--request-may-enforce: {id_} is enforced for every request already; leave it "
                f"out, or name a policy in shadow mode: {', '.join(shadow) or 'none is loaded'}"
            )


def check_templates(options: Sequence[str], policies: Sequence[Policy]) -> None:
    """Refuse another chat template than the tokenizer's if a policy's scope is a role.

    Raises:
        InputError: roles would be found by one template and written by another.
    """
    from saeguard.guard.scopes import BY_ROLE

    given = {word.split("=", 1)[0].replace("_", "-") for word in options if word.startswith("--")}
    found, policy = given & TEMPLATES, next((p for p in policies if p.scope in BY_ROLE), None)
    if found and policy is not None:
        raise InputError(
            f"{min(found)}: {policy.path} has `scope: {policy.scope}`, and the guard finds the "
            "role of a token by the tokenizer's own chat template; with another template the roles "
            "would be wrong. Write the template into the model's folder as chat_template.jinja and "
            "leave the option out, or use `scope: prompt`, `output` or `both`"
        )
