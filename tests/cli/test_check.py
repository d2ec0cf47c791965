"""`saeguard check` from the outside: output, formats, exit codes, what it imports."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from saeguard.cli import VERBS
from saeguard.policy.schema import json_schema
from saeguard.policy_tools import test_case_schema
from saeguard.urls import DOCS
from tests.cli.project import lay_out, run
from tests.policy.example import GOOD, changed


@pytest.fixture(autouse=True)
def _project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Start in a folder with one good policy and its feature set."""
    lay_out(tmp_path)
    monkeypatch.chdir(tmp_path)


def spoil(*changes: tuple[str, str]) -> None:
    """Write the policy anew, with changes."""
    Path("policies/p.yaml").write_text(changed(*changes).replace("2027", "2999"))


def test_good(capsys: pytest.CaptureFixture[str]) -> None:
    """All well: one line and exit code 0."""
    assert run("check") == 0
    assert capsys.readouterr() == ("1 policy read: 0 errors, 0 warnings\n", "")


def test_syntax_and_reference_errors_together(capsys: pytest.CaptureFixture[str]) -> None:
    """A broken file does not keep the others from being checked against the feature sets."""
    spoil(("feature: shell_exec", "feature: shel_exec"))
    Path("policies/q.yaml").write_text(changed(("severity: high", "severity: hihg")))

    assert run("check") == 1
    out, err = capsys.readouterr()
    assert err == "1 policy read: 2 errors, 0 warnings\n"
    assert [line.split(" ")[1] for line in out.splitlines() if line.startswith("policies/")] == [
        "error[unknown-feature]:",
        "error[not-allowed]:",
    ]


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    """`--format json` prints records, an empty list where all is well."""
    assert run("check", "--format", "json") == 0
    assert json.loads(capsys.readouterr().out) == []

    spoil(("severity: high", "severity: hihg"))
    assert run("check", "--format", "json") == 1
    assert json.loads(capsys.readouterr().out) == [
        {
            "path": "policies/p.yaml",
            "line": 5,
            "column": 11,
            "code": "not-allowed",
            "message": 'found "hihg"; did you mean "high"? allowed: low, medium, high, critical',
            "source": "severity: hihg",
            "level": "error",
            "help": f"{DOCS}/errors/not-allowed/",
        }
    ]


def test_github(capsys: pytest.CaptureFixture[str]) -> None:
    """`--format github` prints annotations, with what GitHub would misread escaped."""
    spoil(("severity: high", 'severity: "50%: a, b"'))

    assert run("check", "--format", "github") == 1
    assert capsys.readouterr().out == (
        "::error file=policies/p.yaml,line=5,col=11,title=not-allowed::"
        'found "50%25: a, b"; allowed: low, medium, high, critical\n'
    )


def test_warnings(capsys: pytest.CaptureFixture[str]) -> None:
    """Warnings are told, and fail only where that is asked for."""
    Path("policies/p.yaml").write_text(changed(("review_by: 2027", "review_by: 2001")))

    assert run("check") == 0
    assert "p.yaml:15:12: warning[review-due]" in capsys.readouterr().out
    assert run("check", "--strict") == 1


def test_a_note_fails_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    """A policy that acts on the user's messages alone gets a note, and passes `--strict`.

    So does one whose features were never measured on labelled texts.
    """
    spoil(("mode: shadow", "mode: enforce"), ("scope: output", "scope: user"))

    assert run("check", "--strict") == 0
    assert capsys.readouterr().out == (
        "1 policy read: 0 errors, 0 warnings, 2 notes (--notes shows them)\n"
    )
    assert run("check", "--strict", "--notes") == 0
    assert "policies/p.yaml:9:8: note[forgeable-turn]: the caller of" in (
        out := capsys.readouterr().out
    )
    assert "note[weak-feature]: not measured on labelled texts" in out


