"""Judge one whole text: from feature shares to one verdict per policy.

These semantics hold for serving too, token by token (docs/policy-language.md explains them):

- A selection compares the feature's share at a token, or with `over` an aggregate of the shares of
  several tokens. Tokens that are out of scope or not evaluated do not count in the aggregate.
- The evidence `e[t]` of a policy is the evidence of its condition (`saeguard.guard.conditions`) if
  position `t` is in scope and evaluated, else -inf.
- Its score at `t` is the k-th largest evidence among positions `(t - n, t]` for `for: k of n`,
  and among all up to `t` for `for: k tokens in the request`.
- It matches at `t` if that score exceeds 1, and stays on for `keep` further positions.
- With `for: the last token`, its score is the evidence of the last of these positions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from saeguard.guard.compiled_rules import Rules, compile_rules, make_hits, make_scratch
from saeguard.guard.read_rows import advance_text
from saeguard.guard.request_verdicts import Verdicts, verdicts_of
from saeguard.guard.scopes import in_scopes, of_prompt, roles_between
from saeguard.guard.state import State, make_state
from saeguard.guard.tables import ERROR, EVALUATED, MASSIVE, SPECIAL
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


class Scored(NamedTuple):
    """What the rules make of each token of one text."""

    values: np.ndarray
    """[tokens, traces] the values that selections compare; NaN where no scope looks."""
    looked: np.ndarray
    """[tokens, scopes] bool: the token is in the scope and evaluated."""
    evidence: np.ndarray
    """[tokens, P]; -inf if the token is out of scope or not evaluated."""
    score: np.ndarray
    """[tokens, P]. It may be -inf instead of a score that is no match and not above the text's
    highest score so far, which saves computing it."""


def score_text(
    rules: Rules,
    shares: np.ndarray,
    evaluable: np.ndarray,
    prompt_tokens: int,
    roles: np.ndarray | None = None,
    massive: np.ndarray | None = None,
) -> Scored:
    """Return evidence and score of each token of one text; see `judge_text`."""
    text = _Text(rules, shares, evaluable, prompt_tokens, roles, massive)
    evaluated = text.fates == EVALUATED
    shape = len(shares), len(rules.policies)
    values = np.empty((len(shares), len(rules.tables.traces)))
    scored = Scored(values, in_scopes(text.roles, evaluated), np.empty(shape), np.empty(shape))
    text.advance(scored)
    return scored


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
    looked = scored.looked[:, rules.scope[i]]
    if policy.clamp is not None and policy.clamp.when == "always":
        return looked
    match = scored.score[:, i] > THRESHOLD
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
    text = _Text(rules, shares, evaluable, prompt_tokens, roles, massive)
    text.advance()
    return verdicts_of(rules, text.state, 0, text.roles[:prompt_tokens], len(shares))


class _Text:
    """One text, and the state of its only request."""

    def __init__(
        self,
        rules: Rules,
        shares: np.ndarray,
        evaluable: np.ndarray,
        prompt_tokens: int,
        roles: np.ndarray | None,
        massive: np.ndarray | None,
    ) -> None:
        needed = rules.by_role or roles is not None
        given = of_prompt(roles, prompt_tokens) if needed else None
        self.rules = rules
        self.shares = np.ascontiguousarray(shares, np.float64)
        self.roles = roles_between(prompt_tokens, given, 0, len(shares))
        read = np.where(np.isfinite(shares).all(axis=1), EVALUATED, ERROR)
        if massive is not None:
            read = np.where(massive & (read == EVALUATED), MASSIVE, read)
        self.fates = np.where(evaluable, read, SPECIAL).astype(np.uint8)
        self.state: State = make_state(rules, 1)
        self.state.requests["prompt"] = prompt_tokens
        self.state.policies["enforced"] = [p.mode == "enforce" for p in rules.policies]
        self.state.policies["acted"] = True  # serving sets it when a clamp policy matches

    def advance(self, scored: Scored | None = None) -> None:
        """Advance by all tokens; write what each of them scores to `scored`."""
        tables, nothing = self.rules.tables, np.empty((0, 0))
        out = (nothing, nothing, nothing)
        if scored is not None:
            out = (scored.evidence, scored.score, scored.values)
        advance_text(
            tables,
            self.state,
            make_scratch(tables, self.rules.longest, record=scored is not None),
            self.roles,
            self.fates,
            self.shares,
            make_hits(tables),
            *out,
        )
