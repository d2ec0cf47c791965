"""The contents of each view, as plain data for the templates."""

from __future__ import annotations

from itertools import groupby
from operator import attrgetter
from typing import Any

import numpy as np
from markupsafe import Markup

from saeguard.browse.shown import shown, visible, words
from saeguard.browse.site import NotThereError, Site
from saeguard.evaluation import svg
from saeguard.latents.bands import band_name
from saeguard.latents.index import Stats
from saeguard.policy.types import Policy

LISTED = 60
"""Latents of one list."""


def home(site: Site, query: str = "") -> dict[str, Any]:
    """Return the start page: what is there, and the latents that were searched for."""
    index = site.index
    rows = index.rows("SELECT latent FROM latent ORDER BY density DESC LIMIT ?", LISTED)
    found = index.search(query, LISTED) if query.strip() else [latent for (latent,) in rows]
    names = {} if site.features is None else site.features.features
    lowered = query.strip().lower()
    features = [
        feature
        for name, feature in names.items()
        if lowered in f"{name} {feature.title} {feature.behaviour}".lower()
    ]
    return {
        "query": query,
        "latents": listed(site, found),
        "features": features,
        "policies": [p for p in site.policies if lowered in f"{p.id} {p.title}".lower()],
        "events": len(site.events),
        "density": _densities(site),
    }


def listed(site: Site, latents: list[int]) -> list[dict[str, Any]]:
    """Return a row for each latent: density, maximum, features and likelier tokens."""
    wanted = {"latent": np.array(latents, np.int32), "place": np.arange(len(latents))}
    if not latents:
        return []
    with site.index.cursor() as cursor:
        cursor.register("wanted", wanted)
        rows = cursor.execute(
            "SELECT latent, density, highest, up FROM wanted JOIN latent USING (latent) "
            "JOIN lens USING (latent) ORDER BY place"
        ).fetchall()
    return [
        {
            "latent": latent,
            "density": density,
            "highest": highest,
            "tokens": words(site.index.pieces(up[:5])),
            "features": [feature.id for feature, *_ in site.used_by.get(latent, ())],
        }
        for latent, density, highest, up in rows
    ]


def latent_view(site: Site, latent: int) -> dict[str, Any]:
    """Return the page of a latent.

    Raises:
        NotThereError: there is no such latent.
    """
    if not 0 <= latent < site.index.d_sae:
        raise NotThereError(f"there is no latent {latent}; the SAE has 0 to {site.index.d_sae - 1}")
    stats = site.index.stats(latent)
    up, down = site.index.lens(latent)
    company = site.index.coactive(latent, most=12)
    near = site.neighbours(latent)
    beside = dict.fromkeys([*(c.latent for c in company), *(n.latent for n in near)])
    facts = {row["latent"]: row for row in listed(site, list(beside))}
    uses = site.used_by.get(latent, ())
    return {
        "stats": stats,
        "histogram": _histogram(stats),
        "bands": _bands(site, stats),
        "up": list(zip(words(t for t, _ in up), [v for _, v in up], strict=True)),
        "down": list(zip(words(t for t, _ in down), [v for _, v in down], strict=True)),
        "company": [(c, facts[c.latent]) for c in company],
        "neighbours": [(n, facts[n.latent]) for n in near],
        "uses": uses,
        "policies": [p for f, *_ in uses for p in site.policies_of(f.id)],
        "last": site.index.d_sae - 1,
    }


def policy_view(site: Site, id_: str) -> dict[str, Any]:
    """Return the page of a policy: its file, its features, and its events.

    Raises:
        NotThereError: there is no such policy.
    """
    found: Policy | None = next((p for p in site.policies if p.id == id_), None)
    if found is None:
        raise NotThereError(f"there is no policy {id_!r}")
    events = [(i, e) for i, e in enumerate(site.events) if e.policy == id_]
    counts: dict[str, int] = {}
    for _, event in events:
        counts[event.verdict] = counts.get(event.verdict, 0) + 1
    matches = [(i, e) for i, e in events if e.verdict == "match"]
    return {
        "policy": found,
        "source": visible(found.path.read_text(encoding="utf-8"), 20_000).replace("\u21b5", ""),
        "counts": counts,
        "matches": matches[-LISTED:][::-1],
    }


