"""The addresses of the project; `OWNER` is a placeholder until the project has an owner."""

from __future__ import annotations

DOCS = "https://OWNER.github.io/saeguard"
"""The documentation's site."""
