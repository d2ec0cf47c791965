"""Break a mechanism on purpose, and see the test that is there for it fail.

`python -m tests.mutants` (`make mutants`) runs each test twice, whole and with the mechanism broken
by a line that every Python process runs as it starts, and writes docs/mutants.md.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import track

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "docs" / "mutants.md"
SMALL = "60"
"""Requests of a storm; the broken mechanism shows long before."""


@dataclass(frozen=True)
class Mutant:
    """One mechanism, how it is broken, and the test that must notice."""

    mechanism: str
    broken: str
    code: str
    test: str


MUTANTS = (
    Mutant(
        "what was seen of cached prefixes is remembered",
        "nothing is found again",
        "import saeguard.guard.memory as m\nm.Memory.get = lambda self, key: None\n",
        "tests/engine/test_storm.py::test_model_runner_v1",
    ),
    Mutant(
        "the same",
        "what is found is what was seen of another block",
        "import saeguard.guard.memory as m\n"
        "get = m.Memory.get\n"
        "m.Memory.get = lambda self, key: get(self, next(iter(self._seen), key)) and "
        "get(self, next(iter(self._seen)))\n",
        "tests/engine/test_storm.py::test_model_runner_v1",
    ),
    Mutant(
        "KV made under a clamp is its own",
        "the cache is not salted, and clamped requests read it",
        "import saeguard.vllm.scheduler as s\n"
        "s.preprocess_add_request = lambda wrapped, core, args, kwargs: wrapped(*args, **kwargs)\n",
        "tests/engine/test_clamp.py::test_clamped_texts_equal_the_reference",
    ),
    Mutant(
        "the same, without a policy's own match",
        "the cache is not salted; clamped requests still read nothing",
        "import saeguard.vllm.engine as e, saeguard.vllm.scheduler as s\n"
        "whole = s.preprocess_add_request\n"
        "def unsalted(wrapped, core, args, kwargs):\n"
        "    request = args[0] if args else kwargs['request']\n"
        "    def forget(*a, **k):\n"
        "        request.cache_salt = None\n"
        "        return wrapped(*a, **k)\n"
        "    return whole(forget, core, args, kwargs)\n"
        "s.preprocess_add_request = unsalted\n",
        "tests/engine/test_clamp.py::test_clamped_texts_equal_the_reference",
    ),
    Mutant(
        "rejected drafts never count",
        "every row of a pass counts",
        "import numpy as np, saeguard.vllm.engine as e\n"
        "e.EngineGuard._valid_rows = lambda self, packet, scheduled, output: "
        "np.diff(packet.query_start)\n",
        "tests/engine/test_storm.py::test_speculative_decoding",
    ),
    Mutant(
        "accepted drafts behind a request's end do not count",
        "what the pass said stays",
        "import saeguard.vllm.engine as e\n"
        "e.EngineGuard.after_update = lambda self, packet: self._saved.clear()\n",
        "tests/engine/test_storm.py::test_speculative_decoding",
    ),
    Mutant(
        "a policy stops its request before the next token leaves",
        "the scheduler is not told",
        "import saeguard.vllm.scheduler as s\n"
        "s.update_request = lambda wrapped, scheduler, args, kwargs: wrapped(*args, **kwargs)\n",
        "tests/engine/test_storm.py::test_model_runner_v1",
    ),
    Mutant(
        "an aborted request's rows are remembered for those that read its KV",
        "they are dropped with the request",
        "import saeguard.vllm.engine as e\n"
        "finish = e.EngineGuard.finish\n"
        "def gone(self, request_id, reason):\n"
        "    said = finish(self, request_id, reason)\n"
        "    self.release([request_id])\n"
        "    return said\n"
        "e.EngineGuard.finish = gone\n",
        "tests/engine/test_storm.py::test_what_an_aborted_request_computed_is_seen",
    ),
)


def run(mutant: Mutant, *, broken: bool) -> tuple[bool, str]:
    """Run the mutant's test; return whether it passed, and its last line."""
    with tempfile.TemporaryDirectory() as folder:
        env = {**os.environ, "SAEGUARD_STORM": SMALL}
        if broken:
            (Path(folder) / "sitecustomize.py").write_text(mutant.code)
            env["SAEGUARD_TEST_PRELUDE"] = folder
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", mutant.test],
            cwd=ROOT,
            env=env,
            capture_output=True,
            text=True,
            check=False,
            timeout=1200,
        )
    errors = [line for line in done.stdout.splitlines() if line.startswith("E ")]
    return done.returncode == 0, errors[0].strip("E ") if errors else done.stdout[-300:]


def main() -> None:
    """Run all, print and write the table; fail where a broken mechanism goes unnoticed."""
    rows, unnoticed = [], 0
    whole: dict[str, bool] = {}
    for mutant in track(MUTANTS, "mutants", console=Console(stderr=True)):
        if mutant.test not in whole:
            whole[mutant.test] = run(mutant, broken=False)[0]
        survived, why = run(mutant, broken=True)
        caught = whole[mutant.test] and not survived
        unnoticed += not caught
        why = why.replace("|", "/")[:90]
        rows.append(
            f"| {mutant.mechanism} | {mutant.broken} | `{mutant.test.removeprefix('tests/')}` | "
            f"{'passes' if whole[mutant.test] else '**fails**'} | "
            f"{'fails' if not survived else '**passes**'}: {why} |"
        )
        print(rows[-1], flush=True)
    TABLE.write_text(
        "# Mechanisms broken on purpose\n\n"
        "`make mutants` runs each test whole and with one mechanism broken, and writes this.\n\n"
        "| mechanism | broken how | test | whole | broken |\n|---|---|---|---|---|\n"
        + "\n".join(rows)
        + "\n"
    )
    if unnoticed:
        raise SystemExit(f"{unnoticed} broken mechanisms went unnoticed")


if __name__ == "__main__":
    main()
