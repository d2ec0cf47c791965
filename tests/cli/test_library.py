"""`saeguard policy list | new | fmt`, and the library that ships."""

from __future__ import annotations

import errno
import json
import os
import re
from pathlib import Path

import pytest
import yaml

from saeguard.cli.check import read_feature_sets
from saeguard.policy.errors import PolicyErrors
from saeguard.policy.load import load_policies
from saeguard.reload.policy_source import SourceError
from saeguard.vllm.settings import Settings
from saeguard.vllm.startup import load_watchlist
from tests.cli.project import BOTH, PLAIN, lay_out, plain, record, run

ROOT = Path.cwd()
BEYOND = {
    "bias", "power-seeking", "secrecy", "dangerous-content", "hallucination", "refusal",
    "jailbreak", "manipulation",
}  # fmt: skip


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Start in a folder with one good policy and its feature set."""
    lay_out(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


class TestShipped:
    """What lies in policies/ and feature_sets/."""

    def test_index_is_current(self, capsys: pytest.CaptureFixture[str]) -> None:
        """`policies/README.md` is what the tool writes; run that to renew it."""
        assert run("policy", "list", "--markdown") == 0
        assert Path("policies/README.md").read_text() == capsys.readouterr().out

    def test_the_path_is_the_id(self) -> None:
        """A policy's place is its taxonomy."""
        for policy in load_policies(Path("policies")):
            assert policy.path == Path("policies", *policy.id.split(".")).with_suffix(".yaml")

    def test_templates(self) -> None:
        """Eight more behaviours ship as templates that name what has to be found."""
        sets = read_feature_sets(Path("feature_sets"))
        open_ = [p for p in load_policies(Path("policies")) if p.feature_set in sets.templates]

        assert sets.mistakes == []
        assert {policy.id.split(".")[0] for policy in open_} == BEYOND
        assert {policy.mode for policy in open_} == {"shadow"}
        assert all(policy.falsepositives and policy.rationale for policy in open_)
        used = {(p.feature_set, s.feature) for p in open_ for s in p.detect.values()}
        assert used == {(n, f) for n, t in sets.templates.items() for f in t.features}

    def test_published_latents_have_a_source(self) -> None:
        """A latent is named with model, checkpoint, grade and source, or not at all."""
        published = []
        for path in sorted(Path("feature_sets/templates").glob("*.yaml")):
            comments = re.findall(r"^    # ((?:- |  ).*\n)", path.read_text(), re.MULTILINE)
            published += yaml.safe_load("".join(comments)) or []

        assert len(published) == 4
        assert all("/" in p["model"] and "layer" in p["sae"] for p in published)
        assert all(p["latents"] and p["grade"] in {"A", "B"} and p["source"] for p in published)

    def test_check(self, capsys: pytest.CaptureFixture[str]) -> None:
        """The library has no mistakes, and every policy has tests; weak features are reported."""
        assert run("check", "--require-tests", "--format", "json") == 0
        found = json.loads(capsys.readouterr().out)
        told = {(f["level"], f["code"]) for f in found if f["level"] != "note"}
        assert told <= {("warning", "weak-feature")}

    def test_served_without_the_templates(self) -> None:
        """Templates are left out of the watch list; the others are served."""
        templates = read_feature_sets(Path("feature_sets")).templates
        expected = [p.id for p in load_policies(Path("policies")) if p.feature_set not in templates]

        watchlist = load_watchlist(Settings(policies="policies"))

        assert expected
        assert sorted(p.id for p in watchlist.policies) == sorted(expected)

    def test_a_template_cannot_be_enforced(self, tmp_path: Path) -> None:
        """An enforced template stops the server with place and reason: no guard stands there."""
        text = Path("policies/bias/stereotype.yaml").read_text()
        (tmp_path / "p.yaml").write_text(
            text.replace("mode: shadow", "mode: enforce\non_error: allow")
        )

        with pytest.raises(PolicyErrors, match="cannot be enforced") as caught:
            load_watchlist(Settings(policies=str(tmp_path)))

        [error] = caught.value.errors
        assert (error.code, error.line) == ("not-calibrated", 11)

    def test_templates_alone_are_no_guard(self) -> None:
        """A folder of nothing but templates does not start."""
        with pytest.raises(SourceError, match="no policies to serve in policies/bias"):
            load_watchlist(Settings(policies="policies/bias"))


