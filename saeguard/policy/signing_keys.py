"""Ed25519 keys for signed policy folders; they need the package `cryptography`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from saeguard.errors import CannotRunError
from saeguard.policy.errors import BundleError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import (
        Ed25519PrivateKey,
        Ed25519PublicKey,
    )


def keygen() -> tuple[bytes, bytes]:
    """Return a new private and public key, PEM."""
    from cryptography.hazmat.primitives import serialization as s  # noqa: PLC0415 - an extra
    from cryptography.hazmat.primitives.asymmetric.ed25519 import (  # noqa: PLC0415
        Ed25519PrivateKey,
    )

    key = Ed25519PrivateKey.generate()
    private = key.private_bytes(s.Encoding.PEM, s.PrivateFormat.PKCS8, s.NoEncryption())
    public = key.public_key().public_bytes(s.Encoding.PEM, s.PublicFormat.SubjectPublicKeyInfo)
    return private, public


def load_private_key(pem: bytes) -> Ed25519PrivateKey:
    """Return the key that bundles are signed with.

    Raises:
        BundleError: it is not a private key for Ed25519.
    """
    from cryptography.hazmat.primitives.asymmetric.ed25519 import (  # noqa: PLC0415 - an extra
        Ed25519PrivateKey,
    )
    from cryptography.hazmat.primitives.serialization import (  # noqa: PLC0415
        load_pem_private_key,
    )

    try:
        key = load_pem_private_key(pem, password=None)
    except (ValueError, TypeError) as error:
        raise BundleError(
            f"the private key cannot be read; make one with `policy keygen`: {error}"
        ) from error
    if not isinstance(key, Ed25519PrivateKey):
        raise BundleError("the private key is not one for Ed25519; make one: `policy keygen`")
    return key


def load_public_key(pem: bytes) -> Ed25519PublicKey:
    """Return the key that bundles are verified with.

    Raises:
        BundleError: it is not a public key for Ed25519.
        CannotRunError: `cryptography` is missing.
    """
    try:
        from cryptography.hazmat.primitives.asymmetric.ed25519 import (  # noqa: PLC0415 - an extra
            Ed25519PublicKey,
        )
        from cryptography.hazmat.primitives.serialization import (  # noqa: PLC0415
            load_pem_public_key,
        )
    except ImportError as error:
        raise CannotRunError(
            "signed bundles need the package `cryptography`: pip install 'saeguard[sign]'"
        ) from error
    try:
        key = load_pem_public_key(pem)
    except ValueError as error:
        raise BundleError(
            f"the public key cannot be read; give the .pub of `policy keygen`: {error}"
        ) from error
    if not isinstance(key, Ed25519PublicKey):
        raise BundleError("the public key is not one for Ed25519; make one: `policy keygen`")
    return key
