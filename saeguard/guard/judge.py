"""Judge one whole text: from feature shares to one verdict per policy.

These semantics hold for serving too, token by token (docs/policy-language.md explains them):

- A selection compares the feature's share at a token, or with `over` an aggregate of the shares of
  several tokens. Tokens that are out of scope or not evaluated do not count in the aggregate.
- The evidence `e[t]` of a policy is the evidence of its condition (`condition_program`) if position
  `t` is in scope and evaluated, else -inf.
- Its score at `t` is the k-th largest evidence among positions `(t - n, t]` for `for: k of n`,
  and among all up to `t` for `for: k tokens in the request`.
- It matches at `t` if that score exceeds 1, and stays on for `keep` further positions.
- With `for: the last token`, its score is the evidence of the last of these positions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from saeguard.guard.compiled_rules import Rules, compile_rules
from saeguard.guard.evaluate import Scored, Tokens, advance, score_tokens
from saeguard.guard.request_verdicts import Verdicts, verdicts_of
from saeguard.guard.scopes import of_prompt
from saeguard.guard.state import State, make_state
from saeguard.guard.verdict import THRESHOLD, Verdict
from saeguard.policy.types import Policy, strongest_action


def judge(
    policy: Policy,
    shares: Mapping[str, np.ndarray],
    prompt_tokens: int,
    roles: np.ndarray | None = None,
) -> Verdict:
    """Judge one policy on the shares of its features, one value per token, all tokens evaluated."""
    rules, traces = alone(policy, shares)
    return judge_text(rules, traces, np.ones(len(traces), bool), prompt_tokens, roles)[0]


def alone(policy: Policy, shares: Mapping[str, np.ndarray]) -> tuple[Rules, np.ndarray]:
    """Return the rules of one policy, and the shares of its features [tokens, features]."""
    names = list(dict.fromkeys(s.feature for s in policy.detect.values()))
    rules = compile_rules([policy], {f"{policy.feature_set}/{n}": i for i, n in enumerate(names)})
    return rules, np.stack([np.asarray(shares[n], np.float64) for n in names], axis=1)


def score_text(
    rules: Rules,
    shares: np.ndarray,
    evaluable: np.ndarray,
    prompt_tokens: int,
    roles: np.ndarray | None = None,
    massive: np.ndarray | None = None,
) -> Scored:
    """Return evidence and score of each token of one text, as a block of one request."""
    state, block = _block(rules, shares, evaluable, prompt_tokens, roles, massive)
    return score_tokens(rules, state, np.zeros(1, np.int64), block)


def on_tokens(match: np.ndarray, keep: int) -> np.ndarray:
    """Return [tokens] bool: whether the policy matched here or at one of the `keep` before."""
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
    massive: np.ndarray | None = None,
) -> np.ndarray:
    """Return [tokens] bool: the tokens that clamp policy `i` edits if it is enforced."""
    policy = rules.policies[i]
    scored = score_text(rules, shares, evaluable, prompt_tokens, roles, massive)
    looked = scored.looked[0, :, rules.scope[i]]
    if policy.clamp is not None and policy.clamp.when == "always":
        return looked
    match = scored.score[0, :, i] > THRESHOLD
    matched = policy.clamp is not None and policy.clamp.when == "matched"
    on = on_tokens(match, policy.keep if matched else len(match))
    return on if massive is None else on & ~massive


def strongest(verdicts: Sequence[Verdict]) -> list[Verdict]:
    """Return the verdicts with the strongest action taken on a request; several if they tie."""
    top = strongest_action(v.acted for v in verdicts)
    return [v for v in verdicts if v.acted is not None and v.acted == top]


def judge_text(
    rules: Rules,
    shares: np.ndarray,
    evaluable: np.ndarray,
    prompt_tokens: int,
    roles: np.ndarray | None = None,
    massive: np.ndarray | None = None,
) -> Verdicts:
    """Judge one text by every policy of the rules.

    Args:
        rules: the compiled policies.
        shares: [tokens, features] float32.
        evaluable: [tokens] bool; the other tokens count as `special_token`.
        prompt_tokens: number of prompt tokens.
        roles: [prompt_tokens] role of each prompt token, see `saeguard.guard.roles.assign`.
        massive: [tokens] bool, the attention sinks, which count as `massive_norm`; None for none.

    Raises:
        ValueError: a policy's scope is a role, and `roles` is missing.
    """
    state, block = _block(rules, shares, evaluable, prompt_tokens, roles, massive)
    if len(shares):
        advance(rules, state, np.zeros(1, np.int64), block)
    return verdicts_of(rules, state, 0, len(shares))


def _block(
    rules: Rules,
    shares: np.ndarray,
    evaluable: np.ndarray,
    prompt_tokens: int,
    roles: np.ndarray | None,
    massive: np.ndarray | None,
) -> tuple[State, Tokens]:
    state = make_state(rules, 1)
    state.prompt[0] = prompt_tokens
    if rules.by_role:
        state.roles[0] = of_prompt(roles, prompt_tokens)
    state.enforced[0] = [p.mode == "enforce" for p in rules.policies]
    state.acted[0] = True  # serving sets it when a clamp policy matches
    finite = np.isfinite(shares).all(axis=1)
    massive = np.zeros(len(shares), bool) if massive is None else massive
    position = np.arange(len(shares))
    parts = (position, shares, evaluable, finite, massive)
    return state, Tokens(*(part[None] for part in parts))
