"""Read what an event log says of requests, line by line."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from pydantic import ValidationError

from saeguard.errors import InputError
from saeguard.events.record_schema import LINE, Event, Request


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


def read_log(path: Path) -> Iterator[Event | Request]:
    """Yield the verdicts and the requests of an event log in the order of its lines.

    An incomplete last line is skipped, since a server may be writing it.

    Raises:
        LogError: another line is not an event of this schema version.
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                event = LINE.validate_json(line)
            except ValidationError as error:
                if not line.endswith(b"\n"):
                    return
                first = error.errors()[0]
                field = ".".join(map(str, first["loc"])) or "line"
                message = first["msg"]
                if first["type"] == "union_tag_not_found":
                    message = 'the key "event" is missing; is this an event log?'
                raise LogError(f"{path}:{number}: {field}: {message}") from error
            if isinstance(event, Event | Request):
                yield event
