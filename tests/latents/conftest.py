"""One index for all tests of latents."""

from __future__ import annotations

import pytest

from tests.latents.made import Made, make


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A model, its SAE, a corpus and the index of it."""
    return make(tmp_path_factory.mktemp("latents"))
