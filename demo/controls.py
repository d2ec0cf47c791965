"""Variants of a clamp policy: the same rule with random latents, and wider ones for loss.

A random clamp has as many latents as the policy's, sets them to a multiple of their usual
activation, and is scaled so that the mean norm of its edit equals that of the policy's edit on
the same tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from saeguard.features.load import save_feature_set
from saeguard.features.types import Feature, FeatureSet, Term
from saeguard.guard.judge import clamped_tokens
from saeguard.guard.watchlist import ClampRows, WatchList
from saeguard.hf.model import LanguageModel
from saeguard.hf.residuals import record
from saeguard.hf.scan import activations
from saeguard.hf.texts import Text
from saeguard.policy.types import Policy
from saeguard.sae import SaeInfo, activate, encode_blocks, read_decoder_rows, read_rows

ALIVE = 0.001
"""Share of tokens on which a latent has to fire to be drawn as a control."""


def residuals_at_edits(
    lm: LanguageModel, watchlist: WatchList, rows: ClampRows, local: int, texts: Sequence[Text]
) -> torch.Tensor:
    """Return the residuals [tokens, d_in] that a clamp policy would edit in `texts`.

    Args:
        lm: the model.
        watchlist: holds the policy.
        rows: its layer's clamps.
        local: which of `rows.policies` it is.
        texts: token ids.
    """
    found = [torch.zeros(0, lm.hidden_size)]
    for i, residuals in record(lm, [t.tokens for t in texts], [h.layer for h in watchlist.hooks]):
        tokens = np.array(texts[i].tokens)
        shares = watchlist.shares(activations(watchlist, residuals))
        looked = ~np.isin(tokens, np.array(watchlist.exclude_tokens, np.int64))
        acted = clamped_tokens(
            watchlist.rules, rows.policies[local], shares, looked, texts[i].prompt_tokens
        )
        acted[-1] = False  # the last token sampled never went into the model
        found.append(residuals[rows.layer][torch.from_numpy(acted)])
    return torch.cat(found)


def edit_norm(watchlist: WatchList, rows: ClampRows, local: int, x: torch.Tensor) -> float:
    """Return the mean norm of a clamp policy's edit over residuals `x` [tokens, d_in]."""
    hook = next(h for h in watchlist.hooks if h.layer == rows.layer)
    mine = [j for j, owner in enumerate(rows.owner) if owner == local]
    columns = [rows.columns[j] for j in mine]
    pre = x @ hook.W[columns].t() + hook.b[columns]
    f = pre * (pre > hook.theta[columns])
    target = replace(
        rows,
        target=rows.target[mine],
        scale=None if rows.scale is None else rows.scale[mine],
        cap=None if rows.cap is None else rows.cap[mine],
    )
    delta = (target.edited(f) - f) @ rows.W_dec[mine]
    return float(delta.norm(dim=1).mean()) if len(x) else 0.0


def usual_activation(info: SaeInfo, x: torch.Tensor) -> torch.Tensor:
    """Return each latent's mean activation where it fires, 0 for those hardly alive, [d_sae]."""
    total, count = torch.zeros(info.d_sae), torch.zeros(info.d_sae)
    for _, start, f in encode_blocks(info, x):
        span = slice(start, start + f.shape[1])
        total[span] += f.clamp(min=0).sum(0)
        count[span] += (f > 0).sum(0)
    return torch.where(count >= max(1.0, ALIVE * len(x)), total / count.clamp(min=1), 0.0)


def draw_control(
    info: SaeInfo,
    usual: torch.Tensor,
    taken: frozenset[int],
    size: int,
    norm: float,
    x: torch.Tensor,
    rng: np.random.Generator,
) -> dict[int, float]:
    """Draw `size` alive latents, and targets whose edit of `x` has the mean norm `norm`.

    Args:
        info: the SAE.
        usual: [d_sae] mean activation where a latent fires, 0 for those not to be drawn.
        taken: latents never drawn: the policy's own.
        size: how many.
        norm: mean norm that the edit shall have.
        x: [tokens, d_in] residuals that would be edited.
        rng: draws.
    """
    alive = [j for j in torch.nonzero(usual).flatten().tolist() if j not in taken]
    latents = sorted(int(j) for j in rng.choice(alive, size, replace=False))
    W_dec = read_decoder_rows(info, latents)
    f = activate(read_rows(info, latents), x)

    def strength(scale: float) -> float:
        return float(((scale * usual[latents] - f) @ W_dec).norm(dim=1).mean())

    low, high = 0.0, 1.0
    while strength(high) < norm:
        low, high = high, 2 * high
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if strength(middle) < norm else (low, middle)
    return {j: float(high * usual[j]) for j in latents}


def random_clamp(targets: Mapping[int, float]) -> Feature:
    """Return a feature whose clamp at share 1 sets each latent to its target."""
    return _feature("random_clamp", tuple(Term(j, v) for j, v in targets.items()), 0.0, 1.0)


def any_token(latent: int) -> Feature:
    """Return a feature whose share is 1 or more at every token; no rule may hold in silence."""
    return _feature("any_token", (Term(latent, 1.0),), -1.0, 0.0)


def _feature(name: str, terms: tuple[Term, ...], low: float, high: float) -> Feature:
    return Feature(
        id=name,
        title=name.replace("_", " "),
        behaviour="none",
        detect=tuple(replace(t, weight=1.0) for t in terms),
        probe=None,
        clamp=terms,
        low=low,
        high=high,
        threshold=0.5,
        evidence={},
    )


def write_variant(
    folder: Path,
    policy: Policy,
    features: FeatureSet,
    name: str,
    changes: Mapping[str, Any],
    *extra: Feature,
) -> str:
    """Write a variant of `policy` with a feature set of its own, and return its id.

    A latent can have one clamp per feature set, hence the copies.

    Args:
        folder: holds `policies` and `feature_sets`.
        policy: what to vary.
        features: its feature set.
        name: of the variant.
        changes: keys of the policy file to change.
        extra: features that they need.
    """
    set_id = f"variant-{name}"
    known = {**features.features, **{f.id: f for f in extra}}
    save_feature_set(
        replace(features, id=set_id, features=known), folder / "feature_sets" / f"{set_id}.yaml"
    )
    document = yaml.safe_load(policy.path.read_text(encoding="utf-8"))
    document |= {"id": f"variant.{name}", "feature_set": set_id, **changes}
    file = folder / "policies" / f"variant-{name}.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(document, sort_keys=False), encoding="utf-8")
    return str(document["id"])
