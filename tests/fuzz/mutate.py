"""Spoil a good policy file at four levels: tree, token, text, byte.

Each function takes a file and a source of chance, and returns another file. What comes out is
nearly a policy, so that it gets past the first checks and reaches the later ones.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from typing import Any, TypeAlias

import yaml

Mutator: TypeAlias = Callable[[bytes, random.Random], bytes]

PIECES = (
    "&a ", "*a", "!!str ", "!", "!!python/object:os.system ", "<<: ", "? ", ": ", "- ", "[", "]",
    "{", "}", "'", '"', "%", "#", "no", "~", "1e9", "0x4", "---", "...", ">-", "|", "|2", "not ",
    "(", ")", " of ", "any", "and", "or", "2 of (", "999999999999999999999", ".nan", "-.inf", "é",
    "😀", "\\", "\t", "\n", "\n---\n",
    '"\\U99999999"', "%YAML 1.2\n---\n", "\n  ", "1:30", "2027-02-30", "0.9x3", "0x99999", "TODO",
)  # fmt: skip
CONTROL = "\0\r\x1b\x85\u2028\u202e\ufeff\ud800\uffff"
"""Each ends the reading at once, so they are put in rarely."""
VALUES = (
    None, True, False, 0, -1, 1, 64, 65, 4097, 10**30, 0.5, -0.0, 1e308, float("nan"),
    float("inf"), "", "a", "no", "2 of (a, b)", "x" * 300, [], {}, [[]], {"": {}},
    "not " * 30, "(" * 300, "a and " * 150 + "a",
)  # fmt: skip
TOKEN = re.compile(r"[A-Za-z0-9_.-]+|\s+|.", re.DOTALL)
MAX_BYTES = 4096


def mutate(raw: bytes, chance: random.Random) -> bytes:
    """Return `raw` after one to three changes, each at a level of its own."""
    for _ in range(chance.choices((1, 2, 3), weights=(4, 2, 1))[0]):
        raw = chance.choices((tree, tokens, text, octets), weights=(6, 5, 3, 1))[0](raw, chance)
    return raw[:MAX_BYTES]


def tree(raw: bytes, chance: random.Random) -> bytes:
    """Replace, drop, rename or double one value, at any depth."""
    try:
        data = yaml.load(raw, yaml.CSafeLoader)
        spoilt = _spoilt(data, chance)
        flow = chance.choice((None, True, False))
        return yaml.dump(
            spoilt,
            Dumper=yaml.CSafeDumper,
            allow_unicode=True,
            sort_keys=False,
            default_flow_style=flow,
        ).encode()
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError, AttributeError, TypeError):
        return text(raw, chance)  # spoilt before in a way that only the loader has to stand


def _spoilt(data: Any, chance: random.Random) -> Any:
    if not isinstance(data, dict | list) or not data or chance.random() < 0.15:
        return chance.choice((*VALUES, [data], {"a": data}))
    keys = list(data) if isinstance(data, dict) else list(range(len(data)))
    key = chance.choice(keys)
    action = chance.random()
    if action < 0.7:
        data[key] = _spoilt(data[key], chance)
    elif action < 0.8:
        del data[key]
    elif isinstance(data, list):
        data.insert(key, data[key])
    else:
        data[chance.choice((f"{key}s", chance.choice(keys), "for", 1, None))] = data.pop(key)
    return data


def tokens(raw: bytes, chance: random.Random) -> bytes:
    """Swap, drop, double or replace words and signs."""
    parts = TOKEN.findall(raw.decode("utf-8", "replace"))
    if not parts:
        return text(raw, chance)
    a, b = chance.randrange(len(parts)), chance.randrange(len(parts))
    match chance.randrange(4):
        case 0:
            parts[a], parts[b] = parts[b], parts[a]
        case 1:
            parts[a] = chance.choice(PIECES)
        case 2:
            parts.insert(a, parts[b])
        case _:
            del parts[a : a + chance.randint(1, 6)]
    return "".join(parts).encode("utf-8", "surrogatepass")


def text(raw: bytes, chance: random.Random) -> bytes:
    """Cut a piece out, double it, or put another in its place."""
    whole = raw.decode("utf-8", "replace")
    a = chance.randint(0, len(whole))
    b = min(len(whole), a + chance.randint(0, 30))
    one = chance.choice(CONTROL) if chance.random() < 0.1 else chr(chance.randrange(32, 0x3000))
    piece = chance.choice((*PIECES, whole[a:b] * 2, one, ""))
    return (whole[:a] + piece + whole[b:]).encode("utf-8", "surrogatepass")


def octets(raw: bytes, chance: random.Random) -> bytes:
    """Flip, insert or drop single bytes, whatever they mean."""
    out = bytearray(raw or b"\n")
    for _ in range(chance.randint(1, 3)):
        at = chance.randrange(len(out))
        match chance.randrange(3):
            case 0:
                out[at] ^= 1 << chance.randrange(8)
            case 1:
                out.insert(at, chance.randrange(256))
            case _:
                del out[at]
                out = out or bytearray(b"\n")
    return bytes(out)
