"""From files to policies."""

from __future__ import annotations

import shutil
import time
from datetime import date
from pathlib import Path

import pytest

from saeguard.policy.errors import PolicyErrors
from saeguard.policy.load import load_policies
from saeguard.policy.types import (
    And,
    Clamp,
    Exception_,
    Name,
    Over,
    Policy,
    Selection,
    Window,
)
from tests.models import write_policy
from tests.policy.example import GOOD, changed, policy, read


def test_every_key(tmp_path: Path) -> None:
    """Each key of the file is found again in the policy."""
    found = policy(tmp_path)

    assert found == Policy(
        id="unsafe-code.shell-injection",
        title="Writes a shell command built from user text",
        owner="safety-code@example.com",
        severity="high",
        mode="shadow",
        action="flag",
        on_error="allow",
        scope="output",
        uncached="count",
        feature_set="demo/unsafe-code",
        rationale="Fires on os.system and subprocess(shell=True) with untrusted input.",
        falsepositives=("Security tutorials",),
        review_by=date(2027, 2, 1),
        detect={
            "shell": Selection("shell_exec", 0.6),
            "untrusted": Selection("string_built", 0.4),
        },
        condition=And((Name("shell"), Name("untrusted"))),
        window=Window(3, 8),
        keep=16,
        clamp=None,
        exceptions=(
            Exception_("red-team", "red team", "rt@example.com", date(2027, 3, 31), "red"),
        ),
        path=tmp_path / "p.yaml",
        digest=found.digest,
    )


def test_defaults(tmp_path: Path) -> None:
    """Keys that may be left out have the documented values."""
    optional = ("on_error", "falsepositives", "review_by", "for", "keep", "exceptions", "  -")
    lines = [line for line in GOOD.splitlines() if not line.startswith(optional)]

    found, _ = read(tmp_path, "\n".join(lines))

    assert found is not None
    assert (found.on_error, found.window, found.keep) == ("allow", Window(1, 1), 0)
    assert (found.falsepositives, found.review_by) == ((), None)
    assert (found.clamp, found.exceptions) == (None, ())


@pytest.mark.parametrize(("keep", "tokens"), [("0", 0), ("16", 16), ("1 token", 1), ("4096", 4096)])
def test_keep(tmp_path: Path, keep: str, tokens: int) -> None:
    """`keep` may be written with its unit or without."""
    assert tokens == policy(tmp_path, ("keep: 16 tokens", f"keep: {keep}")).keep


def test_clamp(tmp_path: Path) -> None:
    """A clamp needs its action, and is kept as written."""
    found = policy(
        tmp_path, ("action: flag", "action: clamp\nclamp: {features: [shell_exec], to: -0.5}")
    )

    assert found.clamp == Clamp(("shell_exec",), -0.5)


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("to: 1", Clamp(("shell_exec",), 1.0)),
        ("activation: -3.5", Clamp(("shell_exec",), -3.5, "activation")),
        ("scale: 0", Clamp(("shell_exec",), 0.0, "scale")),
        ("ablate: true, when: always", Clamp(("shell_exec",), 0.0, "ablate", "always")),
        ("at_most: 0.4, when: matched", Clamp(("shell_exec",), 0.4, "at_most", "matched")),
    ],
)
def test_ways_to_clamp(tmp_path: Path, written: str, meant: Clamp) -> None:
    """Each way is read as one edit with one amount."""
    clamp = f"action: clamp\nclamp: {{features: [shell_exec], {written}}}"

    assert policy(tmp_path, ("action: flag", clamp)).clamp == meant


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("mean of 16 tokens", Over("mean", 16)),
        ("mean of 1 token", Over("mean", 1)),
        ("max of 64 tokens", Over("max", 64)),
        ("average with half-life 8 tokens", Over("average", 8)),
        ("max of the request", Over("peak")),
    ],
)
def test_over(tmp_path: Path, written: str, meant: Over) -> None:
    """Each aggregation over tokens is read; without one it is the token's own share."""
    found = policy(tmp_path, ("above: 0.6", f"above: 0.6, over: {written}"))

    assert found.detect["shell"].over == meant
    assert found.detect["untrusted"].over == Over("token")


def test_count_sample_and_message(tmp_path: Path) -> None:
    """The other keys keep what is written, and have the documented defaults."""
    found = policy(
        tmp_path,
        ("for: 3 of 8 tokens", "for: 20 tokens in the request"),
        ("scope: output", "scope: output\nsample: 0.5%"),
        ("action: flag", "action: stop\nmessage: Withheld."),
    )

    assert (found.window, found.sample, found.message) == (Window(20, None), 0.005, "Withheld.")
    assert (policy(tmp_path).sample, policy(tmp_path).message) == (1.0, None)


def test_stop_is_part_of_the_language(tmp_path: Path) -> None:
    """The action stop can be read; whether the engine can do it is checked elsewhere."""
    assert policy(tmp_path, ("action: flag", "action: stop")).action == "stop"


@pytest.mark.parametrize("above", ["0.000001", "100", "1", "99.9"])
def test_thresholds(tmp_path: Path, above: str) -> None:
    """The bounds of a threshold are above 0 and at most 100."""
    found = policy(tmp_path, ("above: 0.6", f"above: {above}"))

    assert found.detect["shell"].above == float(above)


