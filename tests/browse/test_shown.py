"""Texts are shown as text: nothing hidden, nothing turned around, nothing endless."""

from __future__ import annotations

from saeguard.browse.shown import LONGEST, STEPS, step, visible, words


def test_control_characters_are_visible() -> None:
    """Bidi overrides, zero-width characters and NUL by number; line ends and tabs marked."""
    assert visible("a\u202eb\u200bc\x00") == "a⟨U+202E⟩b⟨U+200B⟩c⟨U+0000⟩"
    assert visible("x\ny\tz") == "x↵\ny⇥\tz"
    assert visible("Füße 👍 中") == "Füße 👍 中"


def test_long_tokens_are_cut() -> None:
    """With their length."""
    assert visible("a" * 5_000_000) == "a" * LONGEST + "… (5,000,000 characters)"


def test_the_ramp_has_a_step_for_any_activation() -> None:
    """0 is not coloured, the highest has the last step, and weak ones are seen."""
    assert [step(v, 10) for v in (0, -1, 0.001, 5, 10, 30)] == [0, 0, 1, 5, STEPS, STEPS]
    assert step(1.0, 0.0) == 0


def test_spaces_are_visible_in_lists() -> None:
    """An empty token has a sign of its own."""
    assert words([" the", "", "\n"]) == ["·the", "∅", "↵\n"]
