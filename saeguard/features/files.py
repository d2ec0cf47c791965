"""Read feature sets and their templates from YAML, with the place of every mistake."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

from saeguard.features.consistency import contradictions, disagreements
from saeguard.features.feature_template import SCHEMA as TEMPLATE
from saeguard.features.feature_template import FeatureTemplateFile, is_template
from saeguard.features.schema import SCHEMA, FeatureSetFile
from saeguard.yaml_files.findings import Finding, FindingsError, show
from saeguard.yaml_files.raw import read_bytes
from saeguard.yaml_files.reader import Document, FileKind, read_document
from saeguard.yaml_files.scalars import describe
from saeguard.yaml_files.section import Section
from saeguard.yaml_files.validate import merged, shape

KIND = FileKind("feature set", max_bytes=8 << 20, max_depth=12, max_values=400_000, numbers=True)
"""Snippets, measured rates and thresholds of many latents need room."""

F = TypeVar("F", bound=Section)


class FeatureSetError(FindingsError):
    """A feature-set file is wrong, or does not fit its SAE; findings name file and line."""


def read_feature_set_file(path: Path) -> FeatureSetFile:
    """Read and check the file at `path`; its checkpoint is not looked at.

    Raises:
        FeatureSetError: every mistake in the file.
    """
    return read_with_positions(path)[0]


def read_with_positions(path: Path, *, unfinished: bool = False) -> tuple[FeatureSetFile, Document]:
    """Read and check the file at `path`; also return where each of its values stands.

    Args:
        path: of the file.
        unfinished: accept a set that is still to be calibrated; values that it lacks are NaN.

    Raises:
        FeatureSetError: every mistake in the file.
    """
    return _read(path, FeatureSetFile, contradictions if unfinished else disagreements)


def read_feature_file(path: Path) -> FeatureSetFile | FeatureTemplateFile:
    """Read a feature set, or the template of one.

    Raises:
        FeatureSetError: every mistake in the file.
    """
    if is_template(path):
        return _read(path, FeatureTemplateFile, lambda _content, _document: ())[0]
    return read_feature_set_file(path)


def other_id(path: Path, found: str, name: str) -> Finding:
    """Return a finding about a file whose id is not its name, by which policies refer to it.

    Args:
        path: the file.
        found: its id.
        name: its path below the folder of feature sets, without `.yaml`.
    """
    raw = read_bytes(path, KIND)
    message = f"found {show(found)}, expected the name of its file, {show(name)}"
    if isinstance(raw, Finding):
        return Finding(path, 0, 0, "set-id", message)
    return read_document(path, raw, KIND).error("set-id", message, ("id",))


def _read(
    path: Path, model: type[F], check: Callable[[F, Document], Iterable[Finding]]
) -> tuple[F, Document]:
    raw = read_bytes(path, KIND)
    if isinstance(raw, Finding):
        raise FeatureSetError([raw])
    document = read_document(path, raw, KIND)
    if document.data is None:
        raise FeatureSetError(document.errors)
    if model is FeatureSetFile:
        _check_schema(document)
    content, misshapen = shape(model, document)
    errors = merged(document, misshapen)
    if content is not None and not errors:
        errors = list(check(content, document))
    if errors or content is None:
        raise FeatureSetError(errors)
    return content, document


def _check_schema(document: Document) -> None:
    """Refuse a file of another schema at once: each of its keys would be a mistake."""
    found = document.data.get("schema", SCHEMA) if isinstance(document.data, dict) else SCHEMA
    if found == SCHEMA:
        return
    shown = show(found) if isinstance(found, str) else describe(found)
    message = f"found {shown}, expected {SCHEMA}"
    if found == TEMPLATE:
        message += "; the features of a template must be found and calibrated first"
    raise FeatureSetError([document.error("not-allowed", message, ("schema",))])
