"""Check that the parts of a policy make sense together.

The checks work on plain data and look only at parts of the right type, so that a mistake in one
part does not hide those in another.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, get_args

from saeguard.policy.condition import Condition, ConditionError, holds, never_holds, parse
from saeguard.policy.phrases import LAST, WHOLE
from saeguard.policy.types import Edit
from saeguard.yaml_files.findings import Finding, did_you_mean, show
from saeguard.yaml_files.reader import Document


def sense(document: Document) -> tuple[Condition | None, list[Finding]]:
    """Return a policy's condition, None if it cannot be parsed, and findings about the policy."""
    if not isinstance(document.data, dict):
        return None, []
    errors = [*_actions(document), *_exceptions(document), *_clamped(document)]
    text = document.data.get("condition")
    if not isinstance(text, str) or not text.strip():
        return None, errors
    try:
        condition = parse(text)
    except ConditionError as error:
        at = document.error(error.code, str(error), ("condition",), offset=error.offset)
        return None, [*errors, at]
    return condition, [*errors, *_selections(document, condition), *_truth(document, condition)]


def _actions(document: Document) -> Iterator[Finding]:
    data: Mapping[str, Any] = document.data
    if data.get("mode") == "enforce" and "on_error" not in data:
        message = (
            'mode is enforce, so the key "on_error" must be written: allow lets a request pass '
            "that could not be evaluated, stop ends it"
        )
        yield document.error("on-error-missing", message, ("mode",))
    if data.get("action") == "clamp" and "clamp" not in data:
        message = (
            'action is clamp, but the key "clamp" is missing; add clamp: {features: [...], to: 0}'
        )
        yield document.error("clamp-missing", message, ("action",))
    if "message" in data and data.get("action") in ("log", "flag", "clamp"):
        message = (
            f"there is a message, but action is {data['action']}, which leaves the text alone; "
            "write action: stop, or remove it"
        )
        yield document.error("message-unused", message, ("message",), at_key=True)
    yield from _decided_late(document)
    if "clamp" in data and data.get("action") in ("log", "flag", "stop"):
        message = (
            f"there is a clamp, but action is {data['action']}; write action: clamp, or remove it"
        )
        yield document.error("clamp-unused", message, ("clamp",), at_key=True)


def _decided_late(document: Document) -> Iterator[Finding]:
    """Yield a finding for each part that needs a match before the request ends."""
    data: Mapping[str, Any] = document.data
    last = data.get("for") == LAST
    if last and data.get("action") in ("stop", "clamp"):
        message = (
            f'"for: {LAST}" is decided when the request has ended, and action: {data["action"]} '
            "comes too late; write action: log or flag, or another window"
        )
        yield document.error("decided-late", message, ("action",))
    if last and data.get("keep"):
        message = (
            f'"for: {LAST}" matches at the last token, and no token follows on which the policy '
            "could stay on; remove keep"
        )
        yield document.error("decided-late", message, ("keep",), at_key=True)
    detect = data.get("detect")
    if data.get("action") != "clamp" or not isinstance(detect, dict):
        return
    for name in detect:
        if _get(detect[name], "over") == WHOLE:
            message = (
                f"a clamp decides at each token, and cannot compare the {WHOLE}; write "
                "over: average with half-life 16 tokens, or use another action"
            )
            yield document.error("decided-late", message, ("detect", name, "over"))


def _exceptions(document: Document) -> Iterator[Finding]:
    exceptions = document.data.get("exceptions")
    for i in _repeated([_get(e, "id") for e in exceptions] if _is_list(exceptions) else []):
        message = "an exception with this id is above; rename one of them"
        yield document.error("duplicate-name", message, ("exceptions", i, "id"))


def _clamped(document: Document) -> Iterator[Finding]:
    clamp = document.data.get("clamp")
    features = _get(clamp, "features")
    for i in _repeated(features if _is_list(features) else []):
        message = "this feature is in the list already; remove one of them"
        yield document.error("duplicate-name", message, ("clamp", "features", i))
    written = [edit for edit in get_args(Edit) if isinstance(clamp, dict) and edit in clamp]
    if isinstance(clamp, dict) and not written:
        message = (
            f"expected one edit of the features, found none; add one of {', '.join(get_args(Edit))}"
        )
        yield document.error("clamp-edit", message, ("clamp",), at_key=True)
    for edit in written[1:]:
        message = f"found a second edit beside {show(written[0])}; keep one of them"
        yield document.error("clamp-edit", message, ("clamp", edit), at_key=True)


def _selections(document: Document, condition: Condition) -> Iterator[Finding]:
    detect = document.data.get("detect")
    if not isinstance(detect, dict) or not detect:
        return
    for name, offset in condition.names.items():
        if name not in detect:
            message = (
                f"{show(name)} is not one of the selections under detect; "
                f"{did_you_mean(name, detect)}there are: {', '.join(detect)}"
            )
            yield document.error("unknown-selection", message, ("condition",), offset=offset)
    for name in detect:
        if name not in condition.names:
            message = f"the condition does not use the selection {show(name)}; use it or remove it"
            yield document.error("unused-selection", message, ("detect", name), at_key=True)


def _truth(document: Document, condition: Condition) -> Iterator[Finding]:
    if holds(condition.expr, ()):
        message = (
            "the condition holds if no selection does, so the policy would match any text; "
            'join the "not" part to something that must fire, as in: shell and not quoted'
        )
        yield document.error("holds-when-quiet", message, ("condition",))
    elif never_holds(condition):
        message = "the condition can never hold, whatever fires; check its not parts"
        yield document.error("never-holds", message, ("condition",))


def _get(value: Any, key: str) -> Any:
    return value.get(key) if isinstance(value, dict) else None


def _is_list(value: Any) -> bool:
    return isinstance(value, list)


def _repeated(names: list[Any]) -> Iterator[int]:
    """Yield the index of each text that occurred before."""
    counts: Counter[str] = Counter()
    for i, name in enumerate(names):
        if isinstance(name, str):
            if counts[name]:
                yield i
            counts[name] += 1
