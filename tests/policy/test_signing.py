"""Signed folders: what was signed is taken, and nothing else."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from saeguard.policy import signing, signing_keys
from saeguard.policy.errors import PolicyErrors
from saeguard.policy.load import load_policies
from saeguard.policy.signing import BUNDLE, BundleError, Manifest
from tests.models import write_policy

PRIVATE, PUBLIC = signing_keys.keygen()
OTHER, _ = signing_keys.keygen()
SETS = {"tiny": "a" * 64}


def signed(folder: Path, revision: int = 3, key: bytes = PRIVATE, above: float = 0.5) -> Manifest:
    """Write two policies and sign them."""
    for name in ("one", "two"):
        write_policy(
            folder / f"{name}.yaml", detect={"a": {"feature": "f0", "above": above}}, condition="a"
        )
    return signing.sign(folder, load_policies(folder), SETS, revision, key)


def test_what_was_signed_is_taken(tmp_path: Path) -> None:
    """The manifest that comes out is the one that went in."""
    manifest = signed(tmp_path)
    assert signing.verify(tmp_path, PUBLIC) == manifest
    assert set(manifest.files) == {"one.yaml", "two.yaml"}
    signing.check_loaded(manifest, tmp_path, load_policies(tmp_path), SETS)


def edit_envelope(folder: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    """Change what the bundle's file says."""
    envelope = json.loads((folder / BUNDLE).read_text())
    edit(envelope)
    (folder / BUNDLE).write_text(json.dumps(envelope))


def _payload(envelope: dict[str, Any], **fields: Any) -> None:
    content = {**json.loads(base64.b64decode(envelope["payload"])), **fields}
    envelope["payload"] = base64.b64encode(json.dumps(content).encode()).decode()


def _swap(folder: Path) -> None:
    one, two = (folder / "one.yaml").read_bytes(), (folder / "two.yaml").read_bytes()
    (folder / "one.yaml").write_bytes(two)
    (folder / "two.yaml").write_bytes(one)


def _link(folder: Path) -> None:
    elsewhere = folder.parent / "elsewhere.yaml"
    elsewhere.write_text((folder / "one.yaml").read_text().replace("0.5", "0.9"))
    (folder / "one.yaml").unlink()
    (folder / "one.yaml").symlink_to(elsewhere)


ATTACKS: dict[str, tuple[Callable[[Path], object], str]] = {
    "stripped": (lambda f: (f / BUNDLE).unlink(), "takes signed policies only"),
    "no signatures": (lambda f: edit_envelope(f, lambda e: e.update(signatures=[])), "none of its"),
    "emptied": (lambda f: (f / BUNDLE).write_text(""), "not a signed bundle"),
    "cut off": (
        lambda f: (f / BUNDLE).write_text((f / BUNDLE).read_text()[:-40]),
        "not a signed bundle",
    ),
    "other key": (lambda f: signed(f, key=OTHER), "none of its 1 signatures is by the key"),
    "other type": (
        lambda f: edit_envelope(f, lambda e: e.update(payloadType="text/plain")),
        "payloadType",
    ),
    "raised revision": (
        lambda f: edit_envelope(f, lambda e: _payload(e, revision=99)),
        "none of its 1 signatures",
    ),
    "altered": (
        lambda f: (f / "one.yaml").write_text((f / "one.yaml").read_text().replace("0.5", "0.9")),
        "one.yaml: found sha256",
    ),
    "comment": (
        lambda f: (f / "one.yaml").write_text("# hello\n" + (f / "one.yaml").read_text()),
        "one.yaml: found sha256",
    ),
    "swapped": (_swap, "one.yaml: found sha256"),
    "extra": (
        lambda f: (f / "three.yaml").write_text((f / "one.yaml").read_text()),
        "three.yaml: found, but not signed",
    ),
    "extra folder": (
        lambda f: write_policy(f / "more" / "x.yaml", detect={}, condition="a"),
        "more/x.yaml: found, but not signed",
    ),
    "removed": (lambda f: (f / "two.yaml").unlink(), "two.yaml: signed, but missing"),
    "truncated": (lambda f: (f / "two.yaml").write_text(""), "two.yaml: found sha256"),
    "link": (_link, "one.yaml: found sha256"),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_anything_else_is_refused(attack: str, tmp_path: Path) -> None:
    """Each change of files or signature is refused, and the message says which."""
    folder = tmp_path / "policies"
    signed(folder)
    act, reason = ATTACKS[attack]
    act(folder)
    with pytest.raises(BundleError, match=reason):
        signing.verify(folder, PUBLIC)


def test_a_folder_that_is_gone(tmp_path: Path) -> None:
    """There is nothing to take."""
    with pytest.raises((BundleError, PolicyErrors)):
        signing.verify(tmp_path / "nothing", PUBLIC)


def test_links_to_what_was_signed_are_taken(tmp_path: Path) -> None:
    """Kubernetes mounts files as links; their content is what counts."""
    real = tmp_path / "real"
    manifest = signed(real)
    folder = tmp_path / "mounted"
    folder.mkdir()
    for file in real.iterdir():
        (folder / file.name).symlink_to(file)
    assert signing.verify(folder, PUBLIC) == manifest


def test_a_change_while_reading_is_refused(tmp_path: Path) -> None:
    """What was loaded is compared with what was signed, not only what lay there before."""
    manifest = signed(tmp_path)
    signed(tmp_path, above=0.9)
    with pytest.raises(BundleError, match=r"changed while it was read: one\.yaml, two\.yaml"):
        signing.check_loaded(manifest, tmp_path, load_policies(tmp_path), SETS)


def test_another_feature_set_is_refused(tmp_path: Path) -> None:
    """Ranges and latents decide as much as thresholds do."""
    manifest = signed(tmp_path)
    for found in ({"tiny": "b" * 64}, {"tiny": "a" * 64, "other": "c" * 64}):
        with pytest.raises(BundleError, match="feature set"):
            signing.check_loaded(manifest, tmp_path, load_policies(tmp_path), found)


def test_an_old_bundle_is_not_taken_back(tmp_path: Path) -> None:
    """Lower revisions are replays; the same revision with other content is one of two."""
    older, newer = signed(tmp_path, 3), signed(tmp_path, 4, above=0.6)
    twin = signed(tmp_path, 4, above=0.7)
    signing.check_revision(older, None)
    signing.check_revision(newer, (older.revision, older.digest))
    signing.check_revision(newer, (newer.revision, newer.digest))
    seen = (newer.revision, newer.digest)
    with pytest.raises(BundleError, match="revision 3, and 4 was in use"):
        signing.check_revision(older, seen)
    with pytest.raises(BundleError, match="revision 4 was in use here with other content"):
        signing.check_revision(twin, seen)
    with pytest.raises(BundleError, match="takes 7 or later"):
        signing.check_revision(newer, None, at_least=7)


@pytest.mark.parametrize("pem", [b"", b"nonsense", PRIVATE])
def test_what_is_no_public_key(pem: bytes) -> None:
    """A server must not start with a key that verifies nothing."""
    with pytest.raises(BundleError, match="public key"):
        signing_keys.load_public_key(pem)
