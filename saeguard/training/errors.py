"""Errors that stop training."""

from __future__ import annotations

from saeguard.errors import CannotRunError, InputError


class TrainingError(InputError):
    """A text file, a setting or a run's folder is wrong; names file, line and field."""


class TrainingCannotRunError(CannotRunError):
    """A package or a model is missing."""
