"""Policies against what they refer to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path

import pytest

from saeguard.guard.scopes import SCOPES
from saeguard.policy.lint import resolve
from tests.policy.example import changed, policy

EARLY = date(2026, 1, 1)


@dataclass
class Feature:
    """A feature with or without clamp latents."""

    clamp: tuple[int, ...] = ()


@dataclass
class Set:
    """A feature set of two features."""

    features: Mapping[str, Feature] = field(
        default_factory=lambda: {"shell_exec": Feature((7,)), "string_built": Feature()}
    )


SETS = {"demo/unsafe-code": Set()}


def test_nothing_to_say(tmp_path: Path) -> None:
    """A policy that fits gives no findings."""
    assert resolve([policy(tmp_path)], SETS, today=EARLY) == ()


def test_unknown_feature_set(tmp_path: Path) -> None:
    """The nearest feature set is suggested."""
    [finding] = resolve(
        [policy(tmp_path, ("demo/unsafe-code", "demo/unsafe_code"))], SETS, today=EARLY
    )

    assert (finding.line, finding.column, finding.code) == (10, 14, "unknown-feature-set")
    assert finding.message == (
        'there is no feature set "demo/unsafe_code"; did you mean "demo/unsafe-code"? '
        "there are: demo/unsafe-code"
    )


def test_no_feature_sets(tmp_path: Path) -> None:
    """With none at all, that is said."""
    [finding] = resolve([policy(tmp_path)], {}, today=EARLY)

    assert finding.message == 'there is no feature set "demo/unsafe-code"; none was found'


def test_a_path_for_a_feature_set(tmp_path: Path) -> None:
    """It is named by its id; the message says which one was meant."""
    [known] = SETS
    written = policy(tmp_path, (f"feature_set: {known}", f"feature_set: feature_sets/{known}"))
    [finding] = resolve([written], SETS, today=EARLY)
    assert f'did you mean "{known}"?' in finding.message


def test_unknown_feature(tmp_path: Path) -> None:
    """The nearest feature is suggested, at the place where it is named."""
    [finding] = resolve([policy(tmp_path, ("shell_exec", "shel_exec"))], SETS, today=EARLY)

    assert (finding.line, finding.column, finding.code) == (17, 20, "unknown-feature")
    assert finding.message == (
        'the feature set "demo/unsafe-code" has no feature "shel_exec"; '
        'did you mean "shell_exec"? there are: shell_exec, string_built'
    )


def test_clamp_without_latents(tmp_path: Path) -> None:
    """A feature that names nothing to clamp cannot be clamped."""
    clamp = "action: clamp\nclamp: {features: [shell_exec, string_built, other], to: 0}"
    findings = resolve([policy(tmp_path, ("action: flag", clamp))], SETS, today=EARLY)

    assert [(finding.line, finding.column, finding.code) for finding in findings] == [
        (8, 32, "no-clamp-latents"),
        (8, 46, "unknown-feature"),
    ]
    assert findings[0].message == (
        'the feature "string_built" names no latents to clamp; those that do: shell_exec'
    )


def test_dates(tmp_path: Path) -> None:
    """Past dates are warnings, from the day after."""
    found = [policy(tmp_path)]

    assert resolve(found, SETS, today=date(2027, 2, 1)) == ()
    assert [(f.code, f.line, f.level) for f in resolve(found, SETS, today=date(2027, 3, 31))] == [
        ("review-due", 15, "warning")
    ]
    assert [(f.code, f.line) for f in resolve(found, SETS, today=date(2027, 4, 1))] == [
        ("exception-expired", 23),
        ("review-due", 15),
    ]


@pytest.mark.parametrize("mode", ["shadow", "enforce"])
@pytest.mark.parametrize("scope", SCOPES)
def test_forgeable_turns(scope: str, mode: str, tmp_path: Path) -> None:
    """Only where the policy acts, and looks at the user's messages or the output alone."""
    changes = ("mode: shadow", f"mode: {mode}"), ("scope: output", f"scope: {scope}")
    found = resolve([policy(tmp_path, *changes)], SETS, today=EARLY)

    codes = {"user": "forgeable-turn", "output": "text-in-pieces"}
    noted = [(codes[scope], "note", 9)] if mode == "enforce" and scope in codes else []
    assert [(f.code, f.level, f.line) for f in found] == noted


def test_file_changed_meanwhile(tmp_path: Path) -> None:
    """A finding on a file that has changed since points at the file, not at a wrong line."""
    found = policy(tmp_path, ("feature: string_built", "feature: nowhere"))
    found.path.write_text(changed(("schema", "# moved\nschema")))

    [finding] = resolve([found], SETS, today=EARLY)

    assert (finding.line, finding.column, finding.source) == (1, 1, "")
