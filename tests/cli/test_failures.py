"""Every verb ends the same mistake with the same exit code and a message, never a traceback."""

from __future__ import annotations

import importlib
import inspect
import os
import pkgutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import saeguard
from saeguard.cli.failures import reported
from saeguard.errors import CannotRunError, InputError, SaeguardError
from saeguard.hf.model_folder import REMEDY
from tests.cli import project
from tests.cli.project import plain, run

FEATURES = "features search --behaviour b --out o.json --sae sae --data t.jsonl --holdout t.jsonl"
CALIBRATE = f"features calibrate --set {project.SET} --benign t.jsonl"
FIRED = f"features fired --set {project.SET} --completion hi"
WITH_MODEL = (
    "check policies",
    "test policies",
    "policy diff policies policies",
    "policy explain policies",
    "policy record t.jsonl --out r.safetensors",
    "scan t.jsonl --policies policies --out o.jsonl",
    FEATURES,
    CALIBRATE,
    FIRED,
    "sae inspect sae --text t.jsonl",
)
"""Commands that lack nothing but --model."""
WITH_FILE = (
    "policy replay FILE --policies policies",
    "policy explain policies FILE",
    "policy record FILE --model model --out r.safetensors",
    "policy diff policies policies --corpus FILE",
    "policy sign --key FILE",
    "policy verify --key FILE",
    "test policies --benign FILE",
    "scan FILE --model model --policies policies --out o.jsonl",
    f"{FEATURES} --model model --benign FILE",
    "features calibrate --set FILE --benign t.jsonl --model model",
    f"{CALIBRATE} --model model --check FILE",
    "features fired --set FILE --completion hi --model model",
    "sae inspect sae --model model --text FILE",
    "serve model --policies policies --feature-sets feature_sets --access FILE",
    "serve model --policies policies --feature-sets feature_sets --state s --verify FILE",
)
"""Commands that lack nothing but a file in place of FILE."""
WITH_SETS = (
    "check policies",
    "test policies",
    "policy list policies",
    "policy new a.b --set x",
    "policy explain policies t.safetensors",
    "policy replay t.safetensors --policies policies",
    "policy record t.jsonl --model model --out r.safetensors",
    "policy diff policies policies --corpus t.safetensors",
    "policy sign policies --key t.jsonl",
    "scan t.jsonl --model model --policies policies --out o.jsonl",
    "serve model --policies policies",
)
"""Commands that lack nothing but --feature-sets."""
WITH_POLICIES = (
    "check PATH",
    "test PATH",
    "policy list PATH",
    "policy fmt PATH",
    "policy diff PATH policies",
    "policy explain PATH t.safetensors",
    "policy replay t.safetensors --policies PATH",
    "policy sign PATH --key t.jsonl",
    "scan t.jsonl --model model --policies PATH --out o.jsonl",
    "serve model --feature-sets feature_sets --policies PATH",
)
"""Commands that lack nothing but policies in place of PATH."""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a project's folder, which is the working folder."""
    monkeypatch.chdir(tmp_path)
    project.lay_out(tmp_path, project.ONE)
    for folder in ("folder", "sae", "model"):
        (tmp_path / folder).mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    for name in ("t.jsonl", "t.safetensors", "file"):
        (tmp_path / name).write_text("")
    return tmp_path


def refused(command: str, capsys: pytest.CaptureFixture[str]) -> str:
    """Return what a refused command prints, and check its exit code."""
    assert run(*command.split()) == 2, command
    printed = capsys.readouterr()
    assert "Traceback" not in printed.err
    return printed.err + printed.out


@pytest.mark.parametrize("command", WITH_MODEL)
@pytest.mark.parametrize(
    ("model", "problem"),
    [
        ("gone", "there is no such folder"),
        ("file", "expected a folder, found a file"),
        ("folder", "the folder holds no config.json"),
    ],
)
def test_wrong_model(
    capsys: pytest.CaptureFixture[str], command: str, model: str, problem: str
) -> None:
    """A --model that is not a model's folder."""
    expected = f"--model: {model}: {problem}; {REMEDY}\n"
    assert refused(f"{command} --model {model}", capsys) == expected


