"""Child processes that hold vLLM, quick to start and to end.

With torch and vLLM loaded, collecting garbage takes a quarter of the time of the imports, and an
interpreter takes several seconds to take itself apart. Neither is what the tests are about.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

from tests import engine_starts


def run(main: Callable[..., None], *arguments: Any) -> NoReturn:
    """Run a child's main function and end the process at once, with status 1 if it raised."""
    gc.disable()
    code = 0
    try:
        main(*arguments)
    except BaseException:  # noqa: BLE001 - the process ends here
        traceback.print_exc()
        code = 1
    if multiprocessing.active_children():  # other ranks: Python ends them as it exits
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def said(choice: Any) -> dict[str, Any] | None:
    """Return what an answer says of its request, without the request's id: two can be compared."""
    found = getattr(choice, "saeguard", None)
    return None if found is None else {k: v for k, v in found.items() if k != "request_id"}


def ready() -> None:
    """Record that the engine can serve, and collect garbage from now on."""
    gc.freeze()
    gc.enable()
    engine_starts.record("ready")
