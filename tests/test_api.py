"""`import saeguard`: ten names, imported when used; docs/embedding.md runs as it is written."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import saeguard
from tests.cli.project import run
from tests.fixture.project import save_project, save_texts

PAGE = Path("docs/embedding.md")
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def test_the_import_is_light() -> None:
    """Neither torch nor Transformers nor vLLM nor numpy comes with it."""
    code = (
        "import sys, saeguard\n"
        "heavy = {'torch', 'transformers', 'vllm', 'numpy', 'pydantic'}\n"
        "print(sorted(heavy & set(sys.modules)), len(dir(saeguard)) > 9)"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout == "[] True\n"


@pytest.mark.parametrize("name", saeguard.__all__)
def test_every_name_is_there(name: str) -> None:
    """Each can be imported, says what it does, and stands on the page."""
    assert getattr(saeguard, name).__doc__
    assert f"| `{name}" in PAGE.read_text()
    assert name in dir(saeguard)


def test_other_names_are_not() -> None:
    """A misspelt name is an AttributeError, as of any module."""
    with pytest.raises(AttributeError, match="has no attribute 'load_polices'"):
        _ = saeguard.load_polices


def test_the_page_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its blocks run one after the other, on a tiny model and policy at the paths they name."""
    pytest.importorskip("transformers")
    blocks = BLOCK.findall(PAGE.read_text())
    (named,) = set(re.findall(r'load_model\("(.+?)"\)', "\n".join(blocks)))
    (shipped,) = set(re.findall(r'"(policies/.+?\.yaml)"', "\n".join(blocks)))
    assert Path(shipped).exists()
    guarded = save_project(tmp_path)
    ours = guarded.policies / "unsafe-code" / "shell-command.yaml"
    (tmp_path / shipped).parent.mkdir(parents=True, exist_ok=True)
    ours.rename(tmp_path / shipped)
    monkeypatch.chdir(tmp_path)
    Path(named).parent.mkdir(parents=True, exist_ok=True)
    Path(named).symlink_to(guarded.model)
    save_texts(Path("texts.jsonl"))
    recorded = ("policy", "record", "texts.jsonl", "--model", named)
    assert run(*recorded, "--out", "texts.safetensors") == 0
    capsys.readouterr()

    exec(compile("\n".join(blocks), str(PAGE), "exec"), {})  # noqa: S102 - the page is ours

    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("unsafe-code.shell-command match ")
    scanned = {line for line in printed if line.endswith("]")}
    assert len(scanned) == 2
    for line in scanned:
        name, outcome = line.split(" ['")
        assert f"{name} {outcome.removesuffix(chr(39) + ']')}" in printed, "as recorded"
    assert any(
        "polices: error[not-found]: there is no such file or folder" in line for line in printed
    )
