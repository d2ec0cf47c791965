"""Write plain data as YAML that `reader` reads back as the same data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from saeguard.yaml_files.scalars import CONTROL, AmbiguousError, plain


class _Dumper(yaml.SafeDumper):
    """The safe dumper, except that it quotes texts which some readers take for something else."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    text = CONTROL.sub("\ufffd", text)
    try:
        style = None if plain(text, exponents=True) == text else "'"
    except AmbiguousError:
        style = "'"
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)


def as_yaml(data: Mapping[str, Any]) -> str:
    """Return `data` as YAML; invisible characters, which the reader refuses, become U+FFFD."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
