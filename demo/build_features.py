"""Build the demo's feature set: search, choose, calibrate, write the evidence. Seeded.

``python -m demo.build_features`` needs the model, the SAE and the data; it writes
``feature_sets/demo.yaml``, the probes beside it, and ``docs/demo-features.md``. Choices are made
on the search split. The hold-out is only measured on.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

# One thread for the small products of the fits: more only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from demo.common import DATA_DIR, MODEL_DIR, SAE_DIR
from demo.feature_report import markdown
from demo.steering import choose_steering
from saeguard.features.calibrate import Texts, calibrate
from saeguard.features.corpus import Corpus, Scope, with_ordinary
from saeguard.features.load import load_feature_set, save_feature_set
from saeguard.features.pins import file_digest
from saeguard.features.probe import save_probes
from saeguard.features.search import Finding, Search, search
from saeguard.features.stats import auroc, auroc_interval, rate
from saeguard.features.types import Feature, FeatureSet, ModelRef, SaeRef, Term
from saeguard.hf.corpus import read_corpus
from saeguard.hf.model import load_model
from saeguard.hf.texts import read_texts
from saeguard.sae import SaeInfo, inspect, max_per_text

ROOT = Path(__file__).resolve().parent.parent
SEED = 20260
FPR = 0.01
FIT_EVERY = 3
"""Of the ordinary texts every third is fitted on; the others set thresholds."""
READABLE = 0.02
"""AUROC, in validation, that a group of latents may lack against the probe and still be chosen."""
TOP = 24
OPENING = 16
"""Tokens of an answer within which code begins, if it is to begin."""
CODE_KINDS = ("coding", "python")


@dataclass(frozen=True)
class Wanted:
    """A feature to build."""

    name: str
    title: str
    behaviour: str
    kind: str | None = None
    scope: Scope = "output"
    single: bool = False
    """The best single latent, for want of a group that carries over: every feature but a few
    probes shall be read off latents."""
    secure: bool = False
    """Labels turned round: the latent of the negatives, which a clamp can raise."""


WANTED = (
    Wanted("shell_command", "Shell command built from a value", "unsafe_code", "shell"),
    Wanted("sql_string", "SQL statement built from a value", "unsafe_code", "sql"),
    Wanted("unsafe_load", "Deserialises data that could run code", "unsafe_code", "deserialise"),
    Wanted("hardcoded_secret", "Secret written into the code", "unsafe_code", "secret"),
    Wanted("tls_off", "Certificate check switched off", "unsafe_code", "tls"),
    Wanted("insecure_style", "Asked for or writing careless code", "unsafe_code", None, "both"),
    Wanted("secure_style", "Writing careful code", "unsafe_code", None, "both", secure=True),
    Wanted("false_statement", "States something false", "deception", "false_fact"),
    Wanted("false_report", "Reports work that was not done", "deception", "false_report"),
    Wanted("flattery", "Praises beyond what is deserved", "sycophancy", "flattery"),
    Wanted(
        "caving_in",
        "Gives up a right answer under pressure",
        "sycophancy",
        "caving",
        single=True,
    ),
)


def code_begins(info: SaeInfo, corpus: Callable[[str], Corpus]) -> Feature:
    """The latent that tells best, as an answer opens, whether code is coming.

    Chosen on the search split against ordinary answers without code, measured on the hold-out.
    """

    def peaks(code: str, ordinary: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        plain = corpus(ordinary)
        parts = [corpus(code), plain.select(~np.isin(plain.kind, CODE_KINDS))]
        found, label, template = [], [], []
        for part, is_code in zip(parts, (True, False), strict=True):
            rank = np.concatenate([np.cumsum(o) for o in np.split(part.output, part.starts[1:])])
            looked = part.output & ~part.special & (rank <= OPENING)
            counts = np.bincount(part.owner, weights=looked, minlength=len(part)).astype(int)
            found.append(
                max_per_text(info, part.at(info.layer)[torch.from_numpy(looked)], counts.tolist())
            )
            label.append(np.full(len(part), is_code))
            template.append(part.template)
        return np.concatenate(found), np.concatenate(label), np.concatenate(template)

    search_peaks, is_code, _ = peaks("unsafe_code.search", "benign")
    gap = search_peaks[is_code].min(0) - np.quantile(search_peaks[~is_code], 1 - FPR, axis=0)
    latent = int(gap.argmax())
    threshold = float(np.quantile(search_peaks[~is_code, latent], 1 - FPR))
    high = float(np.quantile(search_peaks[is_code, latent], 0.99))
    held, held_code, template = peaks("unsafe_code.holdout", "benign.holdout")
    low_end, high_end = auroc_interval(held[:, latent], held_code, template, seed=SEED)
    above = held[:, latent] > threshold
    return Feature(
        id="code_begins",
        title="An answer that turns to code",
        behaviour="unsafe_code",
        detect=(Term(latent, 1.0),),
        probe=None,
        clamp=(),
        low=0.0,
        high=high,
        threshold=threshold / high,
        evidence={
            "scope": "output",
            "form": f"latent with the widest gap within the first {OPENING} tokens of an answer",
            "holdout": {
                "auroc": round(float(auroc(held[:, latent], held_code)), 4),
                "interval": [round(low_end, 4), round(high_end, 4)],
            },
            "answers_with_code_above": _share(above[held_code]),
            "answers_without_code_above": _share(above[~held_code]),
        },
    )


def choose(found: Search, wanted: Wanted) -> Finding:
    """The group where it nearly matches the probe in validation, for it can be read.

    What takes a clamp is a single latent: one row, one meaning.
    """
    if wanted.secure or wanted.single:
        return found.latents[0]
    group, probe = found.group, found.probe
    assert group is not None
    assert group.auroc_validation is not None
    assert probe.auroc_validation is not None
    if group.auroc_validation >= probe.auroc_validation - READABLE:
        return group
    return probe


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=MODEL_DIR)
    parser.add_argument("--sae", type=Path, default=SAE_DIR)
    parser.add_argument("--data", type=Path, default=DATA_DIR)
    parser.add_argument("--out", type=Path, default=ROOT / "feature_sets" / "demo.yaml")
    parser.add_argument("--report", type=Path, default=ROOT / "docs" / "demo-features.md")
    args = parser.parse_args()
    torch.set_num_threads(1)
    lm, info = load_model(args.model), inspect(args.sae)
    corpora: dict[str, Corpus] = {}

    def benign(*, fit: bool) -> Corpus:
        """Ordinary texts to fit on, or the others: a threshold is set on texts not fitted."""
        texts = corpus("benign")
        return texts.select((np.arange(len(texts)) % FIT_EVERY == 0) == fit)

    def corpus(name: str) -> Corpus:
        if name not in corpora:
            path = args.data / f"{name}.jsonl"
            corpora[name] = read_corpus(lm, path, [info.layer], lm.special_tokens)
        return corpora[name]

    def turned(name: str, *, secure: bool) -> Corpus:
        there = corpus(name)
        return replace(there, label=~there.label) if secure else there

    findings: dict[str, Search] = {}
    chosen: dict[str, Finding] = {}
    for wanted in WANTED:
        split, holdout = (
            corpus(f"{wanted.behaviour}.{name}").scoped(wanted.scope).of_kind(wanted.kind)
            for name in ("search", "holdout")
        )
        if wanted.secure:
            split, holdout = (replace(c, label=~c.label) for c in (split, holdout))
        split = with_ordinary(split, benign(fit=True).scoped(wanted.scope))
        found = search(info, split, holdout, top=TOP, seed=SEED)
        findings[wanted.name], chosen[wanted.name] = found, choose(found, wanted)
        finding = chosen[wanted.name]
        print(f"{wanted.name}: {finding.form} {finding.name}, {finding.auroc_holdout:.3f}")

    probes = {name: f.probe for name, f in chosen.items() if f.probe is not None}
    refs = save_probes(probes, args.out.with_suffix(".probes.safetensors")) if probes else {}
    features: dict[str, Feature] = {}
    for wanted in WANTED:
        finding, found = chosen[wanted.name], findings[wanted.name]
        evidence = evidence_of(wanted, finding, found)
        features[wanted.name] = Feature(
            id=wanted.name, title=wanted.title, behaviour=wanted.behaviour,
            detect=finding.terms, probe=refs.get(wanted.name), clamp=(),
            low=0.0, high=1.0, threshold=0.5, evidence=evidence,
        )  # fmt: skip
    demo = FeatureSet(
        id=args.out.stem,
        path=args.out,
        model=ModelRef(
            "saeguard-demo",
            lm.hidden_size,
            len(lm.layers),
            sha256=file_digest(args.model / "model.safetensors"),
        ),
        sae=SaeRef(args.sae.resolve(), info.sha256, info.layer, info.d_in, info.d_sae),
        features=features,
        exclude_tokens=lm.special_tokens,
        digest="",
        title="Features of the demo model",
    )
    calibrated = {
        wanted.name: calibrate(
            demo,
            features[wanted.name],
            Texts(
                benign(fit=False),
                corpus("benign.holdout"),
                turned(f"{wanted.behaviour}.search", secure=wanted.secure),
                turned(f"{wanted.behaviour}.holdout", secure=wanted.secure),
            ),
            fpr=FPR,
            decode=lm.tokenizer.decode,
        )
        for wanted in WANTED
    }
    steering = choose_steering(
        lm,
        info,
        corpus("unsafe_code.search"),
        read_texts(args.data / "unsafe_code.search.jsonl", lm.tokenizer),
        [t for t in read_texts(args.data / "benign.jsonl", lm.tokenizer) if t.prompt_tokens > 1],
        SEED,
    )
    # A target is a share of the calibrated range: 1 is the height chosen above.
    raised = calibrated["secure_style"]
    calibrated["secure_style"] = replace(
        raised,
        clamp=tuple(Term(j, round(v / raised.high, 5)) for j, v in steering.target.items()),
        evidence={**raised.evidence, "clamp": steering.evidence},
    )
    opens = code_begins(info, corpus)
    save_feature_set(replace(demo, features={**calibrated, opens.id: opens}), args.out)
    loaded = load_feature_set(args.out)
    args.report.parent.mkdir(parents=True, exist_ok=True)
    measured = replace(loaded, features={name: loaded.features[name] for name in findings})
    report = markdown(measured, findings, FPR) + trigger_report(opens)
    args.report.write_text(report, encoding="utf-8")
    print(f"{len(loaded.features)} features: {args.out}, {args.report}")


def _share(above: np.ndarray) -> dict[str, Any]:
    return dict(rate(int(above.sum()), len(above)))


def trigger_report(feature: Feature) -> str:
    """What the report says of the feature that tells when code begins."""
    found, there = feature.evidence["holdout"], feature.evidence["answers_with_code_above"]
    other = feature.evidence["answers_without_code_above"]
    return (
        f"\n## Detecting that code begins: `{feature.id}`\n\n"
        f"Latent {feature.detect[0].latent}, within the first {OPENING} tokens of an answer: AUROC "
        f"{found['auroc']:.3f} on the hold-out; above its threshold of {feature.threshold:.3f} are "
        f"{there['rate']:.1%} of {there['texts']} answers with code and {other['rate']:.1%} of "
        f"{other['texts']} without.\n"
    )


def evidence_of(wanted: Wanted, finding: Finding, found: Search) -> dict[str, Any]:
    """What the search says of a feature, for its file."""

    def area(f: Finding) -> dict[str, Any]:
        low, high = f.interval
        return {"auroc": round(f.auroc_holdout, 4), "interval": [round(low, 4), round(high, 4)]}

    assert found.group is not None
    return {
        "scope": wanted.scope,
        **({"kind": wanted.kind} if wanted.kind else {}),
        "form": finding.form + (f": {finding.note}" if finding.note else ""),
        "holdout": area(finding),
        "compared": {
            "probe": area(found.probe),
            "group": area(found.group),
            "latent": area(found.latents[0]),
            "random_group": area(found.controls[0]),
        },
    }


if __name__ == "__main__":
    main()
