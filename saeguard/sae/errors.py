"""The errors of `saeguard.sae`."""

from __future__ import annotations

from typing import ClassVar

from saeguard.errors import COULD_NOT_RUN, InputError


class SaeError(InputError):
    """A checkpoint is missing, damaged or of a format that cannot be read; says what to do."""


class DownloadError(SaeError):
    """A file of a checkpoint is neither in the cache nor to be had from the hub."""

    exit_code: ClassVar[int] = COULD_NOT_RUN
