"""How long `saeguard check` takes on many files: `python -m benchmarks.check`.

Each count of files is checked by a fresh process, as CI and pre-commit do. Wall time is the least
of the runs; CPU time, which other work on the machine does not lengthen, is that of the same run.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "policies" / "unsafe-code" / "injection.yaml"
ID = "id: unsafe-code.injection"


def main() -> None:
    """Measure and write benchmarks/results/check.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, nargs="+", default=[1, 100, 1000, 10_000])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "check.json")
    options = parser.parse_args()
    rows = {"saeguard --help": measured(["--help"], options.runs)}
    for files in options.files:
        with tempfile.TemporaryDirectory() as name:
            write(Path(name), files)
            rows[f"{files} files"] = measured(["check", name], options.runs)
    report = {
        "machine": f"{os.cpu_count()} cores, {platform.processor() or platform.machine()}",
        "python": platform.python_version(),
        "policy": str(SOURCE.relative_to(ROOT)),
        "runs": options.runs,
        "rows": rows,
    }
    options.out.write_text(json.dumps(report, indent=2) + "\n")
    for what, row in rows.items():
        print(f"{what:16} {row['wall_s']:.2f} s, of which CPU {row['cpu_s']:.2f} s")


def write(folder: Path, files: int) -> None:
    """Write that many policies, a hundred to a folder."""
    text = SOURCE.read_text()
    assert ID in text
    for i in range(files):
        path = folder / str(i // 100) / f"{i}.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text.replace(ID, f"id: unsafe-code.injection-{i}"))


def measured(arguments: list[str], runs: int) -> dict[str, float]:
    """Return the least wall time of `runs`, with that run's CPU time and the peak of memory."""
    best: dict[str, float] = {"wall_s": float("inf")}
    for _ in range(runs):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        start = time.perf_counter()
        command = [sys.executable, "-m", "saeguard", *arguments]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        wall = time.perf_counter() - start
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        if wall < best["wall_s"]:
            cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
            best = {"wall_s": round(wall, 3), "cpu_s": round(cpu, 3)}
    return best


if __name__ == "__main__":
    main()
