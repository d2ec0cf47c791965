"""The feature sets of a folder, as their files say them; checkpoints are not looked at."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from saeguard.features.feature_template import TemplateDocument
    from saeguard.features.schema import Document
    from saeguard.policy.errors import PolicyError

FeatureSetsOption = Annotated[Path, typer.Option("--feature-sets", help="Folder of feature sets.")]
FEATURE_SETS = Path("feature_sets")


@dataclass(frozen=True, slots=True)
class FeatureSets:
    """What a folder holds, by the name that policies use."""

    known: dict[str, Document] = field(default_factory=dict)
    templates: dict[str, TemplateDocument] = field(default_factory=dict)
    broken: dict[str, list[PolicyError]] = field(default_factory=dict)
    """Why the others cannot be used."""

    @property
    def mistakes(self) -> list[PolicyError]:
        """What is wrong with any of them."""
        return [mistake for of_one in self.broken.values() for mistake in of_one]


def read_feature_sets(folder: Path) -> FeatureSets:
    """Return every feature set and template below `folder`.

    Raises:
        typer.BadParameter: there is no such folder.
    """
    from saeguard.features.feature_template import read_feature_file
    from saeguard.features.schema import Document, FeatureSetError
    from saeguard.policy.errors import PolicyError, show

    if not folder.is_dir():
        raise typer.BadParameter(f"{folder} is no folder; give the folder of feature sets",
                                 param_hint="--feature-sets")  # fmt: skip
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
