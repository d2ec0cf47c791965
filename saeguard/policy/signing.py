"""Signed policy folders: one manifest lists the files and the digest of each.

The manifest is signed with Ed25519 in a DSSE envelope (the Dead Simple Signing Envelope of
secure-systems-lab, version 1). Its pre-authentication encoding keeps a signature made for
something else from being accepted as one of ours. It names every policy file by the digest of its
bytes and of its content, every feature set by the digest of its content, and a revision that only
rises.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from saeguard.atomic_files import write_atomically
from saeguard.policy.errors import BundleError, PolicyErrors
from saeguard.policy.files import find_files, is_test
from saeguard.policy.signing_keys import load_private_key, load_public_key
from saeguard.policy.types import Policy
from saeguard.yaml_files.findings import Finding
from saeguard.yaml_files.raw import read_bytes
from saeguard.yaml_files.reader import FileKind

BUNDLE = "saeguard.bundle.json"
"""The envelope's name, beside the files that it covers."""
PAYLOAD = "application/vnd.saeguard.bundle.v1+json"
ENVELOPE = FileKind("bundle", max_bytes=16 * 1024 * 1024)


class Manifest(BaseModel):
    """What was signed."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    schema_: str = Field("saeguard.bundle/v1", alias="schema", pattern=r"^saeguard\.bundle/v1$")
    revision: int = Field(ge=1, description="Rises with each bundle; an older one is refused.")
    files: dict[str, str] = Field(description="SHA-256 of every policy and test file, by path.")
    policies: dict[str, str] = Field(description="Digest of each policy file's content, by path.")
    feature_sets: dict[str, str] = Field(description="Digest of each feature set's content.")

    @property
    def digest(self) -> str:
        """Return the digest of the content, by which two manifests of one revision differ."""
        return hashlib.sha256(_canonical(self)).hexdigest()


def _canonical(manifest: Manifest) -> bytes:
    return json.dumps(
        manifest.model_dump(by_alias=True), sort_keys=True, separators=(",", ":")
    ).encode()


def _pae(payload: bytes) -> bytes:
    """Return what DSSE signs: type and body, each with its length."""
    kind = PAYLOAD.encode()
    return b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(payload), payload)


def sign(
    folder: Path,
    policies: Iterable[Policy],
    feature_sets: Mapping[str, str],
    revision: int,
    private_pem: bytes,
) -> Manifest:
    """Write the bundle of a folder's policy files.

    Args:
        folder: of policy files.
        policies: what was loaded from there.
        feature_sets: digest of each feature set that they use.
        revision: higher than that of any bundle before.
        private_pem: the key.

    Raises:
        BundleError: the key is not one for Ed25519.
    """
    key = load_private_key(private_pem)
    manifest = Manifest(
        schema="saeguard.bundle/v1",
        revision=revision,
        files=_file_digests(folder),
        policies={_relative(p.path, folder): p.digest for p in policies},
        feature_sets=dict(feature_sets),
    )
    payload = _canonical(manifest)
    envelope = {
        "payloadType": PAYLOAD,
        "payload": base64.b64encode(payload).decode(),
        "signatures": [{"sig": base64.b64encode(key.sign(_pae(payload))).decode()}],
    }
    write_atomically(folder / BUNDLE, json.dumps(envelope, indent=1) + "\n")
    return manifest


def verify(folder: Path, public_pem: bytes) -> Manifest:
    """Return the manifest of a folder, after checking its signature and files.

    Raises:
        BundleError: the signature is missing, not of this key, or a file is not as signed, is
            missing or was not signed.
    """
    manifest = read_manifest(folder / BUNDLE, public_pem)
    found = _file_digests(folder)
    wrong = [f"{name}: signed, but missing" for name in sorted(manifest.files.keys() - found)]
    wrong += [f"{name}: found, but not signed" for name in sorted(found.keys() - manifest.files)]
    wrong += [
        f"{name}: found sha256 {found[name]}, expected {digest}, which was signed"
        for name, digest in sorted(manifest.files.items())
        if found.get(name, digest) != digest
    ]
    if wrong:
        raise BundleError(
            "\n".join([f"{folder}: not what was signed as revision {manifest.revision}:", *wrong])
        )
    return manifest


def read_manifest(path: Path, public_pem: bytes) -> Manifest:
    """Return the manifest of an envelope, after checking its signature.

    Raises:
        BundleError: it is missing, malformed, or not signed with this key.
    """
    key = load_public_key(public_pem)
    from cryptography.exceptions import InvalidSignature  # noqa: PLC0415 - an extra

    raw = read_bytes(path, ENVELOPE)
    if isinstance(raw, Finding):
        raise BundleError(
            f"{path}: {raw.message}; this server takes signed policies only: sign the folder with "
            "`saeguard policy sign`"
        )
    try:
        envelope = json.loads(raw)
        kind, body = envelope["payloadType"], envelope["payload"]
        payload = base64.b64decode(body, validate=True)
        signatures = [base64.b64decode(s["sig"], validate=True) for s in envelope["signatures"]]
    except (ValueError, KeyError, TypeError, binascii.Error, RecursionError) as error:
        raise BundleError(f"{path}: not a signed bundle ({type(error).__name__})") from error
    if kind != PAYLOAD:
        raise BundleError(f"{path}: payloadType is {kind!r}, expected {PAYLOAD!r}")
    for signature in signatures:
        try:
            key.verify(signature, _pae(payload))
        except InvalidSignature:
            continue
        break
    else:
        raise BundleError(
            f"{path}: none of its {len(signatures)} signatures is by the key that this server "
            "trusts, for this content"
        )
    try:
        return Manifest.model_validate_json(payload)
    except ValidationError as error:
        raise BundleError(f"{path}: signed, but not a manifest: {error}") from error


def claimed_revision(path: Path) -> int:
    """Return the revision in an envelope, whether its signature holds or not; 0 without one."""
    try:
        envelope = json.loads(path.read_bytes())
        return int(json.loads(base64.b64decode(envelope["payload"]))["revision"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def check_loaded(
    manifest: Manifest, folder: Path, policies: Iterable[Policy], feature_sets: Mapping[str, str]
) -> None:
    """Check that what was loaded is what was signed, even if a file has changed in between.

    Raises:
        BundleError: names what differs.
    """
    loaded = {_relative(p.path, folder): p.digest for p in policies}
    if loaded != manifest.policies:
        differ = sorted(
            name
            for name in loaded.keys() | manifest.policies
            if loaded.get(name) != manifest.policies.get(name)
        )
        raise BundleError(f"{folder}: changed while it was read: {', '.join(differ)}")
    for name, digest in feature_sets.items():
        signed = manifest.feature_sets.get(name)
        if signed != digest:
            raise BundleError(
                f"feature set {name}: found content digest {digest}, but {signed} was signed"
            )


def check_revision(manifest: Manifest, seen: tuple[int, str] | None, at_least: int = 1) -> None:
    """Refuse a bundle that is older than one accepted before.

    Args:
        manifest: of the bundle that comes.
        seen: highest revision that was in use here, and its manifest's digest.
        at_least: the operator's minimum, for machines that have accepted none.

    Raises:
        BundleError: names both revisions.
    """
    if manifest.revision < at_least:
        raise BundleError(
            f"the bundle has revision {manifest.revision}, this server takes {at_least} or later"
        )
    if seen is None:
        return
    revision, digest = seen
    if manifest.revision < revision:
        raise BundleError(
            f"the bundle has revision {manifest.revision}, and {revision} was in use here already: "
            "an old bundle is not taken back; sign it anew with a higher revision"
        )
    if manifest.revision == revision and manifest.digest != digest:
        raise BundleError(
            f"revision {revision} was in use here with other content (manifest {digest[:12]}, this "
            f"one {manifest.digest[:12]}): sign each change with a higher revision"
        )


def _file_digests(folder: Path) -> dict[str, str]:
    files, errors = find_files(folder)
    found = {}
    for file in files:
        raw = read_bytes(file)
        if isinstance(raw, Finding):
            errors.append(raw)
        else:
            found[_relative(file, folder)] = hashlib.sha256(raw).hexdigest()
    if not any(not is_test(file) for file in files) and not errors:
        message = "expected policies here, found none"
        errors.append(Finding(folder, 0, 0, "no-policies", message))
    if errors:
        raise PolicyErrors(errors)
    return found


def _relative(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix() if path != folder else path.name


def summary(manifest: Manifest) -> Mapping[str, Any]:
    """Return the facts of a bundle that commands print."""
    return {
        "revision": manifest.revision,
        "manifest": manifest.digest,
        "policies": len(manifest.policies),
        "files": len(manifest.files),
        "feature_sets": manifest.feature_sets,
    }
