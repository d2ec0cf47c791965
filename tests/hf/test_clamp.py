"""The reference clamp is the formula, from the first match on, and changes nothing before it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from saeguard.features.types import FeatureSet
from saeguard.guard.build_watchlist import build_watchlist
from saeguard.guard.watchlist import WatchList
from saeguard.hf.clamp import clamped, greedy
from saeguard.hf.model import LanguageModel, load_model
from saeguard.hf.residuals import record
from saeguard.hf.scan import activations, scan
from saeguard.hf.texts import Text
from saeguard.policy.types import Action, Mode
from tests.guarded import LAYER, feature_set, policy
from tests.tiny import save_model

TOKENS = [1, *range(30, 60)]
PROMPT = 6


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    """A tiny random model."""
    return load_model(save_model(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory, lm: LanguageModel) -> FeatureSet:
    """A feature set on a random SAE."""
    return feature_set(tmp_path_factory.mktemp("set"), lm.hidden_size)


def _watchlist(features: FeatureSet, action: Action = "clamp", mode: Mode = "enforce") -> WatchList:
    return build_watchlist([policy(action, mode=mode)], {features.id: features})


def _logits(lm: LanguageModel) -> torch.Tensor:
    with torch.no_grad():
        return lm.model(torch.tensor([TOKENS]), use_cache=False).logits[0]


def _first(lm: LanguageModel, watchlist: WatchList) -> int:
    ((_, [verdict]),) = scan(lm, watchlist, [Text("t", tuple(TOKENS), PROMPT)])
    assert verdict.first_token is not None
    return verdict.first_token


def test_residual_is_the_formula(lm: LanguageModel, features: FeatureSet) -> None:
    """Rows from the first match on get `(target - f) @ W_dec`; rows before it nothing."""
    watchlist = _watchlist(features)
    first = _first(lm, watchlist)
    assert PROMPT <= first < len(TOKENS) - 1
    ((_, plain),) = record(lm, [TOKENS], [LAYER])
    with clamped(lm, watchlist, TOKENS, PROMPT):
        ((_, edited),) = record(lm, [TOKENS], [LAYER])
    (rows,) = watchlist.clamps
    f = torch.from_numpy(activations(watchlist, plain))[:, list(rows.columns)]
    expected = plain[LAYER].clone()
    for j in range(len(rows.columns)):
        delta = rows.target[j] - f[first:, j]
        expected[first:] += delta[:, None] * rows.W_dec[j]
    torch.testing.assert_close(edited[LAYER], expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(edited[LAYER][:first], plain[LAYER][:first])
    assert not torch.allclose(edited[LAYER][first:], plain[LAYER][first:])


def test_only_later_tokens_change(lm: LanguageModel, features: FeatureSet) -> None:
    """Logits before the first match are those of the plain model, and it is left as it was."""
    watchlist = _watchlist(features)
    first = _first(lm, watchlist)
    plain = _logits(lm)
    with clamped(lm, watchlist, TOKENS, PROMPT):
        edited = _logits(lm)
    torch.testing.assert_close(edited[:first], plain[:first])
    assert not torch.allclose(edited[first:], plain[first:], atol=1e-3)
    assert torch.equal(_logits(lm), plain)


@pytest.mark.parametrize(("action", "mode"), [("flag", "enforce"), ("clamp", "shadow")])
def test_only_enforced_clamps_edit(
    lm: LanguageModel, features: FeatureSet, action: Action, mode: Mode
) -> None:
    """Flags and shadow policies leave the output as it is."""
    plain = _logits(lm)
    with clamped(lm, _watchlist(features, action, mode), TOKENS, PROMPT):
        assert torch.equal(_logits(lm), plain)


def test_greedy(lm: LanguageModel, features: FeatureSet) -> None:
    """Without a clamp the tokens are the model's own; a clamp changes them after its match."""
    prompt = TOKENS[:20]
    ours = greedy(lm, _watchlist(features, "flag"), prompt, 12)
    own = lm.model.generate(
        torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=None
    )[0, 20:].tolist()
    assert ours == own
    assert len(greedy(lm, _watchlist(features), prompt, 12)) == 12
    stopped = greedy(lm, _watchlist(features, "flag"), prompt, 12, stop_tokens=[own[0]])
    assert stopped == own[:1]


def test_scan_agrees_in_any_batch(lm: LanguageModel, features: FeatureSet) -> None:
    """A text's verdict does not depend on the texts beside it."""
    watchlist = _watchlist(features, "flag")
    rng = np.random.default_rng(0)
    texts = [
        Text(str(i), tuple(rng.integers(3, 250, length).tolist()), 2)
        for i, length in enumerate((40, 5, 17, 17, 90))
    ]
    together = dict(scan(lm, watchlist, texts))
    for i, text in enumerate(texts):
        ((_, [alone]),) = scan(lm, watchlist, [text])
        (verdict,) = together[i]
        assert (alone.outcome, alone.first_token) == (verdict.outcome, verdict.first_token)
        assert alone.score == pytest.approx(verdict.score, rel=1e-4)
        assert verdict.coverage.tokens == len(text.tokens) - 2