class TestDigest:
    """What the digest depends on."""

    @pytest.mark.parametrize(
        ("old", "new"),
        [
            ("schema:", "# a comment\nschema:"),
            ("mode: shadow", "mode:   'shadow'   # quoted"),
            ("{feature: shell_exec, above: 0.6}", "{above: 0.60, feature: shell_exec}"),
            (
                "  Fires on os.system and subprocess(shell=True)\n",
                "  Fires on os.system and\n  subprocess(shell=True)\n",
            ),
            ("for: 3 of 8 tokens\nkeep: 16 tokens", "keep: 16 tokens\nfor: 3 of 8 tokens"),
        ],
    )
    def test_not_on_layout(self, tmp_path: Path, old: str, new: str) -> None:
        """Comments, quotes, order and line breaks leave it as it is."""
        assert policy(tmp_path).digest == policy(tmp_path, (old, new)).digest

    @pytest.mark.parametrize(
        ("old", "new"),
        [("0.6", "0.61"), ("mode: shadow", "mode: enforce"), ("red-team", "blue-team")],
    )
    def test_on_content(self, tmp_path: Path, old: str, new: str) -> None:
        """A changed value changes it."""
        assert policy(tmp_path).digest != policy(tmp_path, (old, new)).digest

    def test_is_the_same_everywhere(self, tmp_path: Path) -> None:
        """It does not change with the release, so that old events can be matched to files."""
        assert policy(tmp_path).digest == (
            "e4b923695e5348ad41efb77eea93155637f8ab27cfdeabbb7adace9de2964677"
        )


class TestFolder:
    """A folder of policies."""

    def test_finds_policies_only(self, tmp_path: Path) -> None:
        """Folders are searched; tests, hidden names and other files are left out."""
        names = ["b.yaml", "a/a.yaml", "b.test.yaml", ".hidden.yaml", "a/.git/x.yaml", "a/x.md"]
        for i, name in enumerate(names):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(changed(("id: ", f"id: p{i}.")))

        found = load_policies(tmp_path)

        assert [tmp_path / "a/a.yaml", tmp_path / "b.yaml"] == [p.path for p in found]

    def test_kubernetes_volume(self, tmp_path: Path) -> None:
        """Each file of a ConfigMap volume is read once, through its link."""
        (tmp_path / "..2027").mkdir()
        (tmp_path / "..2027" / "p.yaml").write_text(GOOD)
        (tmp_path / "..data").symlink_to("..2027")
        (tmp_path / "p.yaml").symlink_to("..data/p.yaml")

        assert len(load_policies(tmp_path)) == 1

    def test_linked_folder(self, tmp_path: Path) -> None:
        """A link to a folder elsewhere is followed."""
        (tmp_path / "real").mkdir()
        (tmp_path / "real" / "p.yaml").write_text(GOOD)
        (tmp_path / "policies").mkdir()
        (tmp_path / "policies" / "link").symlink_to(tmp_path / "real")

        assert len(load_policies(tmp_path / "policies")) == 1

    def test_shadow_beside_enforce(self, tmp_path: Path) -> None:
        """One id may be in shadow and enforced at once, to try a change."""
        (tmp_path / "new.yaml").write_text(GOOD)
        (tmp_path / "old.yaml").write_text(changed(("mode: shadow", "mode: enforce")))

        assert [p.mode for p in load_policies(tmp_path)] == ["shadow", "enforce"]

    def test_same_id_twice(self, tmp_path: Path) -> None:
        """The second policy of one id and mode is told where the first one is."""
        (tmp_path / "a.yaml").write_text(GOOD)
        (tmp_path / "b.yaml").write_text(GOOD)

        with pytest.raises(PolicyErrors) as caught:
            load_policies(tmp_path)

        [error] = caught.value.errors
        assert (error.code, error.path.name) == ("duplicate-id", "b.yaml")
        assert (error.line, error.column) == (2, 5)
        assert f"{tmp_path}/a.yaml has this id and mode already" in error.message

    def test_nothing_there(self, tmp_path: Path) -> None:
        """An empty folder is an error: a missing mount must not switch the guard off."""
        with pytest.raises(PolicyErrors) as caught:
            load_policies(tmp_path)

        assert [error.code for error in caught.value.errors] == ["no-policies"]

    def test_errors_of_all_files(self, tmp_path: Path) -> None:
        """One run tells the mistakes of every file, and one bad file stops the load."""
        for name in ("a", "b", "c"):
            (tmp_path / f"{name}.yaml").write_text(changed(("severity: high", f"severity: {name}")))
        (tmp_path / "d.yaml").write_text(GOOD)

        with pytest.raises(PolicyErrors) as caught:
            load_policies(tmp_path)

        assert [e.path.name for e in caught.value.errors] == ["a.yaml", "b.yaml", "c.yaml"]

    def test_a_thousand_files(self, tmp_path: Path) -> None:
        """A large library loads in about a second; ten times that is a defect."""
        for i in range(1000):
            (tmp_path / f"{i}.yaml").write_text(changed(("id: ", f"id: p{i}.")))
        start = time.perf_counter()

        assert len(load_policies(tmp_path)) == 1000
        assert time.perf_counter() - start < 10


def test_shipped_policies_load(tmp_path: Path) -> None:
    """The library that ships is well formed, from wherever it lies."""
    shutil.copytree("policies", tmp_path / "copy")

    ours = load_policies(Path("policies"))

    assert [p.digest for p in ours] == [p.digest for p in load_policies(tmp_path / "copy")]
    assert len(ours) >= 6


def test_a_link_into_nothing_is_told(tmp_path: Path) -> None:
    """It may have been a folder of policies, which would vanish without a word."""
    write_policy(tmp_path / "one.yaml", detect={"a": {"feature": "x", "above": 1}}, condition="a")
    (tmp_path / "more").symlink_to(tmp_path / "away")
    with pytest.raises(PolicyErrors, match="no such file or folder"):
        load_policies(tmp_path)
