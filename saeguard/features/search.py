"""Find what detects a behaviour: single latents, a weighted group, a probe, and controls.

Everything is chosen on the search split. The hold-out split, whose templates and wording are
others, is read once per finalist, for the numbers that are reported.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from saeguard.errors import InputError
from saeguard.features.corpus import Corpus, peaks
from saeguard.features.fit_probe import fit_probe
from saeguard.features.latent_groups import candidates, choose_size, fit_weights
from saeguard.features.probe import Probe
from saeguard.features.reading import PEAK, Reading
from saeguard.features.stats import auroc, auroc_interval
from saeguard.features.types import Term
from saeguard.features.value import term_values
from saeguard.sae import SaeInfo, encode_latents, max_per_text

CONTROLS = 20
TOKENS = 1 << 17
"""Tokens that all latents are computed on at a time."""
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
    reading: Reading = PEAK
    """How a text is judged by its tokens' values."""

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that a probe reads; empty for latents, which read the SAE's."""
        return () if self.probe is None else self.probe.layers

    @property
    def name(self) -> str:
        """What the finding is made of."""
        if self.probe is not None:
            return f"layer {', '.join(map(str, self.layers))}"
        return " + ".join(f"{t.weight:.2g}*{t.latent}" for t in self.terms) or self.form


@dataclass(frozen=True, slots=True)
class Search:
    """The outcome for one behaviour."""

    probe: Finding
    """The best by templates left out of the fit."""
    other_probes: tuple[Finding, ...] = ()
    """On the other choices of layers."""
    group: Finding | None = None
    """None without an SAE; so are latents and controls."""
    latents: tuple[Finding, ...] = ()
    """Best first, by the search split."""
    controls: tuple[Finding, ...] = ()

    @property
    def findings(self) -> tuple[Finding, ...]:
        """All findings, in the order of the report."""
        group = () if self.group is None else (self.group,)
        return (self.probe, *self.other_probes, *group, *self.latents, *self.controls)

    def report(self) -> list[dict[str, Any]]:
        """Return plain rows, for a file."""
        rows = []
        for finding in self.findings:
            row = {
                "form": finding.form,
                "name": finding.name,
                "layers": list(finding.layers),
                "detect": {t.latent: round(t.weight, 4) for t in finding.terms},
                "auroc_search": round(finding.auroc_search, 4),
                "auroc_validation": finding.auroc_validation and round(finding.auroc_validation, 4),
                "auroc_holdout": round(finding.auroc_holdout, 4),
                "interval": [round(bound, 4) for bound in finding.interval],
                "reading": finding.reading.words,
                "note": finding.note,
            }
            if finding.probe is not None:
                probe = finding.probe
                row["probe"] = {
                    "layers": list(probe.layers),
                    "weight": probe.w.tolist(),
                    "bias": probe.b,
                }
            rows.append(row)
        return rows


def search(
    info: SaeInfo | None,
    split: Corpus,
    holdout: Corpus,
    *,
    layers: Sequence[int] | None = None,
    top: int = 20,
    group_size: int = 8,
    seed: int = 0,
    readings: Sequence[Reading] = (PEAK,),
) -> Search:
    """Search `split` for detectors and measure them on `holdout`.

    Args:
        info: the SAE that reads the corpora's residuals; without one only probes are searched.
        split: labelled texts to choose on.
        holdout: labelled texts of other templates.
        layers: for probes: each of them alone, and all together. None for the SAE's.
        top: single latents to report.
        group_size: bound on the latents of a group.
        seed: of resampling and controls.
        readings: for probes: how a text may be judged by its tokens' values. Latents are judged by
            the strongest token, so that they can stop and clamp.

    Raises:
        SearchError: a label is rare, or the splits share templates.
    """
    _check(split, holdout)
    if layers is None:
        layers = split.layers if info is None else (info.layer,)
    probe, *others = search_probes(split, holdout, layers, seed, readings)
    found = Search(probe, tuple(others))
    return (
        found
        if info is None
        else _search_latents(found, info, split, holdout, top, group_size, seed)
    )


def search_probes(
    split: Corpus,
    holdout: Corpus,
    layers: Sequence[int],
    seed: int,
    readings: Sequence[Reading] = (PEAK,),
) -> list[Finding]:
    """Return a probe on each layer and one on all of them, best first.

    They are compared by AUROC on templates of the search split that were left out of the fit. Of
    equals the one that reads fewer layers wins.
    """
    layers = tuple(sorted(set(layers)))
    alone = [(layer,) for layer in layers]
    choices = [*alone, layers] if len(layers) > 1 else alone
    findings = []
    for choice in choices:
        probe, validated, reading = fit_probe(split, seed, choice, readings)
        measured = _measure("probe", (), probe, split, holdout, seed, reading)
        findings.append(replace(measured, auroc_validation=validated, note=probe.recipe))
    return sorted(findings, key=lambda f: -round(f.auroc_validation or 0.0, 6))


def _search_latents(
    found: Search,
    info: SaeInfo,
    split: Corpus,
    holdout: Corpus,
    top: int,
    group_size: int,
    seed: int,
) -> Search:
    """Add single latents, a group and controls to the probes that were found."""
    peak = _peak_of_each(info, split)
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
    alive = np.flatnonzero((peak > 0).any(0))
    rng = np.random.default_rng(seed)
    random = [
        group(rng.choice(alive, min(size, len(alive)), replace=False), size, "random group")
        for _ in range(CONTROLS)
    ]
    random.sort(key=lambda finding: finding.auroc_search)
    median, strongest = random[len(random) // 2], random[-1]
    return replace(
        found,
        latents=tuple(singles),
        group=replace(group(best, size, "group"), auroc_validation=validated),
        controls=(
            replace(strongest, note=f"best of {CONTROLS} by the search split"),
            replace(median, note=f"median of {CONTROLS} by the search split"),
        ),
    )


def _peak_of_each(info: SaeInfo, split: Corpus) -> np.ndarray:
    """Return the largest activation of every latent in each text, [texts, latents]."""
    looked = split.looked
    counts = np.bincount(split.owner, weights=looked, minlength=len(split)).astype(int)
    x, peaks_of = split.at(info.layer), []
    ends = np.cumsum(split.lengths)
    first = 0
    while first < len(split):  # in parts, since a copy of all residuals may not fit in memory
        last = max(int(np.searchsorted(ends, split.starts[first] + TOKENS, "right")), first + 1)
        tokens = slice(int(split.starts[first]), int(ends[last - 1]))
        seen = x[tokens][torch.from_numpy(looked[tokens])]
        peaks_of.append(max_per_text(info, seen, counts[first:last].tolist()))
        first = last
    return np.concatenate(peaks_of)


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
    reading: Reading = PEAK,
) -> Finding:
    def scores(corpus: Corpus) -> np.ndarray:
        if isinstance(reader, Probe):
            return peaks(corpus, reader.logits(corpus.by_layer), reading)
        return peaks(corpus, read_values(reader, terms, corpus), reading)

    held = scores(holdout)
    return Finding(
        form=form,
        terms=terms,
        probe=reader if isinstance(reader, Probe) else None,
        auroc_search=float(auroc(scores(split), split.label)),
        auroc_holdout=float(auroc(held, holdout.label)),
        interval=auroc_interval(held, holdout.label, holdout.template, seed),
        reading=reading,
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
