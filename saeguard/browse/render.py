"""From the contents of a view to its HTML; addresses differ between a server and an export."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2

from saeguard.browse.shown import unhidden, visible
from saeguard.browse.site import Site
from saeguard.latents.build import index_facts

HERE = Path(__file__).parent
STATIC = HERE / "static"

Address = Callable[..., str]
"""From the kind of a view and its name to its address."""


def served(kind: str, name: object = "") -> str:
    """Return the address of a view on the server."""
    if kind == "home":
        return "/"
    return f"/{kind}/{quote(str(name), safe='')}" if name != "" else f"/{kind}"


def file_name(kind: str, name: object = "") -> str:
    """Return the file of a view in an export, relative to its folder."""
    if kind == "home":
        return "index.html"
    # A name may hold a slash; percent signs in file names would be decoded by browsers.
    plain = "".join(c if c.isalnum() or c in "-_." else f"_{ord(c):x}_" for c in str(name))
    return f"{kind}/{plain}.html" if name != "" else f"{kind}.html"


@cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=unhidden,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["visible"] = visible
    return environment


def render(
    site: Site,
    view: str,
    contents: dict[str, Any],
    *,
    live: bool = False,
    export: str | None = None,
) -> str:
    """Return the HTML of a view.

    Args:
        site: what the page shows.
        view: name of its template.
        contents: of the view.
        live: whether a model can read texts.
        export: the way from the file to the folder of the export, such as `../`; None if served.
    """
    exported = export is not None
    root = "/" if export is None else export
    url: Address = served
    if export is not None:

        def url(kind: str, name: object = "") -> str:
            return f"{export}{file_name(kind, name)}"

    return (
        _environment()
        .get_template(f"{view}.html.j2")
        .render(
            site=site,
            url=url,
            root=root,
            live=live,
            exported=exported,
            policy_meta="",
            about=index_facts(site.index.about),
            dead=site.dead,
            **contents,
        )
    )