def test_list(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One line a policy, and the same as records."""
    assert run("policy", "list") == 0
    head, line = capsys.readouterr().out.splitlines()
    assert head.split() == ["id", "mode", "action", "severity", "owner", "review", "by", "feature",
                            "set"]  # fmt: skip
    assert line.split() == [
        "unsafe-code.shell-injection", "shadow", "flag", "high", "safety-code@example.com",
        "2999-02-01", "demo/unsafe-code",
    ]  # fmt: skip

    assert run("policy", "list", "--json") == 0
    [record] = json.loads(capsys.readouterr().out)
    assert record["path"] == "policies/p.yaml"
    assert record["calibrated"] is True

    for folder, problem in (
        ("gone", "there is no such folder"),
        ("feature_sets/demo/unsafe-code.yaml", "expected a folder, found a file"),
    ):
        capsys.readouterr()
        assert run("policy", "list", "--feature-sets", folder) == 2
        said = capsys.readouterr()
        assert said.out == ""
        assert f"{folder}: {problem}; give the folder of feature sets" in plain(said.err)

    assert run("test", "--feature-sets", "gone") == 2
    assert "gone: there is no such folder; give the folder" in plain(capsys.readouterr().err)

    (project / "policies" / "q.yaml").write_text("id: 12")
    assert run("policy", "list") == 2


def test_from_anywhere(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Inside the folder of a policy, and outside the project, its feature sets are found."""
    for here, policy in ((project / "policies", "p.yaml"), (project.parent, f"{project}/policies")):
        monkeypatch.chdir(here)
        assert run("check", policy) == 0, capsys.readouterr()
        assert run("policy", "list", policy) == 0
        assert run("check", policy, "--feature-sets", "feature_sets") == 2  # which is not here
    monkeypatch.chdir(project / "policies")
    assert run("policy", "new", "a.b", "--folder", ".", *ONE_FEATURE) == 0


ONE_FEATURE = ("--set", "demo/unsafe-code", "--feature", "shell_exec")
TWO_FEATURES = (*ONE_FEATURE, "--feature", "string_built")
APART = {
    "apart": ([0, 0, 0.9, 0, 0], [0, 0, 0, 0.9, 0]),
    "one": ([0, 0, 0.9, 0, 0], [0] * 5),
    "quiet": ([0] * 5, [0] * 5),
}
"""Texts in which both features show at different tokens, one alone, or none."""


@pytest.mark.parametrize("combine", [None, "token", "request", "any"])
def test_new(project: Path, capsys: pytest.CaptureFixture[str], combine: str | None) -> None:
    """What `new` writes passes `check` but for its marks, passes its tests, and is laid out."""
    features = ONE_FEATURE if combine is None else (*TWO_FEATURES, "--combine", combine)
    assert run("policy", "new", "a.b-c.d", *features) == 0
    files = sorted((project / "policies" / "a").rglob("*"))
    assert [f.name for f in files] == ["b-c", "d.test.yaml", "d.yaml"]
    first = files[2].read_text().splitlines()[0]
    assert first == "# yaml-language-server: $schema=../../saeguard.policy.v1.json"
    schema = files[2].parent / first.split("=")[1]
    assert schema.resolve() == (project / "policies" / "saeguard.policy.v1.json").resolve()
    capsys.readouterr()

    assert run("check", "--require-tests", str(files[2])) == 0
    out = capsys.readouterr().out
    assert out.endswith("1 policy read: 0 errors, 4 warnings\n")
    assert out.count("warning[to-do]: still to do: ") == 4
    assert run("test", str(files[2])) == 0
    cases = {None: 3, "any": 4}.get(combine, 6)
    assert capsys.readouterr().out.endswith(f"{cases} passed, 0 failed\n")
    assert run("policy", "fmt", "--check", str(project / "policies" / "a")) == 0


def test_new_asks_how_features_combine(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Several features mean three things; a corpus shows what each of them matches."""
    record(project / "r.safetensors", APART)

    assert run("policy", "new", "a.b", *TWO_FEATURES) == 2
    asked = capsys.readouterr().err
    assert "--combine: shell_exec and string_built can be combined in 3 ways" in asked
    assert "--combine token    all of them at one and the same token\n" in asked

    assert run("policy", "new", "a.b", *TWO_FEATURES, "--corpus", "r.safetensors") == 2
    asked = capsys.readouterr().err
    for way, matches in (("token", 0), ("request", 1), ("any", 2)):
        assert re.search(rf"--combine {way} .*\({matches} of 3 texts match\)", asked)

    corpus = ("--corpus", "r.safetensors", "--combine", "request")
    assert run("policy", "new", "a.b", *TWO_FEATURES, *corpus) == 0
    assert "It matches 1 of 3 texts in r.safetensors." in capsys.readouterr().out


def test_tests_of_new_tell_the_ways_apart(project: Path) -> None:
    """The tests written for one way to combine features fail for a policy of another way."""
    for way in ("token", "request", "any"):
        assert run("policy", "new", f"a.{way}", *TWO_FEATURES, "--combine", way) == 0
    places = [project / "policies" / "a" / way for way in ("token", "request", "any")]
    policies = [place.with_suffix(".yaml").read_text().split("detect:")[1] for place in places]
    for place in places:
        path = place.with_suffix(".yaml")
        head, own = path.read_text().split("detect:")
        for other in policies:
            path.write_text(f"{head}detect:{other}")
            assert run("test", str(path)) == (0 if other == own else 1), (place.name, other)
        path.write_text(f"{head}detect:{own}")


def test_check_with_a_corpus(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A policy that matches no text of a corpus is a warning that tells what to change."""
    record(project / "r.safetensors", APART)
    policy = project / "policies" / "p.yaml"
    policy.write_text(PLAIN)

    assert run("check", "--corpus", "r.safetensors") == 0
    out = capsys.readouterr().out
    assert (
        "p.yaml:19:12: warning[never-matched]: r.safetensors: matches none of 3 texts "
        "(shell holds in 2, untrusted holds in 1)"
    ) in out
    assert "in apart it comes nearest at token 2: shell is 0.9, above 0.6: holds; " in out
    assert "untrusted is 0, not above 0.4: does not hold" in out
    assert "in 1 of them every selection holds, but not at one token: write `over: max of" in out

    over = ", over: max of the request}"
    policy.write_text(PLAIN.replace("0.6}", f"0.6{over}").replace("0.4}", f"0.4{over}"))
    assert run("check", "--corpus", "r.safetensors", "--strict") == 0


def test_new_is_not_for_enforcing(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With its marks, a policy cannot be enforced."""
    assert run("policy", "new", "a.b", *ONE_FEATURE) == 0
    path = project / "policies" / "a" / "b.yaml"
    path.write_text(path.read_text().replace("mode: shadow ", "mode: enforce "))

    assert run("check", str(path)) == 1
    assert "error[to-do]" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["A b", "--set", "demo/unsafe-code"], "'A b' is not a policy id"),
        (["a.b", "--set", "demo/unsafe-cod"], 'did you mean "demo/unsafe-code"?'),
        (["a.b", "--set", "demo/unsafe-code", "--feature", "shell"], "there are: shell_exec"),
        (["p", *ONE_FEATURE], "policies/p.yaml: exists already"),
        (
            ["a.b", "--set", "demo/unsafe-code"],
            "--feature: expected a feature to watch, found none",
        ),
    ],
)
def test_new_refuses(
    project: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    """Nothing is written where the command is wrong or a file is there."""
    assert run("policy", "new", *arguments) == 2
    assert says in capsys.readouterr().err
    assert (project / "policies" / "p.yaml").read_text() == BOTH
    assert [p.name for p in (project / "policies").iterdir()] == ["p.yaml"]


@pytest.mark.parametrize("which", ["z.yaml", "z.test.yaml", "saeguard.policy.v1.json"])
def test_new_leaves_nothing_half_done(
    project: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    which: str,
) -> None:
    """Whichever of its files cannot be written, neither files nor folders are left behind."""
    link = os.link

    def full(source: Path, path: Path) -> None:
        if Path(path).name == which:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        link(source, path)

    monkeypatch.setattr(os, "link", full)
    before = sorted(project.rglob("*"))

    assert run("policy", "new", "x.y.z", *ONE_FEATURE) == 3
    assert capsys.readouterr().err.endswith(f"{which}: No space left on device\n")
    assert sorted(project.rglob("*")) == before


def test_fmt(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`fmt` lays files out, `--check` only says so, and broken files are told."""
    path = project / "policies" / "p.yaml"
    path.write_text("\n\n" + BOTH)

    assert run("policy", "fmt", "--check") == 1
    assert "would change policies/p.yaml" in capsys.readouterr().out
    assert path.read_text() == "\n\n" + BOTH
    assert run("policy", "fmt") == 0
    assert path.read_text() == BOTH
    assert run("policy", "fmt", "--check") == 0

    (project / "policies" / "q.yaml").write_text("id: [")
    capsys.readouterr()
    assert run("policy", "fmt") == 2
    assert "q.yaml:1:" in capsys.readouterr().err
