"""What a user gets who names the wrong file: a line that says so, never a traceback."""

from __future__ import annotations

from pathlib import Path

import pytest

from saeguard.features.files import FeatureSetError, read_feature_file
from tests.cli import project
from tests.cli.project import run


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a project's folder, which is the working folder."""
    monkeypatch.chdir(tmp_path)
    project.lay_out(tmp_path, project.ONE)
    (tmp_path / "empty").mkdir()
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "spelt.safetensors").write_bytes(b"\x00\xff no recording")
    return tmp_path


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("policy replay gone.jsonl --policies policies", "gone.jsonl: there is no such file"),
        ("policy replay empty --policies policies", "empty: expected a file, found a folder"),
        ("policy explain policies gone.jsonl", "gone.jsonl: there is no such file"),
        ("policy explain policies gone.safetensors", "gone.safetensors: there is no such file"),
        ("policy explain policies spelt.safetensors", "spelt.safetensors: this is no recording"),
        (f"policy explain policies {'x' * 300}", "xxx: there is no such file"),
        ("policy explain policies x.yaml --prompt a", "x.yaml: there is no such file"),
        ("policy explain policies spelt.safetensors --prompt a", "not both"),
        ("policy explain policies --id x", "no policy with the id x; there are: "),
        ("policy diff policies policies --corpus gone", "gone: there is no such file"),
        ("test policies --benign gone", "gone: there is no such file"),
        ("policy record gone --model model --out a.safetensors", "gone: there is no such file"),
        ("policy record spelt.safetensors --model model --out a.jsonl", "ends in .safetensors"),
        ("check policies --model gone", "--model: gone: there is no such folder; give"),
    ],
)
def test_wrong_file(
    here: Path, capsys: pytest.CaptureFixture[str], command: str, said: str
) -> None:
    """It is named, with what is wrong with it, and nothing is written."""
    before = sorted(here.rglob("*"))

    assert run(*command.split()) == 2

    assert said in capsys.readouterr().err
    assert sorted(here.rglob("*")) == before


def test_a_place_that_cannot_be_written(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The place is named, without the system's number for what is wrong."""
    assert run("test", "policies", "--junit", str(here / "empty")) == 3

    assert capsys.readouterr().err == f"{here / 'empty'}: Is a directory\n"


@pytest.mark.usefixtures("here")
def test_a_model_that_no_case_needs(capsys: pytest.CaptureFixture[str]) -> None:
    """A misspelt --model is reported, although traces need none."""
    assert run("test", "policies", "--model", "gone") == 2

    assert capsys.readouterr().err.startswith("--model: gone: there is no such folder")


def test_a_log_of_something_else(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """JSON lines that are not events are told from a log without verdicts."""
    (here / "texts.jsonl").write_text('{"id": "a", "text": "b"}\n')

    assert (
        run("policy", "replay", "texts.jsonl", "--policies", "policies", "--was", "policies") == 2
    )

    assert 'texts.jsonl:1: line: the key "event" is missing' in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "error[empty-file]: the file is empty; write a feature set"),
        (b"- 1\n", "error[wrong-type]: found a list, expected a mapping"),
        (b"id: \xff\n", "not UTF-8; save the file as UTF-8"),
        (b"made: 2027-99-99\n", "error[ambiguous-value]: found 2027-99-99"),
        (b"schema: saeguard.policy/v1\nid: a\n", 'found "saeguard.policy/v1", expected saeg'),
        (b"id: \x00\n", "error[control-character]: the invisible character U+0000"),
    ],
)
def test_no_feature_set(tmp_path: Path, content: bytes, said: str) -> None:
    """Whatever a file holds, the error names it and says what was found."""
    path = tmp_path / "set.yaml"
    path.write_bytes(content)

    with pytest.raises(FeatureSetError) as error:
        read_feature_file(path)

    assert str(error.value).startswith(f"{path}:1:")
    assert said in str(error.value)
