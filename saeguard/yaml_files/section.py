"""The strict base of every file model, and what name patterns ask for in words."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

FORMS: dict[str, str] = {}
"""What each pattern asks for, in words for error messages; the models' modules fill it."""


class Section(BaseModel):
    """A mapping in which every key is known, every type exact and every number finite."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)
