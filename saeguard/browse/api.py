"""What the page asks for after it is shown: places on a map, and a text read by the model."""

from __future__ import annotations

from pydantic import ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from saeguard.browse.live import LONGEST, Asked, Live
from saeguard.browse.site import Site
from saeguard.errors import InputError, SaeguardError

MOST_BYTES = 8 * LONGEST
"""Of a request's body."""


class _RefusedError(SaeguardError):
    """A request is not answered."""

    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status = status


async def places(site: Site, request: Request) -> Response:
    """Return a latent and its neighbours with their places on a map."""
    latent = request.path_params["latent"]
    if site.info is None or not 0 <= latent < site.index.d_sae:
        return JSONResponse({"error": "there is no map"}, 404)
    return JSONResponse({"places": await run_in_threadpool(site.map_of, latent)})


async def read(site: Site, live: Live | None, request: Request) -> Response:
    """Return what fired on each token of a text."""
    if live is None:
        return JSONResponse({"error": "no model is loaded; start with --model"}, 404)
    try:
        asked = await _asked(request)
        highest = None if asked.latent is None else site.index.stats(asked.latent).highest
        return JSONResponse(await run_in_threadpool(live.read, asked, highest))
    except _RefusedError as error:
        return JSONResponse({"error": str(error)}, error.status)
    except SaeguardError as error:
        return JSONResponse({"error": str(error)}, 400)


async def _asked(request: Request) -> Asked:
    if not _own(request):
        raise _RefusedError(403, "only this server's own pages may ask")
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > MOST_BYTES:
            raise _RefusedError(413, f"expected {LONGEST:,} characters at most")
    try:
        return Asked.model_validate_json(bytes(body))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "body"
        raise InputError(f"{where}: {first['msg']}") from error


def _own(request: Request) -> bool:
    """Return whether a request comes from a page of this server, or from no page at all."""
    if request.headers.get("content-type", "").partition(";")[0] != "application/json":
        return False  # what a form of another site may send without asking
    origin = request.headers.get("origin")
    return origin is None or origin == f"{request.url.scheme}://{request.headers['host']}"
