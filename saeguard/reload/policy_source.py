"""Read the policies and feature sets that the settings name: verify, check and compile them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from saeguard.errors import InputError
from saeguard.features.files import KIND
from saeguard.features.load import load_feature_set
from saeguard.features.types import FeatureSet
from saeguard.file_marks import marks
from saeguard.guard.build_watchlist import build_watchlist
from saeguard.guard.watchlist import WatchList
from saeguard.policy import signing
from saeguard.policy.access import UNRESTRICTED, Access, check_against
from saeguard.policy.errors import PolicyErrors
from saeguard.policy.lint import leave_out_templates
from saeguard.policy.load import Cache, load_policies
from saeguard.policy.signing import Manifest
from saeguard.policy.weak import weak
from saeguard.reload.file_watcher import fingerprint
from saeguard.yaml_files.findings import Finding
from saeguard.yaml_files.raw import read_bytes


class SourceError(InputError):
    """The operator's settings name files or policies that do not exist."""


ATTEMPTS = 50
"""Most attempts to read files that keep changing while they are read."""


@dataclass(frozen=True, slots=True)
class Source:
    """The operator's settings about policies."""

    policies: Path
    feature_sets: Path
    may_enforce: frozenset[str] = frozenset()
    access: Access = UNRESTRICTED
    public_key: bytes | None = None
    """PEM; None if bundles need no signature. Read once, so that it cannot change later."""


class Loaded(NamedTuple):
    """The result of one reading."""

    watchlist: WatchList
    """The watch list in terms of its own columns, not those of the taps."""
    manifest: Manifest | None
    """The signed manifest; None if bundles need no signature."""
    left_out: tuple[str, ...] = ()
    """Ids of policies whose feature set is still an uncalibrated template."""
    weak: tuple[str, ...] = ()
    """Reasons for which policies in shadow, or those that accept it, would guard nothing."""


@dataclass(slots=True)
class ReadCache:
    """Caches files by content, since most are unchanged at the next reading."""

    policies: Cache = field(default_factory=dict)
    feature_sets: dict[Path, tuple[Any, FeatureSet]] = field(default_factory=dict)


def load(source: Source, known: ReadCache | None = None) -> Loaded:
    """Read all files and compile them.

    If a file changes meanwhile, everything is read again. Otherwise files from before a change
    could be combined with files from after it.

    Args:
        source: the settings.
        known: files that were read before.

    Raises:
        PolicyErrors, FeatureSetError, WatchListError, BundleError, SourceError: with file,
            line and reason.
    """
    known = known or ReadCache()
    roots = (source.policies, source.feature_sets)
    before = fingerprint(roots)
    for _ in range(ATTEMPTS):
        loaded: Loaded | None = None
        wrong: Exception | None = None
        try:
            loaded = _load(source, known)
        except Exception as error:  # noqa: BLE001 - a file may have changed meanwhile
            wrong = error
        after = fingerprint(roots)
        if after == before:
            if wrong is not None:
                raise wrong
            assert loaded is not None
            return loaded
        before = after
    raise SourceError(f"{source.policies}: the files change faster than they can be read")


def _load(source: Source, known: ReadCache) -> Loaded:
    manifest = None
    if source.public_key is not None:
        manifest = signing.verify(source.policies, source.public_key)
    found = load_policies(source.policies, known.policies)
    policies, notes = leave_out_templates(found, source.feature_sets)
    if not policies:
        raise SourceError(
            f"additional-config: saeguard.policies: no policies to serve in {source.policies}; "
            "name a policy file or a directory of *.yaml files whose features are calibrated"
        )
    check_against(source.access, policies)
    ids = {p.id for p in policies}
    unknown = source.may_enforce - ids
    if unknown:
        raise SourceError(
            "additional-config: saeguard.request_may_enforce: no policy has the id "
            f"{', '.join(sorted(unknown))}; loaded: {', '.join(sorted(ids))}"
        )
    names = sorted({p.feature_set for p in policies})
    sets = {name: _feature_set(source.feature_sets / f"{name}.yaml", known) for name in names}
    if manifest is not None:
        digests = {name: features.digest for name, features in sets.items()}
        signing.check_loaded(manifest, source.policies, found, digests)
    may_enforce = source.may_enforce | source.access.ever_enforced(ids)
    doubts = [f for p in policies for f in weak(p, sets[p.feature_set], may_enforce)]
    refused = [finding for finding in doubts if finding.level == "error"]
    if refused:
        raise PolicyErrors(refused)
    left_out = tuple(sorted({p.id for p in found} - ids)) if notes else ()
    return Loaded(
        build_watchlist(policies, sets, may_enforce=may_enforce),
        manifest,
        left_out,
        tuple(finding.render() for finding in doubts),
    )


def _feature_set(path: Path, known: ReadCache) -> FeatureSet:
    """Return a feature set, from the cache if it and the files that it names are unchanged."""
    raw = read_bytes(path, KIND)
    if isinstance(raw, Finding):
        return load_feature_set(path)  # which reports the error
    content = hashlib.sha256(raw).digest()
    before = known.feature_sets.get(path)
    if before is not None:
        key, features = before
        if key == (content, _stamp(features)):
            return features
    features = load_feature_set(path)
    known.feature_sets[path] = ((content, _stamp(features)), features)
    return features


def _stamp(features: FeatureSet) -> tuple[Any, ...]:
    """Return values that change if a file that a feature set names does."""
    files: list[Path] = []
    if features.sae is not None:
        sae = features.sae.path
        files = sorted(sae.rglob("*")) if sae.is_dir() else [sae]
    files += sorted({f.probe.path for f in features.features.values() if f.probe is not None})
    stamps = []
    for file in files:
        try:
            status = file.stat()
        except OSError:
            stamps.append((str(file), 0, 0, 0, 0))
            continue
        stamps.append((str(file), *marks(status)))
    return tuple(stamps)
