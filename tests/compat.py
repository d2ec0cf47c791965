"""Install every supported vLLM, run what shows whether the guard fits it, write the table.

`python3 -m tests.compat [VERSION ...]`, or `make compat`, needs Python and make. Each version gets
an environment below `.compat/`, which later runs use again. Rows of versions that were not asked
for stay as they are.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

from saeguard.vllm.environment import SUPPORTED

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / ".compat"
TABLE = ROOT / "docs" / "compatibility.md"

CHECKS: Mapping[str, tuple[str, ...]] = {
    "contract": ("tests/engine/test_contract.py",),
    "V1 parity": ("tests/engine/test_parity.py", "-k", "llama or gpt2"),
    "V2 parity": ("tests/engine/test_parity.py", "-k", "v2"),
    "clamps": ("tests/engine/test_clamp.py",),
    "drafts": ("tests/engine/test_drafts.py",),
    "server": ("tests/server/test_server.py",),
}
"""Column of the table: arguments of pytest."""

HEAD = """\
# Compatibility

One code base on several versions of vLLM's CPU build. `make compat` installs each into an
environment of its own, runs the tests below there, and writes this table. Not run on a GPU.

- *contract*: every internal in [`CONTRACT.md`](../saeguard/vllm/CONTRACT.md) is there.
- *V1 parity*, *V2 parity*: activations and verdicts are those of Transformers and SAELens, on Model
  Runner V1 (Llama and GPT-2, compiled) and V2 (Llama, in Triton's interpreter).
- *clamps*: clamped texts are those of Transformers under a hook, on both runners.
- *drafts*: rejected n-gram drafts never count.
- *server*: a real server behind the OpenAI client, and one that is blind and ends.

"""


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


def check(version: str) -> dict[str, bool]:
    """Install one version and run its checks; none is run where it does not install."""
    print(f"vLLM {version}", flush=True)
    venv = FOLDER / version
    logs = FOLDER / f"{version}.logs"
    logs.mkdir(parents=True, exist_ok=True)
    setup = ["make", "setup", f"VENV={venv.relative_to(ROOT)}", f"VLLM={version}"]
    if not run("install", logs / "install.log", [*setup, f"PYTHON={sys.executable}"]):
        return {}
    pytest = [str(venv / "bin" / "python"), "-m", "pytest", "-p", "no:cacheprovider"]
    return {
        title: run(title, logs / f"{title.replace(' ', '-')}.log", [*pytest, *arguments])
        for title, arguments in CHECKS.items()
    }


def row(version: str, passed: Mapping[str, bool], ran: str) -> str:
    """Return a version's row of the table."""
    cells = [{True: "pass", False: "**fail**"}.get(passed.get(c), "not run") for c in CHECKS]
    return f"| {' | '.join([version, *cells, ran])} |"


def write(new: Mapping[str, str]) -> None:
    """Write the table, with new rows in place of a version's old one."""
    lines = TABLE.read_text().splitlines() if TABLE.exists() else []
    old = {line.split("|")[1].strip(): line for line in lines if line.startswith("| 0.")}
    rows = {**old, **new}
    ordered = sorted(rows, key=lambda version: tuple(map(int, version.split("."))))
    head = [f"| {' | '.join(['vLLM', *CHECKS, 'run'])} |", "|---" * (len(CHECKS) + 2) + "|"]
    TABLE.write_text(HEAD + "\n".join([*head, *(rows[version] for version in ordered)]) + "\n")


def main(versions: list[str]) -> int:
    """Check versions one after the other; return 1 if anything failed."""
    failed = False
    for version in versions or [f"{minor}.0" for minor in SUPPORTED]:
        started = time.monotonic()
        passed = check(version)
        minutes = round((time.monotonic() - started) / 60)
        ran = f"{datetime.now(UTC):%Y-%m-%d}, {machine()}, {minutes} min"
        write({version: row(version, passed, ran)})
        failed |= not passed or not all(passed.values())
    print(f"written to {TABLE.relative_to(ROOT)}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
