"""Run the test suite in lanes of one core each, then what needs several cores, and add up.

`python -m tests.lanes` (`make test`) leaves out what is slow; `--all` (`make test-all`) does not.
Other arguments go to pytest. A failure in the first part does not keep the second from running.
The last line is the total of both.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree as ET

ROOT = Path(__file__).parents[1]
MOST_LANES = 2
"""A lane needs up to 8 GB."""


def run(arguments: Sequence[str]) -> Counter[str]:
    """Run pytest; return how many tests passed, failed and were skipped."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", f"--junitxml={report}", *arguments]
        code = subprocess.run(command, cwd=ROOT, check=False).returncode
        if not report.exists():
            return Counter(failed=1)
        (suite,) = ET.parse(report).getroot()  # noqa: S314 - pytest has just written it
    count = {name: int(suite.attrib[name]) for name in ("tests", "errors", "failures", "skipped")}
    failed = count["errors"] + count["failures"]
    passed = count["tests"] - failed - count["skipped"]
    # Pytest exits with 5 if nothing was selected, which is fine for one of two parts.
    failed = max(failed, int(code not in (0, 5)))
    return Counter(passed=passed, failed=failed, skipped=count["skipped"])


def main() -> int:
    """Run both parts, print the total, return 1 if anything failed or nothing ran."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--all", action="store_true", help="slow tests, too")
    parser.add_argument("--lanes", type=int, help="(as many as there are cores, at most 2)")
    options, more = parser.parse_known_args()
    lanes = options.lanes or min(MOST_LANES, len(os.sched_getaffinity(0)))
    quick = "" if options.all else " and not slow"
    # A file stays on one lane, since its tests share engines; tests/conftest.py orders the files.
    side_by_side = ["-n", str(lanes), "--dist", "loadfile", "--no-loadscope-reorder"]
    total = run([*side_by_side, "-m", f"not ranks{quick}", *more])
    total += run(["-m", f"ranks{quick}", *more])
    print(
        f"saeguard: {total['passed']} passed, {total['failed']} failed, {total['skipped']} skipped",
        flush=True,
    )
    return int(total["failed"] > 0 or total["passed"] == 0)


if __name__ == "__main__":
    sys.exit(main())
