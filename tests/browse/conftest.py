"""One hostile site for all tests of the page."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from starlette.testclient import TestClient

from saeguard.browse.server import app
from saeguard.browse.site import Site
from tests.browse.hostile import make_site
from tests.latents.made import Made, make


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A model, its SAE, a corpus and the index of it."""
    return make(tmp_path_factory.mktemp("browse"))


@pytest.fixture(scope="session")
def site(made: Made, tmp_path_factory: pytest.TempPathFactory) -> Site:
    """What the page shows."""
    return make_site(made, tmp_path_factory.mktemp("site"))[0]


@pytest.fixture(scope="session")
def client(made: Made, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    """A client of the page, with a model behind it."""
    with TestClient(
        app(*make_site(made, tmp_path_factory.mktemp("client"))), base_url="http://127.0.0.1"
    ) as client:
        yield client
