"""However a text reaches the ledger, its verdicts are those of the whole text."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saeguard.events.metrics import Counts
from saeguard.events.records import coverage_record
from saeguard.guard.compiled_rules import is_sampled
from saeguard.guard.forward_pass import ForwardPass
from saeguard.guard.judge import judge_text
from saeguard.guard.ledger import Ledger
from saeguard.guard.verdict import balanced
from saeguard.guard.watchlist import ClampRows, WatchList
from saeguard.policy.types import Clamp, Name, Policy, Selection, Window
from tests.guard import plain
from tests.guard.test_judge import assert_same, columns, said
from tests.guard.watchlists import (
    BOUND,
    FEATURES,
    coded,
    make_hook,
    make_policy,
    make_watchlist,
    random_policy,
    random_roles,
    random_rows,
    seeded,
)

SEEDS = st.integers(0, 2**32 - 1)


@dataclass
class Text:
    """A request as the engine knows it, and what the ledger should know of it."""

    name: str
    f: np.ndarray
    excluded: np.ndarray
    prompt: int
    roles: list[str] = field(default_factory=list)
    computed: int = 0
    known: int = 0
    """Tokens that exist: the prompt, and what was sampled."""
    next: int = 0
    status: list[str] = field(default_factory=list)
    first: dict[int, int] = field(default_factory=dict)

    @property
    def done(self) -> bool:
        """Whether its last token was sampled."""
        return self.known == len(self.f)

    def account(self, start: int, rows: int, *, ran: bool) -> None:
        """Note what a pass that reached the ledger told of positions `start`, ..."""
        if start > self.next:
            why = "untracked" if self.next else "prefix_cached"
            self.status += [why] * (start - self.next)
            self.next = start
        for t in range(self.next, start + rows):
            seen = ran and bool(np.isfinite(self.f[t]).all())
            fate = "massive_norm" if self.f[t, FEATURES] > BOUND else "evaluated"
            self.status.append("special_token" if self.excluded[t] else fate if seen else "error")
        self.next = max(self.next, start + rows)

    def ended(self) -> list[str]:
        """Return the status of every token that exists."""
        left = self.known - self.next
        return self.status + ["aborted"] * (left - 1) + ["not_forwarded"] * min(left, 1)


def random_text(rng: random.Random, name: str, *, faults: bool) -> Text:
    """Return a text of which nothing has been computed, unless its prefix was cached."""
    tokens = rng.randint(2, 24)
    prompt = rng.randint(1, tokens - 1)
    text = Text(
        name,
        random_rows(rng, tokens),
        np.array([rng.random() < 0.08 for _ in range(tokens)]),
        prompt,
        random_roles(rng, prompt),
        known=prompt,
    )
    if faults:
        for t in range(tokens):
            if rng.random() < 0.05:
                text.f[t, rng.randrange(FEATURES + 1)] = rng.choice([np.nan, np.inf, -np.inf])
        if rng.random() < 0.4:
            text.computed = rng.randrange(prompt)
    return text


def forward_pass(rows: Sequence[tuple[Text, int, np.ndarray]], *, ran: bool = True) -> ForwardPass:
    """Return the packet of a pass: of each text its first position and its rows' activations."""
    positions = [np.arange(start, start + len(f)) for _, start, f in rows]
    excluded = [
        np.array([bool(p < len(t.excluded) and t.excluded[p]) for p in at])
        for (t, _, _), at in zip(rows, positions, strict=True)
    ]
    return ForwardPass(
        request_ids=[text.name for text, _, _ in rows],
        query_start=np.cumsum([0, *(len(f) for _, _, f in rows)]),
        positions=np.concatenate(positions),
        eligible=~np.concatenate(excluded),
        f=np.concatenate([f for _, _, f in rows]),
        acted=None,
        ran=ran,
        watchlist="0" * 64,
    )


