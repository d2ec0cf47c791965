"""The demo's evidence about its features, as a page."""

from __future__ import annotations

from typing import Any

from saeguard.features.search import Finding, Search
from saeguard.features.types import FeatureSet

INTRODUCTION = """\
Written by `python -m demo.build_features`. Hold-out texts share no template and, outside code, no
five words in a row with the texts that features were chosen on. Intervals are 95 %: of AUROC by
bootstrap over templates, of rates after Clopper and Pearson. A text counts by its strongest token,
as in serving. *Twins* are the negatives of the hold-out: the same tasks, done rightly. The model
is a toy that was trained on a generated grammar ([data](../demo/README.md)).
"""
COMPARED = (
    "| feature | chosen | probe | latents, weighted | best single latent | "
    "best of 20 random groups |"
)
RATES = (
    "| feature | threshold (share) | ordinary texts above, hold-out | positives above | "
    "twins above |"
)


def markdown(features: FeatureSet, findings: dict[str, Search], fpr: float) -> str:
    """The evidence as a table."""
    lines = [
        "# What the demo's features detect\n",
        INTRODUCTION,
        "## Detection on the hold-out (AUROC)\n",
        COMPARED,
        "|---|---|---|---|---|---|",
    ]
    for name, found in findings.items():
        terms = features.features[name].detect
        assert found.group is not None
        form = "probe" if not terms else f"{len(terms)} latents" if terms[1:] else "one latent"
        cells = [_area(f) for f in (found.probe, found.group, found.latents[0], found.controls[0])]
        lines.append(f"| `{name}` | {form} | " + " | ".join(cells) + " |")
    lines += [
        f"\n## At the threshold set for {fpr:.0%} of ordinary texts\n",
        RATES,
        "|---|---|---|---|---|",
    ]
    for name, feature in features.features.items():
        keys = ("fpr_holdout", "tpr_holdout", "twin_rate_holdout")
        cells = [f"`{name}`", f"{feature.threshold:g}", *(_rate(feature.evidence[k]) for k in keys)]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "## Where they fire", ""]
    for name, feature in features.features.items():
        lines += [f"**`{name}`** {feature.title}", ""]
        for snippet in feature.evidence["snippets"][:3]:
            text = snippet["text"].replace("`", "'").replace("\n", "⏎")
            lines.append(f"- {snippet['share']:.2f}: `{text}`")
        lines.append("")
    for name, feature in features.features.items():
        if "clamp" in feature.evidence:
            clamp = feature.evidence["clamp"]
            latents = ", ".join(str(term.latent) for term in feature.clamp)
            lines.append(
                f"## Clamping `{name}`\n\n"
                f"Raising latents {latents} costs the insecure twin {clamp['effect']:+.3f} nats "
                f"per token against the secure one, on {clamp['texts']} texts of the search "
                f"split; as many random latents {clamp['random_latents_mean']:+.3f} in the mean "
                f"and {clamp['random_latents_most']:+.3f} at most, of {clamp['random_draws']} "
                "draws. The secure twin's own loss changes by "
                f"{clamp['secure_twin_loss_change']:+.1%}; that of ordinary dialogues, were the "
                f"clamp on everywhere, by {clamp['ordinary_loss_change_always_on']:+.1%}.\n"
            )
    return "\n".join(lines)


def _area(finding: Finding) -> str:
    low, high = finding.interval
    return f"{finding.auroc_holdout:.3f} ({low:.2f}-{high:.2f})"


def _rate(measured: dict[str, Any]) -> str:
    low, high = measured["interval"]
    return f"{measured['rate']:.1%} ({low:.1%}-{high:.1%} of {measured['texts']})"
