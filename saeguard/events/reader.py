"""Read what an event log says of requests, line by line."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

from pydantic import ValidationError

from saeguard.errors import InputError
from saeguard.events.record_schema import LINE, Event, Request

MAX_LINE = 16 << 20
"""Bytes of a line that are read; no event is as long."""


class LogError(InputError):
    """A line of an event log is not an event; the message names file, line and field."""


def is_of_request(logged: str, asked: str) -> bool:
    """Return whether a request of a log is the one that is asked for.

    Args:
        logged: the engine's own id, which events hold.
        asked: that id, or the one in the client's response: `chatcmpl-...`. vLLM makes its own of
            it: `ID-1a2b3c4d`, `0_ID-1a2b3c4d` for each of several choices, and `ID-0-1a2b3c4d` for
            each of several prompts (`InputProcessor.assign_request_id`, `ParentRequest`).
    """
    made = rf"([0-9]+_)?{re.escape(asked)}(-[0-9]+)?(-[0-9a-f]{{8}})?"
    return logged == asked or re.fullmatch(made, logged) is not None


def read_log(path: Path, torn: list[int] | None = None) -> Iterator[Event | Request]:
    """Yield the verdicts and the requests of an event log in the order of its lines.

    Torn lines, which a full disk or a power cut leaves, are skipped. So is an incomplete last line,
    since a server may be writing it, and events of kinds that this version does not know.

    Args:
        path: of the log.
        torn: the numbers of the torn lines are added to it.

    Raises:
        LogError: a whole line is not an event of this schema version, or no line is whole.
        OSError: the file cannot be read.
    """
    torn = [] if torn is None else torn
    whole = 0
    with path.open("rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(MAX_LINE), b""), 1):
            if not line.strip():
                continue
            try:
                event = LINE.validate_json(line)
            except ValidationError as error:
                if not _is_json(line):
                    if line.endswith(b"\n"):
                        torn.append(number)
                    continue
                if error.errors()[0]["type"] == "union_tag_invalid":
                    whole += 1
                    continue
                raise LogError(f"{path}:{number}: {_first(error)}") from error
            whole += 1
            if isinstance(event, Event | Request):
                yield event
    if torn and not whole:
        raise LogError(f"{path}:{torn[0]}: expected a JSON object; is this an event log?")


def torn_lines(torn: list[int]) -> str:
    """Return a sentence about skipped lines; empty if there are none."""
    if not torn:
        return ""
    lines = "1 torn line was" if len(torn) == 1 else f"{len(torn)} torn lines were"
    return f"{lines} skipped (the first: {torn[0]}): the disk was full, or the machine stopped"


def _first(error: ValidationError) -> str:
    first = error.errors()[0]
    field = ".".join(map(str, first["loc"])) or "line"
    if first["type"] == "union_tag_not_found":
        return f'{field}: the key "event" is missing; is this an event log?'
    return f"{field}: {first['msg']}"


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True
