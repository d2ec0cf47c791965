"""Find what a feature-set file does not pin; neither torch nor the checkpoint is needed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from saeguard.features.schema import FeatureSetFile, SaePart
from saeguard.real_path import real_path
from saeguard.yaml_files.findings import Finding
from saeguard.yaml_files.reader import Document, Loc


def missing_pins(content: FeatureSetFile, folder: Path) -> Iterator[tuple[str, str, Loc]]:
    """Yield each digest that a feature-set file does not pin: its key, of what, its section.

    Args:
        content: the file.
        folder: that it lies in.
    """
    if content.model.sha256 is None:
        yield "sha256", "the model's weights", ("model",)
    sae = content.sae
    if sae is None:
        return
    if sae.sha256 is None:
        yield "sha256", "the SAE's weights", ("sae",)
    if sae.config_sha256 is None and _has_config(folder, sae):
        yield "config_sha256", "the SAE's configuration", ("sae",)


def _has_config(folder: Path, sae: SaePart) -> bool:
    """Return whether a checkpoint has a configuration; True if it is not at hand."""
    if sae.path is None:
        return True
    at = folder / sae.path
    return not at.is_dir() or any(at.glob("*.json"))


def unpinned(content: FeatureSetFile, document: Document) -> Iterator[Finding]:
    """Yield a warning for each digest that a feature-set file does not pin.

    A published set was never calibrated, so nothing in it rests on what lies here.
    """
    if content.status == "published":
        return
    for key, what, section in missing_pins(content, real_path(document.path).parent):
        message = (
            f'the key "{key}" is missing, the digest of {what}: with others, the same features '
            "would mean something else; `saeguard features calibrate` and `features pin` write it"
        )
        finding = document.error("not-pinned", message, section, at_key=True)
        yield replace(finding, level="warning")
