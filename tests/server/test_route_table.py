"""The table of routes in the docs holds every route that vLLM has."""

from __future__ import annotations

import json
import subprocess
import sys

from tests.engine import engines
from tests.server import route_table, test_routes

WALK = "import json; from tests.server import route_table as t; print(json.dumps([*t.routes()]))"


def test_every_route_is_in_the_table() -> None:
    """A new one needs a row: whether what it answers is judged, withheld and told."""
    done = subprocess.run(
        [sys.executable, "-c", WALK], cwd=engines.ROOT, env=engines.environment(),
        capture_output=True, text=True, check=True, timeout=600,
    )  # fmt: skip
    found = set(json.loads(done.stdout.splitlines()[-1]))
    assert len(found) > 40
    assert not found - route_table.known(), "vLLM has routes that docs/routes.md does not know"


def test_the_page_is_the_table() -> None:
    """`python -m tests.server.route_table` writes it."""
    assert route_table.PAGE.read_text() == route_table.page()


def test_every_answer_is_asked() -> None:
    """Each route that answers with generated text has a test on a real server."""
    assert all(hasattr(test_routes, row.test) for row in route_table.ANSWERS)
    unasked = (*route_table.NOT_ASKED, *route_table.NONE)
    assert not [row for row in unasked if row.test]