def schedule(
    rng: random.Random, text: Text, *, steady: bool = False
) -> tuple[tuple[Text, int, np.ndarray], int] | None:
    """Give one text its rows of the next pass, or none; return them and how many count."""
    if text.done or (not steady and rng.random() < 0.3):
        return None
    if text.computed and rng.random() < 0.05:  # preempted, or resumed behind what is cached now
        text.computed = rng.choice([0, rng.randrange(text.computed + 1)])
    start, left = text.computed, text.known - text.computed
    rows = rng.choice([left, rng.randint(1, left)])
    counted, f = rows, text.f[start : start + rows]
    if rows == left:  # a token is sampled, and with drafts, more
        drafts = rng.choice([0, 0, 0, 0 if steady else rng.randint(1, 4)])
        accepted = rng.randint(0, min(drafts, len(text.f) - 1 - text.known))
        rejected = random_rows(rng, drafts - accepted) + 4
        f = np.concatenate([text.f[start : start + rows + accepted], rejected])
        counted += accepted
        text.known += accepted + 1
    text.computed += counted
    return (text, start, f), counted


def run(rng: random.Random, watchlist: WatchList, *, faults: bool) -> list[tuple[Text, Ledger]]:
    """Bring several texts to one ledger in random passes, until each is done or aborted.

    Steady requests bring one token in each.
    """
    ledger = Ledger(watchlist, slots=rng.choice([1, 2, 8]))
    texts = [random_text(rng, f"r{i}", faults=faults) for i in range(rng.randint(1, 5))]
    for text in texts:
        ledger.admit(text.name, text.prompt, roles=coded(text.roles))
    active = list(texts)
    steady = rng.random() < 0.5
    while active:
        if not steady:
            rng.shuffle(active)
        rows = [s for text in active if (s := schedule(rng, text, steady=steady)) is not None]
        if not rows:
            continue
        lost = faults and rng.random() < 0.08
        ran = not (faults and rng.random() < 0.08)
        if not lost:
            seen = forward_pass([r for r, _ in rows], ran=ran)
            for name, i, position, _ in ledger.ingest(seen, np.array([n for _, n in rows])):
                text = next(t for t in texts if t.name == name)
                assert i not in text.first, "a first match is reported once"
                text.first[i] = position
            for (text, start, _), counted in rows:
                text.account(start, counted, ran=ran)
        stays = [t for t in active if not t.done and not (faults and rng.random() < 0.03)]
        active = stays
    return [(text, ledger) for text in texts]


def check_whole(seed: int) -> None:
    """Compare with the judge of whole texts, where every token was evaluated or excluded."""
    rng = seeded(seed)
    policies = [random_policy(rng, f"p{i}") for i in range(4)]
    watchlist = make_watchlist(policies, [make_hook(max_norm=BOUND)])
    for text, ledger in run(rng, watchlist, faults=False):
        seen = len(text.f) - 1
        whole = judge_text(
            watchlist.rules,
            watchlist.shares(text.f[:seen]),
            ~text.excluded[:seen],
            text.prompt,
            coded(text.roles),
            massive := text.f[:seen, FEATURES] > BOUND,
        )
        own = ledger.finish(text.name, len(text.f), forget=False).coverage
        assert balanced(own)
        assert own.evaluated == int((~text.excluded[:seen] & ~massive).sum())
        for i, (expected, found) in enumerate(
            zip(whole, ledger.finish(text.name, len(text.f)), strict=True)
        ):
            assert_same(said(expected, coverage=False), found, policies[i], coverage=False)
            assert expected.acted == found.acted
            assert balanced(found.coverage)
            early = None if policies[i].window.last else found.first_token
            assert early == text.first.get(i), "what the last token decides is not told before"
        assert text.name not in ledger


def check_faults(seed: int) -> None:
    """Compare with the plain reading, where tokens were cached, lost, broken or cut off."""
    rng = seeded(seed)
    policies = [random_policy(rng, f"p{i}") for i in range(4)]
    watchlist = make_watchlist(policies, [make_hook(max_norm=BOUND)])
    for text, ledger in run(rng, watchlist, faults=True):
        status = text.ended()
        with np.errstate(invalid="ignore"):
            shares = watchlist.shares(text.f[: text.known])
        so_far = ledger.finish(text.name, text.known, forget=False)
        for policy, verdict in zip(policies, so_far, strict=True):
            expected = plain.judge(policy, columns(shares), status, text.prompt, text.roles)
            assert_same(expected, verdict, policy)
            assert balanced(verdict.coverage)
        own = ledger.finish(text.name, text.known, forget=False).coverage
        assert balanced(own)
        assert {k: v for k, v in own.skipped.items() if v} == {
            why: status.count(why) for why in set(status) - {"evaluated"}
        }
        assert ledger.finish(text.name, text.known) == so_far


