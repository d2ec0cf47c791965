"""The canonical layout of a policy or test file: order of keys, blank lines, ends of lines.

Works on the text between the marks of the top-level keys, so that comments, quotes and folding
stay as their author wrote them. The content never changes: if the digest would differ, the file
stays as it is.
"""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

from saeguard.policy.errors import PolicyErrors
from saeguard.policy.load import digest
from saeguard.policy.schema import PolicyFile
from saeguard.policy_tools.test_case_schema import CaseFile
from saeguard.yaml_files.reader import Document, read_document
from saeguard.yaml_files.section import Section

MODELINE = "# yaml-language-server:"


def laid_out(path: Path, raw: bytes) -> str:
    """Return a file's text in the canonical layout.

    Keys stand in the order of the language's reference, each with the comments above it; blank
    lines and trailing white space go, as do byte order marks and carriage returns. A document in
    one pair of braces keeps its order.

    Args:
        path: for messages; `.test.yaml` marks tests.
        raw: the file.

    Raises:
        PolicyErrors: it is not YAML as policies are written.
    """
    document = read_document(path, raw)
    if document.errors:
        raise PolicyErrors(document.errors)
    model: type[Section] = CaseFile if path.name.endswith(".test.yaml") else PolicyFile
    order = [field.alias or name for name, field in model.model_fields.items()]
    text = _joined(document, order)
    again = read_document(path, text.encode())
    # A blank line inside quotes, or kept behind a block of text, is content.
    same = not again.errors and digest(again.data) == digest(document.data)
    return text if same else document.text


def _joined(document: Document, order: list[str]) -> str:
    starts = _key_lines(document)
    lines = _stripped(document)
    if not starts:
        return "\n".join(lines).strip("\n") + "\n"
    head, blocks, tail = _blocks(lines, starts)
    known = {key: i for i, key in enumerate(order)}
    blocks.sort(key=lambda block: known.get(block[0], len(known)))
    kept = [*head, *(line for _, block in blocks for line in block), *tail]
    return "\n".join(kept) + "\n"


def _key_lines(document: Document) -> dict[str, int]:
    """Return the line of each top-level key, counted from 0; empty in flow style."""
    marks = {loc[0]: mark for loc, mark in document.keys.items() if len(loc) == 1}
    lines = [mark.line for mark in marks.values()]
    block = all(mark.column == 1 for mark in marks.values()) and len(set(lines)) == len(lines)
    return {str(key): mark.line - 1 for key, mark in marks.items()} if block else {}


def _stripped(document: Document) -> list[str]:
    """Return the lines without trailing white space, but for those inside of a text."""
    inside: set[int] = set()
    for loc, mark in document.values.items():
        if isinstance(document.at(loc), str):
            first = document.text.count("\n", 0, mark.start)
            inside.update(range(first, document.text.count("\n", 0, max(mark.start, mark.end - 1))))
            if document.text[mark.start : mark.start + 1] in {"|", ">"}:  # to its last line
                inside.update(range(first, document.text.count("\n", 0, mark.end) + 1))
    lines = document.text.split("\n")
    return [line if i in inside else line.rstrip() for i, line in enumerate(lines)]


def _blocks(
    lines: list[str], starts: dict[str, int]
) -> tuple[list[str], list[tuple[str, list[str]]], list[str]]:
    """Split the lines into those kept at the top, one block per key, and those kept at the end."""
    found = sorted(starts.items(), key=lambda item: item[1])
    first = _above(lines, found[0][1], 0)
    # A modeline, and comments set off by a blank line, belong to the file and not to a key.
    while first < found[0][1] and _of_file(lines, first, found[0][1]):
        first += 1
    head = [line for line in lines[:first] if line]
    blocks = []
    cut = first
    ends = [_above(lines, then, here + 1) for (_, here), (_, then) in pairwise(found)]
    for (key, _), end in zip(found, [*ends, len(lines)], strict=True):
        blocks.append((key, lines[cut:end]))
        cut = end
    key, last = blocks[-1]
    end = len(last)
    while end > 1 and (not last[end - 1] or last[end - 1].startswith("#")):
        end -= 1
    blocks[-1] = (key, last[:end])
    tail = [line for line in last[end:] if line]
    return head, [(key, _trimmed(block)) for key, block in blocks], tail


def _above(lines: list[str], key: int, least: int) -> int:
    """Return the first line of the comments directly above the key in line `key`."""
    at = key
    while at > least and (lines[at - 1].startswith("#") or not lines[at - 1]):
        at -= 1
    return at


def _of_file(lines: list[str], at: int, key: int) -> bool:
    blank_follows = any(not line for line in lines[at:key])
    return lines[at].startswith(MODELINE) or not lines[at] or blank_follows


def _trimmed(block: list[str]) -> list[str]:
    """Drop blank lines, unless they are part of a text in block style."""
    text = "\n".join(block)
    if re.search(r"[|>][-+0-9]*\s*(#.*)?$", text, re.MULTILINE):
        return [*_leading(block), *_body(block)]
    return [line for line in block if line]


def _leading(block: list[str]) -> list[str]:
    return [line for line in block[: _start(block)] if line]


def _body(block: list[str]) -> list[str]:
    body = block[_start(block) :]
    while body and not body[-1]:
        body.pop()
    return body


def _start(block: list[str]) -> int:
    return next(i for i, line in enumerate(block) if line and not line.startswith("#"))
