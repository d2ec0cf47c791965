"""The timeline places tokens, moments and skipped tokens as they were."""

from __future__ import annotations

from dataclasses import replace

import pytest

from demo.report import line_words
from demo.timeline import Mark, Match, Span, pick, spans, timeline
from tests.demo import made


def test_neighbours_of_one_name_are_joined() -> None:
    """Nothing is lost between them."""
    assert list(spans(["a", "a", "", "a"])) == [Span("a", 0, 2), Span("", 2, 3), Span("a", 3, 4)]
    assert list(spans([])) == []


def test_skipped_tokens_are_marked_with_their_reason() -> None:
    """And counted by it."""
    line = timeline(made.view())
    assert line.skipped == (
        Span("special_token", 0, 1), Span("special_token", 3, 4), Span("not_forwarded", 6, 7),
    )  # fmt: skip
    assert line.reasons == {"special_token": 2, "not_forwarded": 1}


def test_output_tokens_have_the_moment_at_which_the_client_received_them() -> None:
    """Prompt tokens have none."""
    line = timeline(made.view())
    assert [line.seconds(i) for i in range(8)] == [None] * 4 + [0.2, 0.3, 0.5, None]
    assert line.ticks == (Mark(4, 0.2), Mark(5, 0.3), Mark(6, 0.5))


def test_policies_on_one_feature_share_a_lane() -> None:
    """With a mark for each."""
    view = made.view()
    line = timeline(replace(view, shadow=(replace(view.hits[0], action=None, first_token=5),)))
    (lane,) = line.lanes
    assert lane.matches == (
        Match("unsafe-code.shell", shadow=False, token=4),
        Match("unsafe-code.shell", shadow=True, token=5),
    )


def test_it_is_described_in_words() -> None:
    """What was skipped, when it was flagged, and when that token was read."""
    words = line_words(timeline(made.view()))
    assert words == (
        "4 prompt tokens, 3 output tokens, 0.5 s. It was flagged at token 4, which the client "
        "received after 0.20 s, and was read in the next step, by 0.30 s. Skipped, in black: "
        "2 special token, 1 not forwarded."
    )


def test_a_long_answer_has_few_ticks() -> None:
    """The first and the last token among them, without one that would touch the last."""
    answer = made.answer(token_ids=tuple(range(160)), arrived=tuple(float(i) for i in range(160)))
    ticks = timeline(replace(made.view(), answer=answer)).ticks
    assert [tick.seconds for tick in ticks] == [0.0, 26.0, 52.0, 78.0, 104.0, 130.0, 159.0]


@pytest.mark.parametrize("change", [{"arrived": ()}, {}])
def test_only_a_streamed_request_has_a_timeline(change: dict[str, object]) -> None:
    """The others have no moments."""
    view = made.view(**change)
    account = replace(made.account(), views=(view,))
    assert (pick(account) is None) == (change != {})