def events_view(site: Site) -> dict[str, Any]:
    """Return the list of events, newest first, matches only."""
    found = [(i, e) for i, e in enumerate(site.events) if e.verdict == "match"]
    return {"events": found[-LISTED:][::-1], "all": len(site.events), "matches": len(found)}


def event_view(site: Site, number: int) -> dict[str, Any]:
    """Return the page of an event: which features fired where, and their latents.

    Raises:
        NotThereError: the log has no such line.
    """
    if not 0 <= number < len(site.events):
        raise NotThereError(f"there is no event {number}; the log has {len(site.events)} verdicts")
    event = site.events[number]
    known = {} if site.features is None else site.features.features
    same = [
        (i, e)
        for i, e in enumerate(site.events)
        if e.request_id == event.request_id and i != number
    ]
    return {
        "event": event,
        "number": number,
        "fired": [(name, fired, known.get(name)) for name, fired in event.features.items()],
        "others": same[:LISTED],
        "skipped": event.coverage.skipped.model_dump(exclude_none=True),
    }


def _histogram(stats: Stats) -> Markup | None:
    if not stats.histogram:
        return None
    first, last = stats.histogram[0][0], stats.histogram[-1][1]
    bins = round(4 * np.log2(last / first))
    heights = [0.0] * bins
    for low, _, count in stats.histogram:
        heights[round(4 * np.log2(low / first))] = float(count)
    tallest = max(heights)
    ticks = [
        (2.0**i, f"{2.0**i:g}")
        for i in range(int(np.ceil(np.log2(first))), int(np.floor(np.log2(last))) + 1)
    ]
    chart = svg.plot(
        svg.Axis("activation", first, last, ticks, log=True),
        svg.Axis("tokens", 0, tallest * 1.08, [(0, "0"), (tallest, f"{int(tallest):,}")]),
        bars=[svg.Bars(f"{stats.tokens:,} tokens", "latent", heights)],
        label=f"activations of latent {stats.latent}",
    )
    return Markup(chart)  # noqa: S704 - of numbers


def _bands(site: Site, stats: Stats) -> list[dict[str, Any]]:
    highest = stats.highest or 1.0
    examples = site.index.examples(stats.latent)
    ids = dict(
        site.index.rows(
            "SELECT text, id FROM text WHERE list_contains(?, text)", [e.text for e in examples]
        )
    )
    return [
        {
            "name": band_name(band),
            "examples": [
                {
                    "id": visible(ids[e.text]),
                    "file": site.files[int(site.file_of_text[e.text])],
                    "value": e.value,
                    "cut": e.start > 0,
                    "tokens": shown(e, site.index.pieces(e.tokens), highest),
                }
                for e in some
            ],
        }
        for band, some in groupby(examples, attrgetter("band"))
    ]


def _densities(site: Site) -> Markup:
    values = site.index.columns("SELECT density FROM latent WHERE tokens > 0")["density"]
    logs = np.log10(np.maximum(values, 1e-7))
    counts, _ = np.histogram(logs, bins=28, range=(-7, 0))
    tallest = max(1, int(counts.max(initial=0)))
    chart = svg.plot(
        svg.Axis(
            "share of tokens on which a latent fires",
            1e-7,
            1,
            [(10.0**i, f"1e{i}" if i else "1") for i in range(-7, 1)],
            log=True,
        ),
        svg.Axis("latents", 0, tallest * 1.08, [(0, "0"), (tallest, f"{tallest:,}")]),
        bars=[svg.Bars("latents", "latent", counts.astype(float).tolist())],
        label="how often latents fire",
    )
    return Markup(chart)  # noqa: S704 - of numbers