def test_broken_feature_set(capsys: pytest.CaptureFixture[str]) -> None:
    """A broken feature set is told once, and not again for each policy that needs it."""
    Path("feature_sets/demo/unsafe-code.yaml").write_text("schema: nonsense")

    assert run("check") == 1
    out = capsys.readouterr().out
    assert 'feature_sets/demo/unsafe-code.yaml:1:9: error[not-allowed]: found "nonsense"' in out
    assert "unknown-feature-set" not in out


def test_misnamed_feature_set(capsys: pytest.CaptureFixture[str]) -> None:
    """The id of a feature set is its path, since policies find it by that."""
    Path("feature_sets/demo/unsafe-code.yaml").rename("feature_sets/other.yaml")

    assert run("check") == 1
    assert 'found "demo/unsafe-code", expected the name of its file' in capsys.readouterr().out


def test_paths(capsys: pytest.CaptureFixture[str]) -> None:
    """Files and folders may be mixed, and one file given twice counts once."""
    Path("more.yaml").write_text(GOOD.replace("2027", "2999").replace("id: unsafe", "id: other"))

    assert run("policy", "check", "policies", "more.yaml", "policies/p.yaml") == 0
    assert capsys.readouterr().out == "2 policies read: 0 errors, 0 warnings\n"


@pytest.mark.parametrize(
    "arguments",
    [["check", "--feature-sets", "nowhere"], ["check", "--format", "xml"], ["chek"]],
)
def test_usage(arguments: list[str]) -> None:
    """A wrong command has an exit code of its own."""
    assert run(*arguments) == 2


def test_missing_policies(capsys: pytest.CaptureFixture[str]) -> None:
    """A path that is not there fails the check."""
    assert run("check", "polices") == 2
    assert "polices: error[not-found]" in capsys.readouterr().out


def test_schema(capsys: pytest.CaptureFixture[str]) -> None:
    """`policy schema` prints the schema."""
    assert run("policy", "schema") == 0
    assert json.loads(capsys.readouterr().out) == json_schema()
    assert run("policy", "schema", "test") == 0
    assert json.loads(capsys.readouterr().out) == test_case_schema.json_schema()


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    """`--help` lists every verb without loading any."""
    assert run("--help") == 0
    out = capsys.readouterr().out
    assert [verb for verb in VERBS if verb not in out] == []


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["check"], ["policy", "schema"], ["policy", "list"], ["policy", "fmt"]],
)
def test_light(arguments: list[str]) -> None:
    """Checking policies needs neither torch nor vLLM, so that it is quick anywhere."""
    code = (
        "import sys, saeguard.cli\n"
        f"try: saeguard.cli.main({arguments})\n"
        "finally: print(sorted({'torch', 'vllm', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


def test_other_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A feature set of another model is refused, with both shapes, from config.json alone."""
    model = tmp_path / "llama"
    model.mkdir()
    (model / "config.json").write_text('{"hidden_size": 8, "num_hidden_layers": 2}')
    assert run("check", "--model", str(model)) == 0

    (model / "config.json").write_text('{"text_config": {"n_embd": 8, "n_layer": 4}}')
    assert run("check", "--model", str(model)) == 1
    assert (
        "policies/p.yaml:10:14: error[other-model]: the feature set is made for tiny, width 8 and "
        "2 layers, but llama has width 8 and 4 layers; name one that is made for this model"
    ) in capsys.readouterr().out


@pytest.mark.parametrize("config", ["", "[]", '{"hidden_size": "8"}'])
def test_model_that_is_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], config: str
) -> None:
    """A model folder that tells nothing is bad input, not a finding."""
    (tmp_path / "config.json").write_text(config)

    assert run("check", "--model", str(tmp_path)) == 2
    assert f"--model: {tmp_path}/config.json: " in capsys.readouterr().err


def test_require_tests(capsys: pytest.CaptureFixture[str]) -> None:
    """A missing test file is a finding where tests are asked for."""
    assert run("check", "--require-tests") == 1
    assert "policies/p.yaml: error[test-missing]: the policy has no tests; write " in (
        capsys.readouterr().out
    )
