"""The contents of each view, as plain data for the templates."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby
from operator import attrgetter
from typing import Any

import numpy as np
import yaml
from markupsafe import Markup

from saeguard.browse.shown import shown, visible, words
from saeguard.browse.site import Site
from saeguard.errors import InputError
from saeguard.evaluation import svg
from saeguard.features.stats import auroc
from saeguard.latents.bands import band_name
from saeguard.latents.index import Stats
from saeguard.policy.types import Policy

LISTED = 60
"""Latents of one list."""
SCORES = 2000
"""Scores of one group that the page gets; more are thinned to so many quantiles."""
DIGITS = 4
"""Of a share on the page; all are compared as rounded."""
CURVES = 6
EXAMPLES = 12
"""Texts of a feature that are shown."""


class NotThereError(InputError):
    """There is no such latent, feature, policy or event."""


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


def feature_view(site: Site, name: str) -> dict[str, Any]:
    """Return the page of a feature: evidence, and how it judges the corpus's texts.

    Raises:
        NotThereError: the set has no such feature.
    """
    features = {} if site.features is None else site.features.features
    if name not in features:
        raise NotThereError(f"there is no feature {name!r}")
    feature = features[name]
    indexed = site.index.about["features"]
    found: dict[str, Any] = {"groups": [], "roc": None, "examples": [], "judged": 0}
    same = site.features is not None and (site.index.about["set"] or {}).get("digest")
    stale = bool(same) and site.features is not None and same != site.features.digest
    if name in indexed:
        found = _judged(site, indexed.index(name))
    return {
        "feature": feature,
        "layers": () if site.features is None else site.features.layers_of(feature),
        "evidence": _flat(feature.evidence),
        "snippets": feature.evidence.get("snippets", []),
        "policies": site.policies_of(name),
        "stale": stale,
        **found,
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


def _judged(site: Site, number: int) -> dict[str, Any]:
    """Return how a feature judges the texts of each file, by label."""
    found = site.index.columns(
        "SELECT score.text, share, label FROM score JOIN text USING (text) "
        "WHERE feature = ? ORDER BY share DESC",
        number,
    )
    text, share, label = found["text"], found["share"], found["label"].astype(bool)
    file = site.file_of_text[text]
    groups, curves = [], []
    for i, name in enumerate(site.files):
        here = file == i
        if not here.any():
            continue
        both = label[here].any() and not label[here].all()
        area = float(auroc(share[here], label[here])) if both else None
        groups.append(
            {
                "file": name,
                "positives": _thinned(share[here & label]),
                "negatives": _thinned(share[here & ~label]),
                "auroc": area,
            }
        )
        if both:
            curves.append((area, name, share[here], label[here]))
    curves.sort(key=lambda curve: -abs((curve[0] or 0.0) - 0.5))
    roc = None
    if curves:
        lines = [
            svg.Curve(f"{name}: {area:.2f}", f"c{i}", _roc(of, positive))
            for i, (area, name, of, positive) in enumerate(curves[:CURVES])
        ]
        roc = Markup(  # noqa: S704 - names are escaped where they enter
            svg.plot(
                svg.shares("share of label 0 above the threshold"),
                svg.shares("share of label 1 above the threshold"),
                curves=lines,
                diagonal=True,
                label="ROC curve of each file with both labels",
            )
        )
    return {
        "groups": groups,
        "roc": roc,
        "legend": [(f"c{i}", name, area) for i, (area, name, *_) in enumerate(curves[:CURVES])],
        "judged": len(text),
        "examples": _texts(site, text[:EXAMPLES], share[:EXAMPLES], label[:EXAMPLES]),
    }


def _texts(
    site: Site, text: np.ndarray, share: np.ndarray, label: np.ndarray
) -> list[dict[str, Any]]:
    rows = {
        i: (id_, tokens)
        for i, id_, tokens in site.index.rows(
            "SELECT text, id, tokens[1:90] FROM text WHERE list_contains(?, text)", text.tolist()
        )
    }
    return [
        {
            "id": visible(rows[int(i)][0]),
            "file": site.files[int(site.file_of_text[i])],
            "share": round(float(s), DIGITS),
            "label": int(positive),
            "words": visible("".join(site.index.pieces(rows[int(i)][1])), 600),
        }
        for i, s, positive in zip(text, share, label, strict=True)
    ]


def _thinned(values: np.ndarray) -> list[float]:
    if len(values) > SCORES:
        values = np.quantile(values, np.linspace(0, 1, SCORES))
    out: list[float] = np.round(values.astype(float), DIGITS).tolist()
    return out


def _roc(share: np.ndarray, label: np.ndarray) -> list[tuple[float, float]]:
    order = np.argsort(-share, kind="stable")
    last = np.append(np.flatnonzero(np.diff(share[order])), len(order) - 1)
    true = np.cumsum(label[order])[last] / label.sum()
    false = np.cumsum(~label[order])[last] / (~label).sum()
    return [(0.0, 0.0), *zip(false.tolist(), true.tolist(), strict=True)]


def _flat(evidence: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return evidence as names and values, without snippets."""
    out = []
    for key, value in evidence.items():
        if key != "snippets":
            words_ = yaml.safe_dump(value, default_flow_style=True, width=1000).strip()
            out.append((key.replace("_", " "), visible(words_.removesuffix("\n..."), 600)))
    return out