@given(SEEDS)
@settings(derandomize=True, deadline=None, max_examples=120)
def test_same_text_same_verdict(seed: int) -> None:
    """Chunks, batches, rejected drafts and preemption do not show in any verdict."""
    check_whole(seed)


@given(SEEDS)
@settings(derandomize=True, deadline=None, max_examples=120)
def test_every_token_is_accounted_for(seed: int) -> None:
    """What was cached, lost, broken or cut off is counted under its own reason."""
    check_faults(seed)


@pytest.mark.slow
@given(SEEDS)
@settings(deadline=None, max_examples=10_000)
def test_same_text_same_verdict_at_length(seed: int) -> None:
    """Both properties, on a hundred times as many texts."""
    check_whole(seed)
    check_faults(seed)


def simple(**more: object) -> Policy:
    """Return a policy that matches where feature 0 exceeds a half."""
    return make_policy("p", Name("a"), {"a": Selection("f0", 0.5)}, **more)  # type: ignore[arg-type]


def text_of(values: Sequence[float], prompt: int = 1) -> Text:
    """Return a text whose feature 0 takes the values given."""
    f = np.zeros((len(values), FEATURES), np.float32)
    f[:, 0] = values
    return Text("r", f, np.zeros(len(values), bool), prompt, known=prompt)


def test_a_rejected_draft_never_counts() -> None:
    """A row behind the accepted ones fires, and leaves no trace."""
    ledger = Ledger(make_watchlist([simple(window=Window(1, 4))]))
    text = text_of([0, 0, 9, 9])
    ledger.admit("r", 1)
    ledger.ingest(forward_pass([(text, 0, text.f)]), np.array([2]))
    ledger.ingest(forward_pass([(text, 2, np.zeros((2, FEATURES), np.float32))]), np.array([2]))

    verdict = ledger.finish("r", 5)[0]

    assert (verdict.outcome, verdict.score, verdict.matched_tokens) == ("no_match", 0.0, 0)
    assert verdict.features["f0"].max == 0.0


def test_a_request_that_is_no_longer_of_interest_is_left_alone() -> None:
    """No valid row: nothing advances, and an unknown request is passed over."""
    ledger = Ledger(make_watchlist([simple()]))
    text, stranger = text_of([9, 9]), text_of([9, 9])
    stranger.name = "stranger"
    ledger.admit("r", 1)

    new = ledger.ingest(forward_pass([(stranger, 0, text.f), (text, 0, text.f)]), np.array([2, 0]))

    assert new == []
    assert ledger.finish("r", 2)[0].outcome == "not_evaluated"


def test_a_pass_without_the_tap_is_an_error_not_silence() -> None:
    """Stale activations are not read, and every such pass is counted."""
    ledger = Ledger(make_watchlist([simple()]))
    text = text_of([9, 9])
    ledger.admit("r", 1)
    ledger.ingest(forward_pass([(text, 0, text.f)], ran=False), np.array([2]))

    verdict = ledger.finish("r", 3)[0]

    assert ledger.unwatched_passes == 1
    assert (verdict.outcome, verdict.score, verdict.error) == ("error", None, "not_read")
    assert verdict.coverage.skipped == {"error": 2, "not_forwarded": 1}


def test_a_lost_pass_breaks_a_window() -> None:
    """`2 of 3` does not count a token of before the gap as if it were next to what follows."""
    ledger = Ledger(make_watchlist([simple(window=Window(2, 3))]))
    text = text_of([9, 0, 0, 0, 9, 0])
    ledger.admit("r", 1)
    ledger.ingest(forward_pass([(text, 0, text.f[:1])]), np.array([1]))
    ledger.ingest(forward_pass([(text, 4, text.f[4:5])]), np.array([1]))

    verdict = ledger.finish("r", 6)[0]

    assert verdict.outcome == "no_match"
    assert verdict.coverage.skipped == {"untracked": 3, "not_forwarded": 1}


