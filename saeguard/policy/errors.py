"""Errors of policies: mistakes in their files, or in the bundle that signs them."""

from __future__ import annotations

from saeguard.errors import InputError
from saeguard.yaml_files.findings import FindingsError


class PolicyErrors(FindingsError):  # noqa: N818 - the plural says that all of them are here
    """Every mistake in a set of policy, test or access files, in the order of files and lines."""


class BundleError(InputError):
    """The bundle is not what the key's owner signed, or older than one accepted before."""
