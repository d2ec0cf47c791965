"""Serve the page on this machine: one process, nothing from elsewhere.

Any page in the reader's browser may send requests to this machine. So a request must name it by a
loopback address, which a page of another name that was pointed here does not, and what makes the
model work must come from a page of this server.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from saeguard.browse import api, views
from saeguard.browse.feature_page import feature_view
from saeguard.browse.live import Live
from saeguard.browse.render import STATIC, render
from saeguard.browse.site import NotThereError, Site

HOSTS = ["localhost", "127.0.0.1", "[::1]", "::1"]
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src data:; connect-src 'self'; form-action 'self'; base-uri 'none'; "
    "frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}
View = Callable[[Request], dict[str, Any]]


def app(site: Site, live: Live | None = None) -> Starlette:
    """Return the application.

    Args:
        site: what it shows.
        live: reads texts; None: there is no field for them.
    """

    async def map_(request: Request) -> Response:
        return await api.places(site, request)

    async def try_(request: Request) -> Response:
        return await api.read(site, live, request)

    async def missing(request: Request, _error: Exception) -> Response:
        contents = {"message": f"there is no page {request.url.path}"}
        return HTMLResponse(render(site, "error", contents), 404)

    def page(template: str, view: View) -> Callable[[Request], Awaitable[Response]]:
        return _page(site, live, template, view)

    def by_name(make: Callable[[Site, Any], dict[str, Any]], key: str) -> View:
        return lambda request: make(site, request.path_params[key])

    return Starlette(
        routes=[
            Route(
                "/",
                page("home", lambda r: views.home(site, r.query_params.get("q", "")[:200])),
            ),
            Route("/latent/{latent:int}", page("latent", by_name(views.latent_view, "latent"))),
            Route("/feature/{name:path}", page("feature", by_name(feature_view, "name"))),
            Route("/policy/{id:path}", page("policy", by_name(views.policy_view, "id"))),
            Route("/events", page("events", lambda _request: views.events_view(site))),
            Route("/event/{number:int}", page("event", by_name(views.event_view, "number"))),
            Route("/api/map/{latent:int}", map_),
            Route("/api/try", try_, methods=["POST"]),
            Mount("/static", StaticFiles(directory=STATIC)),
        ],
        middleware=[
            Middleware(_WithHeaders),
            Middleware(TrustedHostMiddleware, allowed_hosts=HOSTS),
        ],
        exception_handlers={404: missing},
    )


def _page(
    site: Site, live: Live | None, template: str, view: View
) -> Callable[[Request], Awaitable[Response]]:
    """Return the endpoint of a view; DuckDB and Jinja run in a thread."""

    def make(request: Request) -> Response:
        try:
            contents, status, name = view(request), 200, template
        except NotThereError as error:
            contents, status, name = {"message": str(error)}, 404, "error"
        return HTMLResponse(render(site, name, contents, live=live is not None), status)

    async def endpoint(request: Request) -> Response:
        return await run_in_threadpool(make, request)

    return endpoint


class _WithHeaders:
    """Adds the headers that keep a page to itself to every answer."""

    def __init__(self, inner: ASGIApp) -> None:
        self._inner = inner

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                own = [(k.encode(), v.encode()) for k, v in HEADERS.items()]
                message["headers"] = [*message["headers"], *own]
            await send(message)

        await self._inner(scope, receive, with_headers)