def test_a_prefix_hit_is_told_apart_from_a_lost_pass() -> None:
    """A request that starts late had its prefix cached."""
    ledger = Ledger(make_watchlist([simple()]))
    text = text_of([9, 9, 0, 0], prompt=3)
    ledger.admit("r", 3)
    ledger.ingest(forward_pass([(text, 2, text.f[2:3])]), np.array([1]))

    verdict = ledger.finish("r", 4)[0]

    assert verdict.outcome == "no_match"
    assert verdict.coverage.skipped == {"prefix_cached": 2, "not_forwarded": 1}
    assert coverage_record(verdict.coverage)["tokens"] == 4


def test_a_request_aborted_before_it_ran_is_not_evaluated() -> None:
    """Its tokens are counted all the same."""
    ledger = Ledger(make_watchlist([simple()]))
    ledger.admit("r", 5)

    verdict = ledger.finish("r", 5)[0]

    assert verdict.outcome == "not_evaluated"
    assert verdict.coverage.skipped == {"aborted": 4, "not_forwarded": 1}


def test_a_slot_that_is_used_again_remembers_nothing() -> None:
    """The second request in a slot starts afresh."""
    ledger = Ledger(make_watchlist([simple(window=Window(1, 4), keep=9)]), slots=1)
    loud, quiet = text_of([9, 9]), text_of([0, 0])
    for text in (loud, quiet):
        ledger.admit("r", 1)
        ledger.ingest(forward_pass([(text, 0, text.f)]), np.array([2]))
        verdict = ledger.finish("r", 3)[0]

    assert (verdict.outcome, verdict.score, verdict.matched_tokens) == ("no_match", 0.0, 0)
    assert len(ledger) == 0


def test_a_request_can_have_a_shadow_policy_enforced() -> None:
    """It holds for that request only."""
    ledger = Ledger(make_watchlist([simple(mode="shadow")]))
    text, other = text_of([9, 9]), text_of([9, 9])
    other.name = "other"
    ledger.admit("r", 1, enforced=[True])
    ledger.admit("other", 1)
    ledger.ingest(forward_pass([(text, 0, text.f), (other, 0, other.f)]), np.array([2, 2]))

    mine, theirs = ledger.finish("r", 3)[0], ledger.finish("other", 3)[0]

    assert (mine.mode, mine.acted) == ("enforce", "flag")
    assert (theirs.mode, theirs.acted) == ("shadow", None)
    assert mine.outcome == theirs.outcome == "match"


def test_a_clamp_acted_only_where_it_edited() -> None:
    """A match that the forward did not act on is not reported as acted on."""
    import torch

    policy = simple(clamp=Clamp(("f0",), 0.0))
    rows = ClampRows(0, (0,), (0,), (0,), torch.zeros(1), torch.zeros(1, FEATURES))
    for acted in (False, True):
        ledger = Ledger(make_watchlist([policy], clamps=[rows]))
        text = text_of([9, 9])
        ledger.admit("r", 1)
        seen = forward_pass([(text, 0, text.f)])
        seen = ForwardPass(**{f: getattr(seen, f) for f in ForwardPass.__slots__} | {
            "acted": np.full((2, 1), acted)
        })  # fmt: skip
        ledger.ingest(seen, np.array([2]))

        assert ledger.finish("r", 3)[0].acted == ("clamp" if acted else None)


def test_a_request_outside_the_sample_is_not_evaluated() -> None:
    """It says so, with every token; the others, and other policies, are judged as ever."""
    some, every = replace(simple(), id="some", sample=0.25), simple()
    outcomes = []
    for n in range(200):
        ledger = Ledger(make_watchlist([some, every]))
        text = text_of([9, 9])
        text.name = f"r{n}"
        ledger.admit(text.name, 1)
        ledger.ingest(forward_pass([(text, 0, text.f)]), np.array([2]))
        mine, other = ledger.finish(text.name, 3)
        assert other.outcome == "match"
        assert balanced(mine.coverage)
        assert (mine.outcome == "match") == is_sampled(some, text.name)
        if mine.outcome != "match":
            assert (mine.outcome, mine.acted, mine.features) == ("not_evaluated", None, {})
            assert mine.coverage.skipped == {"not_sampled": 3}
        outcomes.append(mine.outcome)

    assert 30 < outcomes.count("match") < 70


