"""Read the feature sets of a folder; their checkpoints are not opened."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from saeguard.cli.options import check_feature_sets

if TYPE_CHECKING:
    from saeguard.features.feature_template import TemplateDocument
    from saeguard.features.schema import Document
    from saeguard.policy.errors import PolicyError


@dataclass(frozen=True, slots=True)
class FeatureSets:
    """The feature sets and templates of a folder, by the name that policies use."""

    known: dict[str, Document] = field(default_factory=dict)
    templates: dict[str, TemplateDocument] = field(default_factory=dict)
    broken: dict[str, list[PolicyError]] = field(default_factory=dict)
    """The mistakes in each file that cannot be used."""

    @property
    def mistakes(self) -> list[PolicyError]:
        """The mistakes in all files."""
        return [mistake for of_one in self.broken.values() for mistake in of_one]


def read_feature_sets(folder: Path) -> FeatureSets:
    """Return every feature set and template below `folder`.

    Raises:
        InputError: there is no such folder.
    """
    from saeguard.features.feature_template import read_feature_file
    from saeguard.features.schema import Document, FeatureSetError
    from saeguard.policy.errors import PolicyError, show

    check_feature_sets(folder)
    sets = FeatureSets()
    for path in sorted(folder.rglob("*.yaml")):
        name = path.relative_to(folder).with_suffix("").as_posix()
        try:
            document = read_feature_file(path)
        except FeatureSetError as error:
            messages = str(error).replace(f"{path}: ", "").splitlines()
        else:
            if isinstance(document, Document):
                sets.known[name] = document
            else:
                sets.templates[name] = document
            if document.id == name:
                continue
            messages = [f"the id is {show(document.id)}; name it like its file, {show(name)}"]
        sets.broken[name] = [PolicyError(path, 0, 0, "bad-feature-set", m) for m in messages]
    return sets
