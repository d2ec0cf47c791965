"""How long `saeguard check` takes on a thousand policy files: a process of its own, start included.

Wall time, and the processor time that the process used, which other work on the machine does not
stretch as much.
"""

from __future__ import annotations

import argparse
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.fixture.project import save_project

ROOT = Path(__file__).parents[1]

POLICY = """\
schema: saeguard.policy/v1
id: bench.p{i}
title: One of many policies
owner: bench@example.com
severity: high
mode: shadow
action: flag
scope: output
feature_set: fixture
rationale: A file as long as those that people write, of which there are many in one folder.
falsepositives: [Texts that are harmless, Others that are harmless too]
review_by: 2099-01-01
detect:
  shell: {{feature: hardcoded_secret, above: 0.6}}
  untrusted: {{feature: tls_off, above: 0.4, over: mean of 16 tokens}}
condition: shell and untrusted
for: 3 of 8 tokens
keep: 16 tokens
"""


def main() -> None:
    """Write the files, check them a few times, print the fastest and the median."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=1000)
    parser.add_argument("--runs", type=int, default=7)
    args = parser.parse_args()
    walls, used = [], []
    with tempfile.TemporaryDirectory(prefix="saeguard-check-") as name:
        folder = Path(name) / "policies"
        sets = save_project(Path(name) / "own").feature_sets
        shutil.copytree(ROOT / "feature_sets" / "templates", sets / "templates")
        folder.mkdir()
        for i in range(args.files):
            (folder / f"p{i}.yaml").write_text(POLICY.format(i=i))
        for _ in range(args.runs):
            before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
            subprocess.run(
                [sys.executable, "-m", "saeguard", "check", folder, "--feature-sets", sets],
                check=True,
                stdout=subprocess.DEVNULL,
            )
            walls.append(time.perf_counter() - began)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            used.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    table = Table("files", "", "fastest", "median")
    for what, seconds in (("wall", walls), ("processor", used)):
        ordered = sorted(seconds)
        median = ordered[len(ordered) // 2]
        table.add_row(f"{args.files:,}", what, f"{ordered[0]:.2f} s", f"{median:.2f} s")
    Console().print(table)


if __name__ == "__main__":
    main()
