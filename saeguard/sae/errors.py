"""What is raised where a checkpoint cannot be read rightly."""

from __future__ import annotations

from saeguard.errors import InputError


class SaeError(InputError):
    """A checkpoint is missing, damaged or of a form that cannot be read; says what to do."""
