"""docs/policy-tools.md shows what the tools print: its commands are run, one after the other."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from saeguard.cli.demo_model import DEFAULT
from saeguard.cli.policy import verb
from saeguard.hf.demo_model import make

ROOT = Path.cwd()
DOCS = Path("docs/policy-tools.md")
BLOCK = re.compile(r"^```console\n(.*?)^```$", re.DOTALL | re.MULTILINE)
MODEL = re.compile(r"^\$ .*--model (\S+)", re.MULTILINE)


def lay_out(folder: Path) -> None:
    """Copy what the commands use into `folder`, with a `saeguard` of this Python."""
    for name in ("policies", "feature_sets"):
        shutil.copytree(name, folder / name)
    for path in ROOT.iterdir():  # what feature sets and commands name: SAEs, models, texts
        if path.is_dir() and not path.name.startswith(".") and not (folder / path.name).exists():
            (folder / path.name).symlink_to(path)
    (folder / "bin").mkdir()
    command = folder / "bin" / "saeguard"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m saeguard "$@"\n')
    command.chmod(0o755)


def shown(folder: Path, block: str) -> str:
    """Return a block with what its commands print today."""
    path = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "COLUMNS": "100", "PYTHONPATH": str(ROOT)}
    out = []
    for line in block.splitlines():
        if line.startswith("$ "):
            done = subprocess.run(  # noqa: S602 - the page is ours
                line[2:], shell=True, cwd=folder, env=environment, text=True, check=False,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )  # fmt: skip
            printed = "".join(f"{text.rstrip()}\n" for text in done.stdout.splitlines())
            out.append(f"{line}\n{printed}")
    return "".join(out)


@pytest.mark.skipif(shutil.which("sh") is None, reason="needs a shell")
def test_outputs_are_todays(tmp_path: Path) -> None:
    """The page shows what the tools say; `python -m tests.cli.test_tools_page` renews it."""
    lay_out(tmp_path)

    for block in BLOCK.findall(DOCS.read_text()):
        if not MODEL.search(block):
            assert _dateless(shown(tmp_path, block)) == _dateless(block)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("sh") is None, reason="needs a shell")
def test_outputs_of_a_model_are_todays(tmp_path: Path) -> None:
    """So does what needs the model of the shipped feature set, which is made first if need be."""
    blocks = [block for block in BLOCK.findall(DOCS.read_text()) if MODEL.search(block)]
    assert blocks
    for model in {name for block in blocks for name in MODEL.findall(block)}:
        if Path(model) == DEFAULT:
            make(ROOT / DEFAULT)
    lay_out(tmp_path)

    for block in blocks:
        assert shown(tmp_path, block) == block


def test_every_tool_is_there() -> None:
    """Each verb of `saeguard policy` has a row."""
    names = [command.name for command in verb.registered_commands if command.name]

    text = DOCS.read_text()
    assert [
        name for name in names if not re.search(rf"[|,] `saeguard (policy )?{name}`", text)
    ] == []


def _dateless(text: str) -> str:
    return re.sub(r"20\d\d-\d\d-\d\d", "DATE", text)


if __name__ == "__main__":
    with TemporaryDirectory() as name:
        lay_out(Path(name))
        DOCS.write_text(
            BLOCK.sub(lambda m: f"```console\n{shown(Path(name), m[1])}```", DOCS.read_text())
        )
