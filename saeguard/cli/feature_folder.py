"""Read the feature sets of a folder; their checkpoints are not opened."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from saeguard.cli.options import check_feature_sets

if TYPE_CHECKING:
    from saeguard.features.feature_template import FeatureTemplateFile
    from saeguard.features.schema import FeatureSetFile
    from saeguard.yaml_files.findings import Finding


@dataclass(frozen=True, slots=True)
class FeatureSets:
    """The feature sets and templates of a folder, by the name that policies use."""

    known: dict[str, FeatureSetFile] = field(default_factory=dict)
    templates: dict[str, FeatureTemplateFile] = field(default_factory=dict)
    broken: dict[str, list[Finding]] = field(default_factory=dict)
    """The mistakes in each file that cannot be used."""

    @property
    def mistakes(self) -> list[Finding]:
        """The mistakes in all files."""
        return [mistake for of_one in self.broken.values() for mistake in of_one]


def read_feature_sets(folder: Path) -> FeatureSets:
    """Return every feature set and template below `folder`.

    Raises:
        InputError: there is no such folder.
    """
    from saeguard.features.files import FeatureSetError, other_id, read_feature_file
    from saeguard.features.schema import FeatureSetFile

    check_feature_sets(folder)
    sets = FeatureSets()
    for path in sorted(folder.rglob("*.yaml")):
        name = path.relative_to(folder).with_suffix("").as_posix()
        try:
            document = read_feature_file(path)
        except FeatureSetError as error:
            sets.broken[name] = list(error.errors)
        else:
            if isinstance(document, FeatureSetFile):
                sets.known[name] = document
            else:
                sets.templates[name] = document
            if document.id != name:
                sets.broken[name] = [other_id(path, document.id, name)]
    return sets