@pytest.mark.parametrize("command", WITH_FILE)
@pytest.mark.parametrize(
    ("file", "problem"),
    [("gone", "there is no such file"), ("folder", "expected a file, found a folder")],
)
def test_wrong_file(
    capsys: pytest.CaptureFixture[str], command: str, file: str, problem: str
) -> None:
    """A file that is missing, and a folder in place of a file."""
    assert f"{file}: {problem}; " in refused(command.replace("FILE", file), capsys)


@pytest.mark.parametrize("command", WITH_FILE)
def test_unreadable_file(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    """A file that this user may not read; the tests may run as root, who may read all."""
    access = os.access
    monkeypatch.setattr(
        os, "access", lambda path, mode: Path(path).name != "file" and access(path, mode)
    )
    printed = plain(refused(command.replace("FILE", "file"), capsys))
    assert "file" in printed
    assert "is not readable" in printed


@pytest.mark.parametrize("command", WITH_SETS)
@pytest.mark.parametrize(
    ("sets", "problem"),
    [("gone", "there is no such folder"), ("file", "expected a folder, found a file")],
)
def test_wrong_feature_sets(
    capsys: pytest.CaptureFixture[str], command: str, sets: str, problem: str
) -> None:
    """A --feature-sets that is not a folder."""
    printed = refused(f"{command} --feature-sets {sets}", capsys)
    assert f"--feature-sets: {sets}: {problem}; give the folder of feature sets" in printed


@pytest.mark.parametrize("command", WITH_POLICIES)
def test_no_policies(capsys: pytest.CaptureFixture[str], command: str) -> None:
    """A path of policies that does not exist."""
    printed = refused(command.replace("PATH", "gone"), capsys)
    assert "gone: " in printed
    assert "there is no such file or folder" in printed


@pytest.mark.parametrize("command", [CALIBRATE, FIRED])
def test_not_a_feature_set(here: Path, capsys: pytest.CaptureFixture[str], command: str) -> None:
    """A file that is something else than a feature set."""
    (here / project.SET).write_text("schema: saeguard.policy/v1\nid: a\n")
    assert str(project.SET) in refused(f"{command} --model model", capsys)


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (InputError("x.yaml: wrong"), 2, "x.yaml: wrong"),
        (CannotRunError("nothing answers"), 3, "nothing answers"),
        (OSError(28, "No space left on device", "out.json"), 3, "out.json: No space left on dev"),
        (ModuleNotFoundError("", name="sklearn.svm"), 3, "pip install 'saeguard[features]'"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_each_kind(
    capsys: pytest.CaptureFixture[str], error: BaseException, code: int, message: str
) -> None:
    """Each kind of error has one exit code, in whichever verb."""
    import typer

    with pytest.raises(typer.Exit) as ended, reported():
        raise error
    assert ended.value.exit_code == code
    assert message in capsys.readouterr().err


def test_every_error_is_ours() -> None:
    """Every exception class of the package has the base that `reported` knows."""
    strangers = []
    for module in pkgutil.walk_packages(saeguard.__path__, "saeguard."):
        if module.name.startswith("saeguard.__main__"):
            continue
        names = vars(importlib.import_module(module.name)).values()
        strangers += [
            f"{module.name}.{cls.__name__}"
            for cls in names
            if inspect.isclass(cls)
            and issubclass(cls, BaseException)
            and cls.__module__ == module.name
            and not issubclass(cls, SaeguardError)
        ]
    assert strangers == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_nothing_half_written(here: Path, number: signal.Signals) -> None:
    """A command that is ended while it writes leaves the old file, and nothing beside it."""
    policy = here / "policies" / "p.yaml"
    policy.write_text(policy.read_text() + "\n\n\n")
    before = {path: path.read_bytes() for path in policy.parent.iterdir()}
    code = (
        "import os, time\n"
        "from saeguard.cli import main\n"
        f"os.fsync = lambda _: (os.kill(os.getpid(), {int(number)}), time.sleep(9))\n"
        "main(['policy', 'fmt', 'policies'])"
    )

    done = subprocess.run(
        [sys.executable, "-c", code], cwd=here, capture_output=True, text=True, check=False
    )

    assert done.returncode == 128 + number, done.stderr
    assert "Traceback" not in done.stderr
    assert {path: path.read_bytes() for path in policy.parent.iterdir()} == before
