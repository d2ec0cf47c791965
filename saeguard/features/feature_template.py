"""Feature templates: what a detector is to be made of, where nobody has made it yet.

A policy of the shipped library names features that exist for no model but the reader's own. Such
a feature set is a template, `saeguard.feature-template/v1`: it says for each feature what texts
show it, what texts nearly do, and how to find it. Until somebody has found and calibrated the
features in their own model, policies that use it can be read and tested, and are neither served
nor enforced.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from saeguard.features.schema import Document, Name, read_content, read_document, validated

SCHEMA = "saeguard.feature-template/v1"

Line = Annotated[str, Field(min_length=1, max_length=400)]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class Published(_Strict):
    """A published latent to start from; it holds for one checkpoint, and only after a check."""

    model: Line
    sae: Line
    latents: list[Annotated[int, Field(ge=0)]] = Field(min_length=1)
    grade: Literal["A", "B"] = Field(
        description="A: an independent or causal test exists. B: the authors' own experiment."
    )
    source: Line


class FeatureTemplate(_Strict):
    """One feature that has to be found and calibrated."""

    title: Line
    behaviour: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]
    positives: Line = Field(description="What texts show it.")
    negatives: Line = Field(description="What texts nearly show it, and must stay quiet.")
    published: list[Published] = Field(default_factory=list)

    @property
    def clamp(self) -> tuple[int, ...]:
        """No latents to edit: nobody has found them yet."""
        return ()


class TemplateDocument(_Strict):
    """A whole file."""

    model_config = ConfigDict(populate_by_name=True)

    schema_: Literal["saeguard.feature-template/v1"] = Field(alias="schema")
    id: str = Field(pattern=r"^[a-z0-9][a-z0-9_.-]*(/[a-z0-9][a-z0-9_.-]*)*$", max_length=200)
    title: Line
    features: dict[Name, FeatureTemplate] = Field(min_length=1)


def is_template(path: Path) -> bool:
    """Return whether the first lines of a feature-set file say that it is a template."""
    try:
        with path.open("rb") as file:
            head = file.read(4096).decode("utf-8", "replace")
    except OSError:
        return False
    return any(line.strip() == f"schema: {SCHEMA}" for line in head.splitlines())


def read_feature_file(path: Path) -> Document | TemplateDocument:
    """Read a feature set, or the template of one.

    Raises:
        FeatureSetError: it is neither.
    """
    if is_template(path):
        return validated(TemplateDocument, read_content(path), path)
    return read_document(path)
