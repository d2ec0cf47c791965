"""What `saeguard sae inspect` adds from an index, and beside another SAE."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from saeguard.sae import SaeInfo


def density_of(index: Path, info: SaeInfo) -> dict[str, Any]:
    """Return how often latents fire on an index's corpus.

    Raises:
        InputError: it is no index, or of another SAE.
    """
    from saeguard.latents.index import Index

    opened = Index(index)
    opened.check_sae(info)
    rows = opened.rows(
        "SELECT floor(log10(density))::INTEGER AS decade, count(*) FROM latent WHERE tokens > 0 "
        "GROUP BY decade ORDER BY decade"
    )
    ((dead,),) = opened.rows("SELECT count(*) FROM latent WHERE tokens = 0")
    return {
        "tokens": opened.tokens,
        "dead": dead,
        "dead_share": round(dead / opened.d_sae, 4),
        "density": {f"1e{decade}": count for decade, count in rows},
    }


def beside(other: Path, info: SaeInfo) -> dict[str, Any]:
    """Return how the latents correspond to those of another SAE, with a progress bar."""
    from tqdm import tqdm

    from saeguard.latents.between import between
    from saeguard.sae import inspect

    second = inspect(other)
    with tqdm(total=info.d_sae + second.d_sae, desc="compare", unit="latent") as bar:
        return between(info, second, bar.update)


def in_rows(facts: Mapping[str, Any]) -> dict[str, str]:
    """Return the rows of the table for what the two functions above found."""
    rows = {}
    if "latents_on_corpus" in facts:
        found = facts["latents_on_corpus"]
        widest = max(found["density"].values(), default=1)
        bars = "\n".join(
            f"{decade:>5} {'#' * max(1, round(24 * count / widest))} {count:,}"
            for decade, count in found["density"].items()
        )
        rows["dead"] = (
            f"{found['dead']:,} ({found['dead_share']:.1%}) fire on none of {found['tokens']:,} "
            "tokens"
        )
        rows["density"] = f"latents by share of tokens, from\n{bars}"
    if "beside" in facts:
        found = facts["beside"]
        parts = found["latents_by_parts"]
        rows["beside the other"] = (
            f"{found['d_sae']:,} latents of layer {found['layer']}; cosine of decoder rows at "
            f"least {found['near']:g}: {found['found_there']:,} of these latents are found there, "
            f"{found['found_here']:,} of those here (median cosine {found['median_cosine']:.2f})"
        )
        split = "; ".join(
            f"{row['latent']} into {', '.join(map(str, row['parts'][:6]))}"
            + (" ..." if len(row["parts"]) > 6 else "")  # noqa: PLR2004 - what a line holds
            for row in found["most_split"][:3]
        )
        rows["splitting"] = (
            f"{parts['0']:,} latents have no part there, {parts['1']:,} one, "
            f"{parts['2 or more']:,} several" + (f": {split}" if split else "")
        )
    return rows
