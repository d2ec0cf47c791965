"""The errors of `saeguard.sae`."""

from __future__ import annotations

from typing import ClassVar

from saeguard.errors import COULD_NOT_RUN, InputError


class SaeError(InputError):
    """A checkpoint is missing, damaged or of an unknown format; the message gives the remedy."""


class DownloadError(SaeError):
    """A file of a checkpoint is not in the cache and cannot be downloaded from the hub."""

    exit_code: ClassVar[int] = COULD_NOT_RUN
