"""The page of a feature: its evidence, and how it judges the texts of the index's corpus."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import yaml
from markupsafe import Markup

from saeguard.browse.shown import visible
from saeguard.browse.site import NotThereError, Site
from saeguard.evaluation import svg
from saeguard.features.stats import auroc

SCORES = 2000
"""Scores of one group that the page gets; more are thinned to so many quantiles."""
DIGITS = 4
"""Of a share on the page; all are compared as rounded."""
CURVES = 6
EXAMPLES = 12
"""Texts of a feature that are shown."""


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
