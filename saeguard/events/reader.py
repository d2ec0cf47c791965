"""Read what `saeguard.events.sink` wrote: the events of a log, line by line."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pydantic import ValidationError

from saeguard.errors import InputError
from saeguard.events.schema import LINE, Event


class LogError(InputError):
    """A line of an event log is not understood; names file, line and field."""


def read_log(path: Path) -> Iterator[Event]:
    """Yield the verdicts of an event log in the order they were written.

    A last line that was cut off is left out: a server may be writing it.

    Raises:
        LogError: another line is no event of this version.
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
                told = first["msg"]
                if first["type"] == "union_tag_not_found":
                    told = 'the key "event" is missing; is this an event log?'
                raise LogError(f"{path}:{number}: {field}: {told}") from error
            if isinstance(event, Event):
                yield event
