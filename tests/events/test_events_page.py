"""docs/events.md: its commands are run on a sample log, the names in its PromQL exist."""

from __future__ import annotations

import re
import shlex
from contextlib import chdir, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from saeguard.cli import main
from saeguard.events.metrics import GAUGES, METRICS
from saeguard.events.questions import QUESTIONS
from tests.events.sample_log import write_sample

PAGE = Path("docs/events.md").resolve()
BLOCK = re.compile(r"^```console\n(.*?)^```$", re.DOTALL | re.MULTILINE)
METRIC = re.compile(r"saeguard_(\w+?)(_total)?(?:\{(.*?)\})?(?=[\[\s)`])")

pytest.importorskip("duckdb")


def shown(folder: Path, block: str) -> str:
    """Return a block with what its command prints today."""
    line = block.splitlines()[0]
    _, *arguments = shlex.split(line.removeprefix("$ "))
    out = StringIO()
    with chdir(folder), redirect_stdout(out), redirect_stderr(StringIO()):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 0, line
    return f"{line}\n{out.getvalue()}"


@pytest.mark.parametrize("block", BLOCK.findall(PAGE.read_text()), ids=lambda b: b.split("\n")[0])
def test_answers_are_todays(tmp_path: Path, block: str) -> None:
    """The page shows what the command says; `python -m tests.events.test_events_page` renews it."""
    write_sample(tmp_path)

    assert shown(tmp_path, block) == block


def test_every_question_is_on_the_page() -> None:
    """Ten headings, and every question of the command."""
    text = PAGE.read_text()
    assert len(re.findall(r"^## \d+\. ", text, re.MULTILINE)) == 10
    assert [name for name in QUESTIONS if f"$ saeguard events {name} " not in text] == []
    headings = re.findall(r"^## (\d+\. .*)", text, re.MULTILINE)
    assert [h for h in headings if f"| {h} |" not in text] == []


def test_metrics_exist() -> None:
    """PromQL names metrics and labels that the server has."""
    found = METRIC.findall(PAGE.read_text())
    assert len(found) > 10
    for name, total, labels in found:
        assert name in (METRICS if total else GAUGES), name
        for label in re.findall(r"(\w+)[!=]", labels):
            assert label in METRICS[name][1], (name, label)
    for groups, name in re.findall(
        r"by \((.*?)\) \(increase\(saeguard_(\w+?)_total", PAGE.read_text()
    ):
        assert set(groups.split(", ")) <= set(METRICS[name][1]), (name, groups)


if __name__ == "__main__":
    with TemporaryDirectory() as temporary:
        write_sample(Path(temporary))
        PAGE.write_text(
            BLOCK.sub(lambda m: f"```console\n{shown(Path(temporary), m[1])}```", PAGE.read_text())
        )
