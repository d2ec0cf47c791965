"""The base of every exception that saeguard raises, and the exit code of each kind.

This module imports nothing of the package, so that every other module can import it.
"""

from __future__ import annotations

from typing import ClassVar

FINDINGS = 1
"""The command ran and found what it looks for: a mistake, a failed case, a refused reload."""
BAD_INPUT = 2
"""The command, or a file or folder named in it, is wrong, so there is no result."""
COULD_NOT_RUN = 3
"""Something that the command needs is missing: a package, a running server, a place to write."""


class SaeguardError(Exception):
    """The guard cannot go on; `str()` says what was found, where, and what to do."""

    exit_code: ClassVar[int] = BAD_INPUT
    """What a command that ends with this error exits with."""


class InputError(SaeguardError, ValueError):
    """A file, a setting or an argument is wrong."""


class CannotRunError(SaeguardError, RuntimeError):
    """Something that the guard needs is missing or does not work."""

    exit_code: ClassVar[int] = COULD_NOT_RUN
