"""Read prompts and completions for a comparison, as chats if the model has a chat template.

A string prompt is the user's message. Each arm may add a system message in front.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saeguard.errors import InputError
from saeguard.hf.text_lines import Line, read_lines


@dataclass(frozen=True, slots=True)
class Prompt:
    """One request, and what belongs to it."""

    id: str
    template: str
    """Prompts of one template are near copies, and are resampled together."""
    messages: tuple[Mapping[str, str], ...]
    completion: str = ""
    label: int = 0
    tests: tuple[str, ...] = ()
    """Statements that fail if the code of the answer is wrong."""

    @property
    def question(self) -> str:
        """What the answers to one question share."""
        return json.dumps([self.template, *map(dict, self.messages)])


def read_prompts(path: Path, *, completion: bool = False, tests: bool = False) -> list[Prompt]:
    """Read the prompts of a file.

    Args:
        path: JSON lines.
        completion: each line needs a completion, which is scored.
        tests: each line needs tests.

    Raises:
        TextError: a line is malformed.
        InputError: a line lacks what is needed, or the file is empty.
    """
    found = []
    extra = dict(_tests(path)) if tests else {}
    for number, line in read_lines(path):
        if line.text is not None:
            raise InputError(
                f"{path}:{number}: found text, expected prompt or messages; every line needs one"
            )
        if completion and not line.answer:
            raise InputError(f"{path}:{number}: completion: missing or empty; it is scored here")
        if tests and not extra.get(line.id):
            raise InputError(
                f'{path}:{number}: tests: missing; expected a list such as ["assert f(1) == 2"]'
            )
        found.append(_prompt(line, extra.get(line.id, ())))
    if not found:
        raise InputError(f"{path}: the file holds no prompt")
    return found


def _prompt(line: Line, tests: Sequence[str]) -> Prompt:
    given = line.asked
    messages: tuple[Mapping[str, str], ...]
    if isinstance(given, str):
        messages = ({"role": "user", "content": given},)
    else:
        messages = tuple(message.model_dump() for message in given or ())
    template = line.template or line.id
    return Prompt(line.id, template, messages, line.answer, line.label, tuple(tests))


def _tests(path: Path) -> Mapping[str, Sequence[str]]:
    found: dict[str, Sequence[str]] = {}
    for number, raw in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        try:
            row = json.loads(raw) if raw.strip() else {}
        except ValueError:
            continue  # `read_lines` reports it
        tests = row.get("tests", []) if isinstance(row, dict) else []
        if not isinstance(tests, list) or not all(isinstance(t, str) for t in tests):
            raise InputError(f"{path}:{number}: tests: found {tests!r}; expected a list of texts")
        if isinstance(row, dict) and isinstance(row.get("id"), str | int):
            found[str(row["id"])] = tests
    return found


def tokens_of(prompt: Prompt, tokenizer: Any, system: str | None = None) -> list[int]:
    """Return the token ids of a prompt, ready for an answer.

    Without a chat template, the messages follow each other as paragraphs.
    """
    messages = [dict(message) for message in prompt.messages]
    if not tokenizer.chat_template:
        parts = [*([system] if system else []), *(m["content"] for m in messages)]
        return list(tokenizer("\n\n".join(parts) + "\n")["input_ids"])
    if system is not None:
        if messages and messages[0]["role"] == "system":
            messages[0]["content"] = f"{system}\n{messages[0]['content']}"
        else:
            messages.insert(0, {"role": "system", "content": system})
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return list(tokenizer(rendered, add_special_tokens=False)["input_ids"])


def completion_of(prompt: Prompt, tokenizer: Any) -> list[int]:
    """Return the token ids of a prompt's completion."""
    return list(tokenizer(prompt.completion, add_special_tokens=False)["input_ids"])
