"""Compare a feature set's checkpoint and probes with the digests and sizes that its file pins."""

from __future__ import annotations

import errno
import hashlib
from collections.abc import Iterator
from pathlib import Path

from saeguard.features.files import FeatureSetError
from saeguard.features.types import FeatureSet
from saeguard.sae import SaeError
from saeguard.yaml_files.findings import Finding
from saeguard.yaml_files.reader import Document


def verify_pins(features: FeatureSet, document: Document) -> None:
    """Check that a feature set's checkpoint and probes are those that its file names.

    Args:
        features: as loaded.
        document: its file, for positions.

    Raises:
        FeatureSetError: names the field and both values.
    """
    for finding in _checkpoint(features, document):
        raise FeatureSetError([finding])
    probes = list(_probes(features, document))
    if probes:
        raise FeatureSetError(probes)


def file_digest(path: Path) -> str:
    """Return the sha256 of a file.

    Raises:
        OSError: it cannot be read, or is no regular file, which would be waited for.
    """
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _checkpoint(features: FeatureSet, document: Document) -> Iterator[Finding]:
    pinned = features.sae
    if pinned is None:
        return
    try:
        found = pinned.inspect()
    except SaeError as error:
        message = f"sae.path: the checkpoint cannot be read: {error}"
        yield document.error("no-checkpoint", message, ("sae", "path"))
        return
    keys = ["layer", "d_in", "d_sae"]
    # Hashing is last: it reads all of the file.
    keys += [key for key in ("config_sha256", "sha256") if getattr(pinned, key) is not None]
    for key in keys:
        if getattr(pinned, key) != getattr(found, key):
            message = (
                f"sae.{key} is {getattr(pinned, key)}, but {found.path} has {getattr(found, key)}; "
                "the features hold only for the checkpoint they were found in"
            )
            yield document.error("other-checkpoint", message, ("sae", key))
            return


def _probes(features: FeatureSet, document: Document) -> Iterator[Finding]:
    for feature in features.features.values():
        if feature.probe is None:
            continue
        here = ("features", feature.id, "probe")
        field = ".".join(here)
        try:
            digest = file_digest(feature.probe.path)
        except OSError as error:
            message = f"{field}.file: {feature.probe.path}: {error.strerror}; copy it there"
            yield document.error("other-probe", message, (*here, "file"))
            continue
        if digest != feature.probe.sha256:
            message = (
                f"{field}.sha256 is {feature.probe.sha256}, but {feature.probe.path} has {digest}; "
                "the feature holds only for the probe it was calibrated with"
            )
            yield document.error("other-probe", message, (*here, "sha256"))
