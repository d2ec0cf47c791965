"""Write a recording text by text, so that it need not fit in memory and a run can be cut off.

The sections of the part files are the tensors of the recording, and one JSON line for each text.
`write` joins them to one safetensors file (https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from typing import Any

import numpy as np

from saeguard.errors import InputError
from saeguard.part_files import PartFiles
from saeguard.policy_tools.record_features import Recorded
from saeguard.policy_tools.recording import SCHEMA

TEXTS = "texts.jsonl"
SECTIONS = ("values", "evaluable", "massive", "roles", TEXTS)
LARGEST_HEADER = 100_000_000
"""Bytes; readers of safetensors refuse a longer header, which holds the ids and the texts."""


def add(parts: PartFiles, text: Recorded) -> None:
    """Add one text."""
    about = {
        "id": text.text.id,
        "tokens": len(text.values),
        "prompt_tokens": text.text.prompt_tokens,
        "pieces": text.pieces,
    }
    parts.add(
        text.values.astype("<f4").tobytes(),
        text.evaluable.astype(bool).tobytes(),
        text.massive.astype(bool).tobytes(),
        b"" if text.roles is None else text.roles.tobytes(),
        json.dumps(about).encode() + b"\n",
    )


def write(
    parts: PartFiles, definitions: Mapping[str, str], *, model: str, no_roles: str
) -> tuple[int, int]:
    """Join the sections to the recording, and remove them; the disk holds both for a moment.

    Args:
        parts: with every text.
        definitions: `set/feature` of each column, with the digest of what it is made of.
        model: name of the model that read the texts.
        no_roles: why there are no roles; empty if there are.

    Returns:
        The number of texts, and of tokens.

    Raises:
        InputError: ids and texts exceed what the file's header may hold.
    """
    parts.flush()
    ids: list[str] = []
    pieces: list[str] = []
    lengths, prompts, with_text = [], [], False
    with parts.path(TEXTS).open("rb") as lines:
        for line in lines:
            about = json.loads(line)
            ids.append(about["id"])
            lengths.append(about["tokens"])
            prompts.append(about["prompt_tokens"])
            if about["pieces"] is not None:
                with_text = True
                pieces += about["pieces"]
    tokens = sum(lengths)
    kept = {
        "schema": SCHEMA,
        "model": model,
        "ids": json.dumps(ids),
        "definitions": json.dumps(dict(definitions)),
        **({"pieces": json.dumps(pieces)} if with_text else {}),
        **({"no_roles": no_roles} if no_roles else {}),
    }
    shapes: dict[str, tuple[str, list[int]]] = {
        "lengths": ("I64", [len(ids)]),
        "prompt_tokens": ("I64", [len(ids)]),
        "values": ("F32", [tokens, len(definitions)]),
        "evaluable": ("BOOL", [tokens]),
        "massive": ("BOOL", [tokens]),
        **({} if no_roles else {"roles": ("U8", [tokens])}),
    }
    header = _header(kept, shapes)
    if len(header) > LARGEST_HEADER:
        what = "ids and texts" if with_text else "ids"
        raise InputError(
            f"{parts.out}: the {what} take {len(header):,} bytes, expected at most "
            f"{LARGEST_HEADER:,}; record fewer texts" + (" or leave out --with-text" * with_text)
        )
    whole = parts.folder / "whole"
    with whole.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.write(np.array([*lengths, *prompts], "<i8").tobytes())
        for name in list(shapes)[2:]:
            with parts.path(name).open("rb") as section:
                shutil.copyfileobj(section, file)
    parts.finish(whole)
    return len(ids), tokens


SIZES = {"I64": 8, "F32": 4, "BOOL": 1, "U8": 1}


def _header(kept: Mapping[str, str], shapes: Mapping[str, tuple[str, list[int]]]) -> bytes:
    header: dict[str, Any] = {"__metadata__": kept}
    end = 0
    for name, (dtype, shape) in shapes.items():
        start, end = end, end + SIZES[dtype] * int(np.prod(shape))
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    written = json.dumps(header).encode()
    return written + b" " * (-len(written) % 8)
