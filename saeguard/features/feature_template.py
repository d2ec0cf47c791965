"""Feature templates: what a feature must detect, for a model where it was not calibrated yet.

A policy of the shipped library names features that exist in the reader's own model only. The
feature set of such a policy is a template, `saeguard.feature-template/v1`: it says for each feature
which texts show it and which texts nearly do. Policies that use a template can be checked and
tested, but are neither served nor enforced until the features have been found and calibrated.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from saeguard.features.schema import NAME, SET_ID, Name
from saeguard.yaml_files.findings import Finding
from saeguard.yaml_files.raw import read_bytes
from saeguard.yaml_files.reader import FileKind
from saeguard.yaml_files.section import Section

SCHEMA = "saeguard.feature-template/v1"
HEAD = FileKind("first lines", max_bytes=4095)

Line = Annotated[str, Field(min_length=1, max_length=400)]


class FeatureTemplate(Section):
    """One feature that must be found and calibrated."""

    title: Line
    behaviour: Annotated[str, Field(pattern=NAME)]
    positives: Line = Field(description="What texts show it.")
    negatives: Line = Field(description="What texts nearly show it, and must stay quiet.")

    @property
    def clamp(self) -> tuple[int, ...]:
        """The latents to edit: a template has none."""
        return ()


class FeatureTemplateFile(Section):
    """A template file."""

    schema_: Literal["saeguard.feature-template/v1"] = Field(alias="schema")
    id: str = Field(pattern=SET_ID, max_length=200)
    title: Line
    features: dict[Name, FeatureTemplate] = Field(min_length=1)


def is_template(path: Path) -> bool:
    """Return whether the first lines of a feature-set file say that it is a template."""
    head = read_bytes(path, HEAD)
    if isinstance(head, Finding):
        return False
    lines = head.decode("utf-8", "replace").splitlines()
    return any(line.strip() == f"schema: {SCHEMA}" for line in lines)
