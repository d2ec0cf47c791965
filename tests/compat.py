"""Install every supported vLLM, run what shows whether the guard fits it, write the table.

`python3 -m tests.compat [VERSION ...] [--only CHECK]`, or `make compat`, needs Python and make.
Each version gets an environment below `.compat/`, which later runs use again. What was not asked
for stays in the table as it is.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

from saeguard.vllm.doctor import SUPPORTED

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / ".compat"
TABLE = ROOT / "docs" / "compatibility.md"

CHECKS: Mapping[str, tuple[str, ...]] = {
    "contract": ("tests/engine/test_contract.py",),
    "V1 parity": ("tests/engine/test_parity.py", "-k", "llama or gpt2"),
    "V2 parity": ("tests/engine/test_parity.py", "-k", "v2"),
    "clamps": ("tests/engine/test_clamp.py",),
    "drafts": ("tests/engine/test_drafts.py",),
    "storm": ("tests/engine/test_storm.py", "-k", "v1 or aborted"),
    "server": ("tests/server/test_server.py",),
}
"""Column of the table: arguments of pytest."""
RUN, PASS, FAIL = "run", "pass", "**fail**"

HEAD = """\
# Compatibility

One code base on several versions of vLLM. There are two kinds of evidence: tests that ran, and
source text that was read.

## Versions run

CPU builds. `make compat` installs each into an environment of its own, runs the tests below there,
and writes this table.

- *contract*: every internal in [`CONTRACT.md`](../saeguard/vllm/CONTRACT.md) is there.
- *V1 parity*, *V2 parity*: activations and verdicts are those of Transformers and SAELens, on Model
  Runner V1 (Llama and GPT-2, compiled) and V2 (Llama, in Triton's interpreter).
- *clamps*: clamped texts are those of Transformers under a hook, on both runners.
- *drafts*: rejected n-gram drafts never count.
- *storm*: hundreds of requests in random mixes, each verdict and count the reference's (V1).
- *server*: a real server behind the OpenAI client, and one whose self-test fails and that ends.

"""

SOURCE = "\n## Versions checked from source\n"
"""What follows this heading is written by hand, from what `saeguard doctor --vllm-source` finds."""


def machine() -> str:
    """Return what the tests ran on, as far as it is worth telling."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.machine()
    return f"{name}, {os.cpu_count()} cores, Python {platform.python_version()}"


def run(title: str, log: Path, command: list[str]) -> bool:
    """Run a command, tell how long it took, and show the end of its log if it fails."""
    print(f"  {title:12}", end="", flush=True)
    started = time.monotonic()
    with log.open("wb") as out:
        done = subprocess.run(command, cwd=ROOT, stdout=out, stderr=out, check=False)
    passed = done.returncode == 0
    print(f"{'pass' if passed else 'FAIL'} {time.monotonic() - started:6.0f} s", flush=True)
    if not passed:
        print(f"{log.read_text(errors='replace')[-2000:]}\n  all of it: {log}", flush=True)
    return passed


def check(version: str, only: Sequence[str]) -> dict[str, str]:
    """Install one version and run its checks; return its cells of the table."""
    print(f"vLLM {version}", flush=True)
    venv = FOLDER / version
    logs = FOLDER / f"{version}.logs"
    logs.mkdir(parents=True, exist_ok=True)
    setup = ["make", "setup", f"VENV={venv.relative_to(ROOT)}", f"VLLM={version}"]
    if not run("install", logs / "install.log", [*setup, f"PYTHON={sys.executable}"]):
        return dict.fromkeys(CHECKS, FAIL)
    pytest = [str(venv / "bin" / "python"), "-m", "pytest", "-p", "no:cacheprovider"]
    cells = {}
    for title in only:
        log = logs / f"{title.replace(' ', '-')}.log"
        cells[title] = PASS if run(title, log, [*pytest, *CHECKS[title]]) else FAIL
    return {**cells, RUN: f"{datetime.now(UTC):%Y-%m-%d}, {machine()}"}


def read() -> dict[str, dict[str, str]]:
    """Return the cells of the table as it is, by version."""
    lines = TABLE.read_text().split(SOURCE)[0].splitlines() if TABLE.exists() else []
    written = (line.strip("|") for line in lines if line[2:3].isdigit() and line.startswith("|"))
    rows = [[cell.strip() for cell in line.split("|")] for line in written]
    return {version: dict(zip((*CHECKS, RUN), cells, strict=True)) for version, *cells in rows}


def write(table: Mapping[str, Mapping[str, str]]) -> None:
    """Write the table, oldest version first."""
    columns = (*CHECKS, RUN)
    rows = [
        [version, *(table[version].get(column, "not run") for column in columns)]
        for version in sorted(table, key=lambda v: tuple(map(int, v.split("."))))
    ]
    lines = [["vLLM", *columns], ["---"] * (1 + len(columns)), *rows]
    page = TABLE.read_text() if TABLE.exists() else ""
    by_hand = "".join(page.partition(SOURCE)[1:])
    TABLE.write_text(HEAD + "".join(f"| {' | '.join(line)} |\n" for line in lines) + by_hand)


def main(arguments: Sequence[str] | None = None) -> int:
    """Check versions one after the other; return 1 if anything failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("versions", nargs="*", default=[f"{minor}.0" for minor in SUPPORTED])
    parser.add_argument("--only", action="append", choices=CHECKS)
    asked = parser.parse_args(arguments)
    failed = False
    for version in asked.versions:
        cells = check(version, asked.only or list(CHECKS))
        table = read()
        write({**table, version: {**table.get(version, {}), **cells}})
        failed |= FAIL in cells.values()
    print(f"written to {TABLE.relative_to(ROOT)}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