def test_both_versions_of_an_id_look_at_the_same_requests() -> None:
    """Shadow and enforced are compared on the same sample; another id has another."""
    names = [f"r{n}" for n in range(400)]
    some = replace(simple(), sample=0.5)
    other = replace(some, id="other")

    mine = [is_sampled(some, name) for name in names]
    assert mine == [is_sampled(replace(some, mode="shadow"), name) for name in names]
    assert mine != [is_sampled(other, name) for name in names]
    assert all(is_sampled(replace(some, sample=1.0), name) for name in names)


def test_shadow_beside_enforced_of_one_id() -> None:
    """Both are judged, one acts, and the counters tell them apart."""
    shadow, enforced = simple(mode="shadow"), simple()
    ledger = Ledger(make_watchlist([shadow, enforced]))
    text = text_of([9, 9])
    ledger.admit("r", 1)
    ledger.ingest(forward_pass([(text, 0, text.f)]), np.array([2]))
    verdicts = ledger.finish("r", 3)
    counts = Counts()
    counts.request(verdicts, verdicts[0].coverage)

    assert [(v.mode, v.outcome, v.acted) for v in verdicts] == [
        ("shadow", "match", None),
        ("enforce", "match", "flag"),
    ]
    counted = [c for c in counts.take() if c[0] in ("verdicts", "actions")]
    assert sorted(counted) == [
        ["actions", "p", "enforce", "flag", 1],
        ["verdicts", "p", "enforce", "match", 1],
        ["verdicts", "p", "shadow", "match", 1],
    ]


def test_what_is_counted_is_what_the_verdicts_say() -> None:
    """Of every kind, whatever the order in which kinds are numbered; waived ones count as acted."""
    policies = [
        replace(simple(mode=mode), id=name, sample=sample, scope=scope)
        for name, mode, sample, scope in (
            ("match", "enforce", 1.0, "both"),
            ("waived", "enforce", 1.0, "both"),
            ("absent", "enforce", 1.0, "both"),
            ("quiet", "shadow", 1.0, "prompt"),
            ("left-out", "shadow", 1e-9, "both"),
        )
    ]
    watchlist = make_watchlist(policies)
    counts, expected = Counts(), Counter[tuple[str, ...]]()
    applies = np.flatnonzero([p.id != "absent" for p in policies])
    for values in ([0, 9], [0, np.nan], [0, 0], [0, 0], [0, 9]):
        ledger = Ledger(watchlist)
        text = text_of(values)
        ledger.admit("r", 1, enforced=[p.mode == "enforce" and p.id != "waived" for p in policies])
        ledger.ingest(forward_pass([(text, 0, text.f)]), np.array([2]))
        said = ledger.finish("r", 3).decided(applies, {1: "why"})
        assert said.errors() == sum(v.outcome == "error" for v in said)
        assert said.outcomes() == Counter(v.outcome for v in said)
        assert [policies[i].id for i in said.telling()] == [
            v.policy for v in said if v.outcome in {"match", "error"}
        ]
        assert said.acting() == [v for v in said if v.acted]
        assert {v.policy: v.exception for v in said}["waived"] == "why"
        expected.update((v.policy, v.mode, v.outcome) for v in said)
        counts.request(said, said[0].coverage)
    counted = {tuple(c[1:4]): c[4] for c in counts.take() if c[0] == "verdicts"}
    assert counted == expected
    assert {outcome for *_, outcome in expected} == {"match", "no_match", "error", "not_evaluated"}


def test_only_a_stop_that_acts_has_a_message() -> None:
    """In shadow nothing is put in place of the text."""
    stop = replace(simple(), action="stop", message="withheld")
    for mode, expected in (("enforce", "withheld"), ("shadow", None)):
        ledger = Ledger(make_watchlist([replace(stop, mode=mode)]))
        text = text_of([9, 9])
        ledger.admit("r", 1)
        ledger.ingest(forward_pass([(text, 0, text.f)]), np.array([2]))

        assert ledger.finish("r", 3)[0].message == expected
