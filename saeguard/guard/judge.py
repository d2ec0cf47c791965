"""Judge one whole text: from feature shares to one verdict per policy.

The semantics, which serving follows token by token (docs/policy-language.md has them in words):

- A selection compares the feature's share at a token, or with `over` what several tokens' shares
  make together; tokens out of scope or not evaluated count as nothing in it.
- Evidence `e[t]` of a policy is that of its condition (`condition_program`) where position
  `t` is in scope and was evaluated, and -inf elsewhere.
- Its score at `t` is the k-th largest evidence among positions `(t - n, t]` for `for: k of n`,
  and among all up to `t` for `for: k tokens in the request`.
- It matches at `t` where that score exceeds 1, and stays on for `keep` further positions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from saeguard.guard.compiled_rules import Rules, compile_rules
from saeguard.guard.evaluate import Scored, Tokens, advance, score_tokens
from saeguard.guard.request_verdicts import Verdicts, verdicts_of
from saeguard.guard.scopes import of_prompt
from saeguard.guard.state import State, make_state
from saeguard.guard.verdict import THRESHOLD, Verdict
from saeguard.policy.types import Policy, strongest_action

if TYPE_CHECKING:
    from saeguard.guard.watchlist import WatchList  # imports torch, which policy tests do without


def judge(
    policy: Policy,
    shares: Mapping[str, np.ndarray],
    prompt_tokens: int,
    roles: np.ndarray | None = None,
) -> Verdict:
    """Judge one policy on traces of feature shares, one value per token, all evaluated."""
    rules, traces = alone(policy, shares)
    return judge_text(rules, traces, np.ones(len(traces), bool), prompt_tokens, roles)[0]


def judge_all(
    watchlist: WatchList,
    shares: np.ndarray,
    evaluable: np.ndarray,
    prompt_tokens: int,
    roles: np.ndarray | None = None,
) -> Verdicts:
    """Judge every policy of the watch list on one text.

    Args:
        watchlist: the compiled policies.
        shares: [tokens, features] float32.
        evaluable: [tokens] bool; tokens left out count as `special_token`.
        prompt_tokens: how many of the tokens are the prompt.
        roles: [prompt_tokens] whose turn each of these is in, see `saeguard.guard.roles.assign`.

    Raises:
        ValueError: a policy's scope is a role, and there are no roles.
    """
    return judge_text(watchlist.rules, shares, evaluable, prompt_tokens, roles)


def alone(policy: Policy, shares: Mapping[str, np.ndarray]) -> tuple[Rules, np.ndarray]:
    """Return one policy as rules, and its features' traces as shares [tokens, features]."""
    names = list(dict.fromkeys(s.feature for s in policy.detect.values()))
    rules = compile_rules([policy], {f"{policy.feature_set}/{n}": i for i, n in enumerate(names)})
    return rules, np.stack([np.asarray(shares[n], np.float64) for n in names], axis=1)


def score_text(
    rules: Rules,
    shares: np.ndarray,
    evaluable: np.ndarray,
    prompt_tokens: int,
    roles: np.ndarray | None = None,
) -> Scored:
    """Return what the rules say of each token of one text, arrays of one request."""
    state, block = _block(rules, shares, evaluable, prompt_tokens, roles)
    return score_tokens(rules, state, np.zeros(1, np.int64), block)


def on_tokens(match: np.ndarray, keep: int) -> np.ndarray:
    """Return where the policy is on: a match within the last `keep` tokens or here."""
    last = np.where(match, np.arange(len(match)), -keep - 1)
    on: np.ndarray = np.arange(len(match)) - np.maximum.accumulate(last) <= keep
    return on


def clamped_tokens(
    rules: Rules,
    i: int,
    shares: np.ndarray,
    evaluable: np.ndarray,
    prompt_tokens: int,
    roles: np.ndarray | None = None,
) -> np.ndarray:
    """Return [tokens] bool: where clamp policy `i`, enforced, edits one text."""
    policy = rules.policies[i]
    scored = score_text(rules, shares, evaluable, prompt_tokens, roles)
    looked = scored.looked[0, :, rules.scope[i]]
    if policy.clamp is not None and policy.clamp.when == "always":
        return looked
    match = scored.score[0, :, i] > THRESHOLD
    matched = policy.clamp is not None and policy.clamp.when == "matched"
    return on_tokens(match, policy.keep if matched else len(match))


def strongest(verdicts: Sequence[Verdict]) -> list[Verdict]:
    """Return the acting verdicts of the strongest action; more than one is a tie."""
    top = strongest_action(v.acted for v in verdicts)
    return [v for v in verdicts if v.acted is not None and v.acted == top]


def judge_text(
    rules: Rules,
    shares: np.ndarray,
    evaluable: np.ndarray,
    prompt_tokens: int,
    roles: np.ndarray | None = None,
) -> Verdicts:
    """Judge one text by every policy of the rules; arguments as for `judge_all`."""
    state, block = _block(rules, shares, evaluable, prompt_tokens, roles)
    if len(shares):
        advance(rules, state, np.zeros(1, np.int64), block)
    return verdicts_of(rules, state, 0, len(shares))


def _block(
    rules: Rules,
    shares: np.ndarray,
    evaluable: np.ndarray,
    prompt_tokens: int,
    roles: np.ndarray | None,
) -> tuple[State, Tokens]:
    state = make_state(rules, 1)
    state.prompt[0] = prompt_tokens
    if rules.by_role:
        state.roles[0] = of_prompt(roles, prompt_tokens)
    state.enforced[0] = [p.mode == "enforce" for p in rules.policies]
    state.acted[0] = True  # as serving would, where a clamp policy matches
    finite = np.isfinite(shares).all(axis=1)
    position = np.arange(len(shares))
    return state, Tokens(position[None], shares[None], evaluable[None], finite[None])
