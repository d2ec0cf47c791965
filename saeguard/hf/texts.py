"""Read texts from JSON lines, CSV or Parquet, and tokenise them as the server would.

A row has an `id` and one of `text`, `prompt` (a string, or a list of chat messages) and `messages`;
the last two may have a `completion`. If `messages` end with the assistant's and there is no
completion, that message is the completion. Chat messages go through the model's chat template with
its generation prompt, and the completion's tokens follow. A `text`, or a completion after an empty
prompt, follows the tokenizer's own prefix (BOS) and counts as output.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saeguard.hf.text_lines import Line, Message, Mistakes, entries, refuse_repeated
from saeguard.hf.text_rows import TextError


class TooLongError(TextError):
    """A text has more tokens than the model takes."""


@dataclass(frozen=True, slots=True)
class Text:
    """One tokenised text with its labels."""

    id: str
    tokens: tuple[int, ...]
    prompt_tokens: int
    """Number of prompt tokens, which come first."""
    label: int = 0
    """1 if the text shows the behaviour, else 0."""
    kind: str = ""
    template: str = ""
    """Texts of one template are near copies, and are resampled together."""
    cut: int = 0
    """Number of tokens that were cut off its end, since the model takes no more."""


def read_texts(path: str | Path, tokenizer: Any) -> list[Text]:
    """Read and tokenise every line of `path`; blank lines are skipped.

    Raises:
        TextError: a line is malformed, an id occurs twice, or a text is longer than the model's
            context.
    """
    texts, mistakes = [], Mistakes(path)
    seen: dict[str, int] = {}
    for number, line in entries(Path(path)):
        try:
            if isinstance(line, TextError):
                raise line
            refuse_repeated(path, number, line.id, seen)
            texts.append(text_of(path, number, line, tokenizer))
        except TextError as error:
            mistakes.add(error)
    mistakes.refuse()
    return texts


def text_of(
    path: str | Path, number: int, line: Line, tokenizer: Any, *, most: int | None = None
) -> Text:
    """Tokenise one line of `path`.

    Args:
        path: of the file.
        number: of the line.
        line: its content.
        tokenizer: the model's.
        most: cut the end off a text of more tokens; None refuses a text that the model does not
            take.

    Raises:
        TextError: it gives no token, or more than the model takes, or the chat template refuses it.
    """
    try:
        prompt, completion = _tokenise(line, tokenizer)
    except (ValueError, TypeError) as error:  # raised by chat templates, too
        raise TextError(f"{path}:{number}: prompt: {error}") from error
    if not prompt and not completion:
        raise TextError(f"{path}:{number}: the text gives no token")
    limit = getattr(tokenizer, "model_max_length", None)
    tokens = (*prompt, *completion)
    if most is None and limit and len(tokens) > limit:
        raise TooLongError(
            f"{path}:{number}: {len(tokens)} tokens; the model takes {limit}; shorten the text"
        )
    kept = tokens[:most]
    template, cut = line.template or line.id, len(tokens) - len(kept)
    before = min(len(prompt), len(kept))
    return Text(line.id, kept, before, line.label, line.kind, template, cut)


def make_text(
    id_: str, tokenizer: Any, prompt: str | Sequence[tuple[str, str]], completion: str
) -> Text:
    """Tokenise one text that does not come from a file.

    Args:
        id_: its name.
        tokenizer: the model's.
        prompt: a text, or the role and content of each message of a chat.
        completion: the answer.

    Raises:
        TextError: the chat template refuses the messages, or there is no token.
    """
    given: Any = prompt
    if not isinstance(prompt, str):
        given = [Message(role=role, content=content) for role, content in prompt]
    try:
        line = Line(id=id_, prompt=given, completion=completion)
        before, after = _tokenise(line, tokenizer)
    except (ValueError, TypeError) as error:  # raised by chat templates, too
        raise TextError(f"{id_}: {error}") from error
    if not before and not after:
        raise TextError(f"{id_}: the text gives no token")
    return Text(id_, (*before, *after), len(before))


def make_turn(id_: str, tokenizer: Any, prompt: str, completion: str) -> Text:
    """Tokenise a prompt and its completion; if the model has a chat template, as a user message.

    Raises:
        TextError: as `make_text`.
    """
    chat = bool(tokenizer.chat_template) and bool(prompt)
    return make_text(id_, tokenizer, [("user", prompt)] if chat else prompt, completion)


def _tokenise(line: Line, tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return the tokens of a line's prompt and of its completion."""

    def ids(text: str, *, special: bool) -> list[int]:
        return list(tokenizer(text, add_special_tokens=special)["input_ids"])

    completion, prompt = line.answer, line.asked
    if isinstance(prompt, str):
        # A prompt that spells BOS out already must not get a second one.
        bos = tokenizer.bos_token
        doubled = bool(bos) and (prompt or completion).startswith(bos)
        return ids(prompt, special=not doubled), ids(completion, special=False)
    rendered = tokenizer.apply_chat_template(
        [message.model_dump() for message in prompt], tokenize=False, add_generation_prompt=True
    )
    return ids(rendered, special=False), ids(completion, special=False)
