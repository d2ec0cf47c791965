"""How near a text comes to a match: which selection fails at which token, and by how much."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from saeguard.guard.verdict import THRESHOLD
from saeguard.policy.types import And, Name, Over, Policy, Window
from saeguard.policy_tools.explanation import Explanation


def explained_position(found: Explanation) -> int | None:
    """Return the position that explains the verdict: the first match, or the nearest."""
    if found.match.any():
        return int(found.match.argmax())
    if not found.looked.any():
        return None
    # If no window is full, the condition's own evidence is the nearest.
    best = found.score if np.isfinite(found.score).any() else found.evidence
    return int(best.argmax())


def around(found: Explanation, at: int) -> Iterator[str]:
    """Yield a line for the window that ends at a token, if there is one, and for each selection."""
    window = found.policy.window
    tokens = range(at, at + 1)
    if window != Window():
        start = 0 if window.n is None else max(0, at - window.n + 1)
        tokens = range(start, at + 1)
        held = int((found.evidence[start : at + 1] > THRESHOLD).sum())
        yield f"of tokens {start} to {at} the condition holds at {held}; {window.k} are needed"
    for name, selection in found.policy.detect.items():
        values = found.values[name][tokens.start : tokens.stop]
        looked = found.looked[tokens.start : tokens.stop]
        if not looked.any():
            continue
        best = float(np.where(looked, values, -np.inf).max())
        where = "" if len(tokens) == 1 else " at most"
        if best > selection.above:
            says = f"{best:.3g}{where}, above {selection.above:g}: holds"
        elif best == selection.above:
            says = f"{best:.3g}{where}, exactly its threshold: does not hold"
        else:
            share = f", {best / selection.above:.0%} of the way" if best > 0 else ""
            says = f"{best:.3g}{where}, not above {selection.above:g}{share}: does not hold"
        yield f"{name} is {says}"


def in_short(found: Explanation) -> str:
    """Return in one line where the verdict comes from, for the message of a failed test."""
    at = explained_position(found)
    if at is None:
        return "no token of the policy's scope was evaluated"
    first = "it first matches" if found.match.any() else "it comes nearest"
    return f"{first} at token {at}: {'; '.join(around(found, at))}"


@dataclass(frozen=True, slots=True)
class Never:
    """Texts of which none matches a policy."""

    texts: int
    held: dict[str, int]
    """By selection: number of texts in which it holds at some token."""
    each: int
    """Number of texts in which every selection holds, maybe at different tokens."""
    nearest: Explanation | None
    """Of the text that comes nearest; None if no token was evaluated."""
    text: int
    """Index of that text."""

    def in_words(self, policy: Policy, id_: str) -> str:
        """Return why nothing matches, and what to do.

        Args:
            policy: the policy.
            id_: of the text that comes nearest.
        """
        if self.nearest is None:
            return f"no token of the {self.texts} texts is in its scope and evaluated"
        counts = ", ".join(f"{name} holds in {n}" for name, n in self.held.items())
        says = f"matches none of {self.texts} texts ({counts}); in {id_} {in_short(self.nearest)}"
        if self.each and _asks_for_one_token(policy):
            says += (
                f"; in {self.each} of them every selection holds, but not at one token: write "
                "`over: max of the request` in each if they may hold at different tokens"
            )
        return says


def never_matched(explanations: Iterable[Explanation]) -> Never | None:
    """Return how near some texts come to a match, None if one matches.

    Args:
        explanations: one policy's, of each text.
    """
    held: dict[str, int] = {}
    texts = each = best_text = 0
    best: Explanation | None = None
    for found in explanations:
        if found.verdict.outcome == "match":
            return None
        holds = {
            name: bool((found.looked & (found.values[name] > selection.above)).any())
            for name, selection in found.policy.detect.items()
        }
        held = {name: held.get(name, 0) + is_held for name, is_held in holds.items()}
        each += all(holds.values())
        score = found.verdict.score
        nearest = None if best is None else best.verdict.score
        if score is not None and (nearest is None or score > nearest):
            best, best_text = found, texts
        texts += 1
    return Never(texts, held, each, best, best_text)


def _asks_for_one_token(policy: Policy) -> bool:
    """Return whether all selections have to hold at the same token, each by its own share."""
    condition = policy.condition
    return (
        isinstance(condition, And)
        and all(isinstance(term, Name) for term in condition.terms)
        and any(selection.over == Over() for selection in policy.detect.values())
        and not policy.window.last
    )
