"""Write the texts that a cut held out, for `saeguard evaluate` to judge."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from pathlib import Path

from saeguard.atomic_files import write_atomically
from saeguard.hf.labelled import behaviour_of
from saeguard.hf.text_rows import TextError


def write_held_out(
    files: Sequence[Path], root: Path, templates: Collection[str], folder: Path
) -> list[Path]:
    """Copy the lines of `files` whose template was held out, and return the files written.

    Each line states its behaviour, so that policies find the datasets of their features.

    Args:
        files: JSON lines, read before without a mistake.
        root: the file or folder that they lie in.
        templates: that were held out.
        folder: keeps the files' paths below `root`.

    Raises:
        TextError: a file cannot be read any more.
        OSError: a file cannot be written.
    """
    written = []
    for file in files:
        try:
            rows = [json.loads(raw) for raw in file.read_text("utf-8").split("\n") if raw.strip()]
        except OSError as error:
            raise TextError(f"{file}: {error.strerror}") from error
        stated = {"behaviour": behaviour_of(file, root)}
        kept = [stated | row for row in rows if (row.get("template") or row["id"]) in templates]
        if not kept:
            continue
        target = folder / (file.name if file == root else file.relative_to(root))
        lines = (json.dumps(row, ensure_ascii=False) for row in kept)
        write_atomically(target, "".join(f"{line}\n" for line in lines))
        written.append(target)
    return written
