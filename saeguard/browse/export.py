"""Write the page as static files, which any web server or a folder serves."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from saeguard.browse import views
from saeguard.browse.feature_page import feature_view
from saeguard.browse.render import STATIC, file_name, render
from saeguard.browse.site import Site
from saeguard.errors import InputError


def usual_latents(site: Site, most: int) -> list[int]:
    """Return the latents that features use, and those that fire most often, `most` in all."""
    rows = site.index.rows(
        "SELECT latent FROM latent WHERE tokens > 0 ORDER BY density DESC, latent LIMIT ?", most
    )
    return list(dict.fromkeys([*sorted(site.used_by), *(latent for (latent,) in rows)]))[:most]


def export(
    site: Site,
    folder: Path,
    latents: Sequence[int],
    done: Callable[[int], object] = lambda _count: None,
) -> int:
    """Write the pages of some latents, and of all features, policies and matches.

    Links to other latents lead nowhere and are left out of the start page.

    Args:
        site: what the page shows.
        folder: to be made; it must not exist, or be empty.
        latents: whose pages are written.
        done: called with the number of latents since the last call.

    Returns:
        The number of pages.

    Raises:
        InputError: the folder holds something.
        NotThereError: there is no such latent.
    """
    if folder.exists() and any(folder.iterdir()):
        raise InputError(f"--export: {folder} is not empty; name a new folder")
    (folder / "static").mkdir(parents=True)
    for file in STATIC.iterdir():
        shutil.copyfile(file, folder / "static" / file.name)
    pages = 0

    def write(view: str, contents: dict[str, Any], name: object = "") -> None:
        nonlocal pages
        file = folder / file_name(view, name)
        file.parent.mkdir(exist_ok=True)
        up = "../" if file.parent != folder else ""
        file.write_text(render(site, view, contents, export=up), encoding="utf-8")
        pages += 1

    home = views.home(site) | {"latents": views.listed(site, list(latents))}
    write("home", home)
    for latent in latents:
        write("latent", views.latent_view(site, latent), latent)
        done(1)
    for name in {} if site.features is None else site.features.features:
        write("feature", feature_view(site, name), name)
    for policy in site.policies:
        write("policy", views.policy_view(site, policy.id), policy.id)
    if site.events:
        listed = views.events_view(site)
        write("events", listed)
        for number, _ in listed["events"]:
            write("event", views.event_view(site, number), number)
    return pages
