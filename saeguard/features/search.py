"""Find what detects a behaviour: single latents, a weighted group, a probe, and controls.

Everything is chosen on the search split. The hold-out split, whose templates and wording are
others, is read once per finalist, for the numbers that are reported.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from saeguard.errors import InputError
from saeguard.features.corpus import Corpus, peaks
from saeguard.features.fit_probe import fit_probe
from saeguard.features.latent_groups import candidates, choose_size, fit_weights
from saeguard.features.probe import Probe
from saeguard.features.stats import auroc, auroc_interval
from saeguard.features.types import Term
from saeguard.features.value import term_values
from saeguard.sae import SaeInfo, encode_latents, max_per_text

CONTROLS = 20
MIN_HOLD_OUT = 20
"""Least number of texts of each label; a smaller hold-out shows nothing."""


class SearchError(InputError):
    """The labelled texts are too few or too similar for a search."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One detector and how well it separates the labels, read as serving reads it."""

    form: str
    """`latent`, `group`, `probe` or `random group`."""
    terms: tuple[Term, ...]
    probe: Probe | None
    auroc_search: float
    auroc_holdout: float
    interval: tuple[float, float]
    """95 %, on the hold-out."""
    auroc_validation: float | None = None
    """On templates of the search split that were left out of the fit: what choices go by."""
    note: str = ""
    """How a probe was fitted, or which of the controls this is."""

    @property
    def name(self) -> str:
        """What the finding is made of."""
        if self.probe is not None:
            return "probe"
        return " + ".join(f"{t.weight:.2g}*{t.latent}" for t in self.terms) or self.form


@dataclass(frozen=True, slots=True)
class Search:
    """The outcome for one behaviour."""

    latents: tuple[Finding, ...]
    """Best first, by the search split."""
    group: Finding
    probe: Finding
    controls: tuple[Finding, ...]

    @property
    def findings(self) -> tuple[Finding, ...]:
        """All findings, in the order of the report."""
        return (self.probe, self.group, *self.latents, *self.controls)

    def report(self) -> list[dict[str, Any]]:
        """Return plain rows, for a file."""
        rows = []
        for finding in self.findings:
            row = {
                "form": finding.form,
                "name": finding.name,
                "detect": {t.latent: round(t.weight, 4) for t in finding.terms},
                "auroc_search": round(finding.auroc_search, 4),
                "auroc_validation": finding.auroc_validation and round(finding.auroc_validation, 4),
                "auroc_holdout": round(finding.auroc_holdout, 4),
                "interval": [round(bound, 4) for bound in finding.interval],
                "note": finding.note,
            }
            rows.append(row)
        return rows


def search(
    info: SaeInfo,
    split: Corpus,
    holdout: Corpus,
    *,
    top: int = 20,
    group_size: int = 8,
    seed: int = 0,
) -> Search:
    """Search `split` for detectors and measure them on `holdout`.

    Args:
        info: the SAE that reads the corpora's residuals.
        split: labelled texts to choose on.
        holdout: labelled texts of other templates.
        top: single latents to report.
        group_size: bound on the latents of a group.
        seed: of resampling and controls.

    Raises:
        SearchError: a label is rare, or the splits share templates.
    """
    _check(split, holdout)
    looked = split.looked
    counts = np.bincount(split.owner, weights=looked, minlength=len(split)).astype(int)
    peak = max_per_text(info, split.at(info.layer)[looked], counts.tolist())
    best = candidates(peak, split.label)

    def group(latents: np.ndarray, size: int, form: str) -> Finding:
        weights = fit_weights(peak[:, latents], split.label, size)
        terms = [Term(int(latents[i]), float(weights[i])) for i in np.flatnonzero(weights)]
        return measure_terms(info, terms, split, holdout, seed, form)

    singles = [
        measure_terms(info, [Term(int(latent), 1.0)], split, holdout, seed, "latent")
        for latent in best[:top]
    ]
    f = encode_latents(info, best.tolist(), split.at(info.layer)).numpy()
    size, validated = choose_size(split, f, peak[:, best], min(group_size, len(best)))
    chosen = replace(group(best, size, "group"), auroc_validation=validated)
    probe, probe_validated = fit_probe(split, seed)
    measured = _measure("probe", (), probe, split, holdout, seed)

    alive = np.flatnonzero((peak > 0).any(0))
    rng = np.random.default_rng(seed)
    random = [
        group(rng.choice(alive, min(size, len(alive)), replace=False), size, "random group")
        for _ in range(CONTROLS)
    ]
    random.sort(key=lambda finding: finding.auroc_search)
    median, strongest = random[len(random) // 2], random[-1]
    return Search(
        latents=tuple(singles),
        group=chosen,
        probe=replace(measured, auroc_validation=probe_validated, note=probe.recipe),
        controls=(
            replace(strongest, note=f"best of {CONTROLS} by the search split"),
            replace(median, note=f"median of {CONTROLS} by the search split"),
        ),
    )


def measure_terms(
    info: SaeInfo,
    terms: Sequence[Term],
    split: Corpus,
    holdout: Corpus,
    seed: int,
    form: str = "group",
) -> Finding:
    """Measure one weighted group of latents on both splits."""
    return _measure(form, tuple(terms), info, split, holdout, seed)


def read_values(info: SaeInfo, terms: Sequence[Term], corpus: Corpus) -> np.ndarray:
    """Return the value [T] float32 of a group of latents at every token."""
    return term_values(
        terms, encode_latents(info, [t.latent for t in terms], corpus.at(info.layer)).numpy()
    )


def _measure(
    form: str,
    terms: tuple[Term, ...],
    reader: SaeInfo | Probe,
    split: Corpus,
    holdout: Corpus,
    seed: int,
) -> Finding:
    def scores(corpus: Corpus) -> np.ndarray:
        if isinstance(reader, Probe):
            return peaks(corpus, reader.logits(corpus.by_layer))
        return peaks(corpus, read_values(reader, terms, corpus))

    held = scores(holdout)
    return Finding(
        form=form,
        terms=terms,
        probe=reader if isinstance(reader, Probe) else None,
        auroc_search=float(auroc(scores(split), split.label)),
        auroc_holdout=float(auroc(held, holdout.label)),
        interval=auroc_interval(held, holdout.label, holdout.template, seed),
    )


def _check(split: Corpus, holdout: Corpus) -> None:
    for name, corpus in (("search", split), ("hold-out", holdout)):
        positives, negatives = int(corpus.label.sum()), int((~corpus.label).sum())
        if min(positives, negatives) < MIN_HOLD_OUT:
            raise SearchError(
                f"the {name} split has {positives} positive and {negatives} negative texts; at "
                f"least {MIN_HOLD_OUT} of each are needed"
            )
    shared = sorted(set(split.template) & set(holdout.template))
    if shared:
        raise SearchError(
            f"the splits share {len(shared)} templates, such as {shared[0]!r}; a hold-out of "
            "near copies would measure memory"
        )
