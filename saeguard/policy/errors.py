"""The exception that policy, test and access files raise."""

from __future__ import annotations

from saeguard.yaml_files.findings import FindingsError


class PolicyErrors(FindingsError):  # noqa: N818 - the plural says that all of them are here
    """Every mistake in some policy, test or access files, in the order of files and lines."""
