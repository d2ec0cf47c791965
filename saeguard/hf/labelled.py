"""Labelled texts of a file or a folder, in groups that each become one feature."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from saeguard.features.corpus import Scope
from saeguard.features.cut import PARTS
from saeguard.features.found import feature_name
from saeguard.hf.text_rows import TextError
from saeguard.hf.texts import Text, read_texts
from saeguard.real_path import real_path

Per = Literal["file", "behaviour", "kind"]


@dataclass(frozen=True, slots=True)
class Group:
    """Texts of one feature."""

    name: str
    """Of the feature."""
    behaviour: str
    kind: str
    """The only kind of positives among them, if the group is one kind's; else empty."""
    texts: tuple[Text, ...]

    @property
    def counts(self) -> tuple[int, int]:
        """Number of texts that show the behaviour, and of those that do not."""
        positives = sum(text.label for text in self.texts)
        return positives, len(self.texts) - positives


def text_files(path: Path, without: Sequence[Path] = ()) -> list[Path]:
    """Return a file, or all `*.jsonl` below a folder, but not those below `without`.

    Raises:
        TextError: there is none.
    """
    if path.is_file():
        return [path]
    left_out = [real_path(folder) for folder in without]
    files = [
        file
        for file in sorted(path.rglob("*.jsonl"))
        if not any(real_path(file).is_relative_to(folder) for folder in left_out)
    ]
    if not files:
        raise TextError(f"{path}: expected files *.jsonl, found none")
    return files


def read_groups(root: Path, files: Sequence[Path], tokenizer: Any, per: Per) -> list[Group]:
    """Return the groups of labelled texts, in the order of files.

    The behaviour of a file is the name of its folder below `root`, or its own without `.search`
    and `.holdout` if it lies in `root`.

    Args:
        root: the file or folder that was named.
        files: below it.
        tokenizer: the model's.
        per: what becomes one feature: a file, all files of a behaviour, or a kind of positives of a
            file with all negatives of that file.

    Raises:
        TextError: a line is wrong.
    """
    groups: dict[str, Group] = {}
    for file in files:
        behaviour = behaviour_of(file, root)
        texts = [t for t in read_texts(file, tokenizer) if t.tokens]
        for found in _groups(file, behaviour, texts, per):
            group = found
            known = groups.get(group.name)
            if known is not None and known.behaviour != group.behaviour:
                group = replace(group, name=feature_name(group.behaviour, group.name))
                known = groups.get(group.name)
            texts_of_both = (*(known.texts if known else ()), *group.texts)
            groups[group.name] = replace(group, texts=texts_of_both)
    return list(groups.values())


def behaviour_of(file: Path, root: Path) -> str:
    """Return the behaviour of a file's texts; see `read_groups`."""
    return _stem(file) if root in (file, file.parent) else file.parent.name


def _groups(file: Path, behaviour: str, texts: Sequence[Text], per: Per) -> Iterator[Group]:
    if per == "behaviour":
        yield Group(feature_name(behaviour), behaviour, "", tuple(texts))
    elif per == "file":
        yield Group(feature_name(_stem(file)), behaviour, "", tuple(texts))
    else:
        for kind in dict.fromkeys(text.kind for text in texts if text.label):
            some = tuple(text for text in texts if not text.label or text.kind == kind)
            yield Group(feature_name(_stem(file), kind), behaviour, kind, some)


def _stem(file: Path) -> str:
    return file.stem.removesuffix(".search").removesuffix(".holdout")


def by_part(texts: Sequence[Text], part: Mapping[str, int]) -> list[list[Text]]:
    """Return the texts of each part, by the part of each template."""
    return [[t for t in texts if part[t.template] == i] for i in range(len(PARTS))]


def counts_of(texts: Sequence[Text], part: Mapping[str, int]) -> list[tuple[int, int]]:
    """Return by part how many texts show the behaviour, and how many do not."""
    labels = [[bool(t.label) for t in of] for of in by_part(texts, part)]
    return [(sum(of), len(of) - sum(of)) for of in labels]


def in_scope(text: Text, scope: Scope) -> bool:
    """Return whether a text has a token in scope."""
    prompt, tokens = text.prompt_tokens, len(text.tokens)
    return {"prompt": prompt > 0, "output": tokens > prompt}.get(scope, tokens > 0)
