"""The page shows what happened, and trusts nothing the model says."""

from __future__ import annotations

from dataclasses import replace
from html.parser import HTMLParser

import pytest

from demo.account import Account, Token, Trace
from demo.report import heat, percent, render, segments, tip, visible
from tests.demo import made


class Reader(HTMLParser):
    """Collects what a browser would load or run, and the text it would show."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.links: list[str | None] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note tag, attributes and what is linked."""
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        self.links += [value for name, value in attrs if name in ("href", "src")]

    def handle_data(self, data: str) -> None:
        """Note text."""
        self.text += data


def test_model_output_is_escaped_everywhere() -> None:
    """Prompts, answers, tokens, code, findings, titles and facts all carry a script here."""
    page = render(made.account())
    reader = Reader(page)
    assert "script" not in reader.tags
    assert not {name for name in reader.attributes if name.startswith("on")}
    assert reader.text.count(made.EVIL) >= 8


def test_the_page_loads_nothing() -> None:
    """It links to the event log beside it, and forbids the browser everything else."""
    page = render(made.account())
    assert Reader(page).links == ["events.jsonl"]
    assert "default-src 'none'" in page
    assert "@import" not in page
    assert "url(" not in page


def test_flagged_requests_are_shown_and_counted() -> None:
    """One of three; another one matched in shadow, and the last is quiet."""
    page = render(made.account())
    assert "1 of 3 requests were flagged, and 1 more matched in shadow" in page
    assert 'id="unsafe_code-1"' in page
    assert "0 / 1" in page


@pytest.mark.parametrize("change", [{"clamped": ()}, {"views": (made.view(flagged=False),)}])
def test_an_account_without_a_clamp_or_without_flags_renders(change: dict[str, object]) -> None:
    """Nothing to show is no error."""
    account: Account = replace(made.account(), **change)
    assert "</html>" in render(account)


@pytest.mark.parametrize(
    ("share", "skipped", "expected"),
    [
        (-0.5, "", "0"),
        (0.02, "", "0"),
        (0.3, "", "30"),
        (0.9, "", "90"),
        (7.0, "", "100"),
        (9.0, "special_token", "0"),
        (0.7, "not_forwarded", "0"),
        (float("nan"), "", "0"),
    ],
)
def test_heat_is_the_share_between_0_and_1(share: float, skipped: str, expected: str) -> None:
    """Tokens that the guard does not read have none, whatever was computed for them."""
    assert heat(Token("x", share, "output", skipped)) == expected  # type: ignore[arg-type]


def test_hovering_shows_share_threshold_and_first_match() -> None:
    """With the token's place, which is what verdicts and events count in."""
    trace = Trace("shell", 0.5, made.tokens(), 4)
    tips = [tip(trace, i, token) for i, token in enumerate(trace.tokens)]
    assert tips[0] == "token 0: not evaluated, special token"
    assert tips[4] == "token 4: share 0.90, threshold 0.5; first match"
    assert tips[6] == "token 6: not evaluated, not forwarded"


def test_what_a_policy_does_not_look_at_is_not_over_its_threshold() -> None:
    """It is coloured, and hovering says so."""
    token = Token("x", 0.9, "user")
    trace = Trace("shell", 0.5, (token,), 4, "output")
    prompt = replace(trace, scope="prompt")
    assert (trace.over(token), prompt.over(token)) == (False, True)
    assert not replace(prompt, by_token=False).over(token)
    assert tip(trace, 0, token).endswith("threshold 0.5, outside the policy's scope")


def test_a_text_is_cut_by_who_wrote_it() -> None:
    """What the chat template wrote is left out."""
    parts = list(segments(Trace("shell", 0.5, made.tokens(), 4)))
    assert [(p["role"], [i for i, _ in p["tokens"]]) for p in parts] == [
        ("user", [1, 2]),
        ("output", [4, 5, 6]),
    ]


def test_a_line_break_is_seen() -> None:
    """Its colour would otherwise be invisible."""
    assert visible(Token("\n\n", 1.0, "output")) == ("⏎", "\n\n")
    assert visible(Token("a\n", 1.0, "output")) == ("a\n", "")


@pytest.mark.parametrize(
    ("value", "said"), [(1.0, "100 %"), (0.99999, "99.9 %"), (0.5, "50 %"), (0.847, "84.7 %")]
)
def test_a_share_is_never_rounded_up_to_all(value: float, said: str) -> None:
    """Only full coverage is called full."""
    assert percent(value) == said
