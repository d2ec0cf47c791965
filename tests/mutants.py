"""Break a mechanism on purpose, and see the test that is there for it fail.

`python -m tests.mutants` (`make mutants`) runs each test twice, whole and with the mechanism broken
by a line that every Python process runs as it starts, and writes docs/mutants.md. With words
behind it (`python -m tests.mutants parallel storm`) it runs those whose row has one of them, and
keeps the table's other rows.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.progress import track

from tests.engine.test_compile_cache import SAME_HASH

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "docs" / "mutants.md"
ACCIDENT = re.compile(r"\b(TypeError|AttributeError|NameError|ImportError|ModuleNotFoundError): ")
"""Errors of a line that breaks a mechanism and no longer fits the code."""
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
        "fired latents of cached prefixes are recorded",
        "every recall returns nothing",
        "import saeguard.guard.prefix.store as m\n"
        "m.PrefixStore.get = lambda self, key, needs=0: None\n",
        "tests/engine/test_storm.py::test_model_runner_v1",
    ),
    Mutant(
        "the same",
        "every recall returns another block's record",
        "import saeguard.guard.prefix.store as m\n"
        "get = m.PrefixStore.get\n"
        "m.PrefixStore.get = lambda self, key, needs=0: "
        "get(self, next(iter(self._blocks), key), needs)\n",
        "tests/engine/test_storm.py::test_model_runner_v1",
    ),
    Mutant(
        "KV made under a clamp is kept apart",
        "the cache is not salted, and clamped requests read it",
        "import saeguard.vllm.engine_core.hooks as s\n"
        "s.preprocess_add_request = lambda original, core, request: original()\n",
        "tests/engine/test_clamp.py::test_clamped_texts_equal_the_reference",
    ),
    Mutant(
        "the same, alone",
        "the cache is not salted; clamped requests still read nothing",
        "import saeguard.vllm.engine_core.hooks as s\n"
        "whole = s.preprocess_add_request\n"
        "def unsalted(original, core, request):\n"
        "    def forget():\n"
        "        request.cache_salt = None\n"
        "        return original()\n"
        "    return whole(forget, core, request)\n"
        "s.preprocess_add_request = unsalted\n",
        "tests/engine/test_clamp.py::test_clamped_texts_equal_the_reference",
    ),
    Mutant(
        "rejected drafts never count",
        "every row of a pass counts",
        "import numpy as np, saeguard.vllm.engine_core.step as e\n"
        "e.valid_rows = lambda guard, forward_pass, scheduled, output: "
        "np.diff(forward_pass.query_start)\n",
        "tests/engine/test_storm.py::test_speculative_decoding",
    ),
    Mutant(
        "accepted drafts after a request's end do not count",
        "the rows of the pass stay counted",
        "import saeguard.vllm.engine_core.pending_passes as e\n"
        "def keep(self, forward_pass):\n"
        "    self._saved.clear()\n"
        "    self.catch_up()\n"
        "e.PendingPasses.roll_back = keep\n",
        "tests/engine/test_drafts.py",
    ),
    Mutant(
        "a policy stops its request before the next token is sent",
        "the scheduler does not end the request",
        "import saeguard.vllm.engine_core.step as s\n"
        "s.update_request = lambda original, scheduler, request, new_token_ids: original()\n",
        "tests/engine/test_storm.py::test_model_runner_v1",
    ),
    Mutant(
        "an aborted request's rows are recorded for those that read its KV",
        "they are dropped with the request",
        "import saeguard.vllm.engine_core.guard as e\n"
        "finish = e.EngineGuard.finish\n"
        "def gone(self, request_id, reason):\n"
        "    said = finish(self, request_id, reason)\n"
        "    self.release([request_id])\n"
        "    return said\n"
        "e.EngineGuard.finish = gone\n",
        "tests/engine/test_storm.py::test_what_an_aborted_request_computed_is_seen",
    ),
    Mutant(
        "cached tokens without a record are computed again if a policy requires it",
        "they are read from the cache",
        "import saeguard.vllm.engine_core.guard as e\n"
        "e.EngineGuard.recomputes = lambda self, request, cached: False\n",
        "tests/engine/test_uncached.py::test_recompute",
    ),
    Mutant(
        "tensor parallel: every rank applies a clamp",
        "the second rank does not",
        "import torch, saeguard.guard.clamp.rules as c\n"
        "apply = c.apply\n"
        "def first_only(*a):\n"
        "    if torch.distributed.get_rank() == 0:\n"
        "        apply(*a)\n"
        "c.apply = first_only\n",
        "tests/engine/test_parallel.py::test_tensor_parallel",
    ),
    Mutant(
        "tensor parallel: every rank is asked after the self-test",
        "only the rank that vLLM listens to is asked",
        "import torch, saeguard.vllm.engine_core.selftest as r\n"
        "failure = r.self_test_failure\n"
        "r.self_test_failure = lambda w: "
        "failure(w) if torch.distributed.get_rank() == 0 else None\n",
        "tests/engine/test_parallel.py::test_a_blind_rank_ends_the_start[ranks0-1]",
    ),
    Mutant(
        "pipeline parallel: readings travel with their own pass",
        "the last stage gets those of the previous pass, if sizes agree",
        "import saeguard.vllm.worker.pipeline_parallel as p\n"
        "put, last = p.put, []\n"
        "def stale(intermediate, readings):\n"
        "    last.append(readings)\n"
        "    same = {k: r.f.shape for k, r in last[0].items()} == "
        "{k: r.f.shape for k, r in readings.items()}\n"
        "    sent = last[0] if same else readings\n"
        "    del last[:-1]\n"
        "    return put(intermediate, sent)\n"
        "p.put = stale\n",
        "tests/engine/test_parallel.py::test_pipeline_parallel",
    ),
    Mutant(
        "data parallel: engine cores append whole lines to one event file",
        "each opens the file anew and writes from its start",
        "import io, saeguard.events.sink as s\n"
        "s._Lines.__init__ = lambda self, path, mode: io.FileIO.__init__(self, path, 'w')\n",
        "tests/server/test_data_parallel.py::test_one_account_of_all_requests",
    ),
    Mutant(
        "data parallel: totals of all engine cores reach /metrics",
        "only those of the first core do",
        "import multiprocessing, saeguard.vllm.engine_core.guard as e\n"
        "changed = e.EngineGuard.changed_totals\n"
        "e.EngineGuard.changed_totals = lambda self: [] if 'DP1' in "
        "multiprocessing.current_process().name else changed(self)\n",
        "tests/server/test_data_parallel.py::test_one_account_of_all_requests",
    ),
    Mutant(
        "the digest of what shapes the graph is in vLLM's compile hash",
        "the hash does not depend on the guard",
        SAME_HASH,
        "tests/engine/test_compile_cache.py::test_a_guarded_start_after_an_unguarded_one",
    ),
    Mutant(
        "a graph without the tap, loaded from a stale cache, is not served",
        "the self-test is left out",
        "import saeguard.vllm.engine_core.selftest as s\ns.run = lambda core, guard: None\n",
        "tests/engine/test_compile_cache.py::test_a_stale_artefact_is_caught",
    ),
    Mutant(
        "reload: clamps that come back between two requests edit again",
        "dropped clamps are removed after new ones are added",
        "import saeguard.vllm.worker.guard as w\n"
        "apply = w.WorkerGuard.apply_update\n"
        "def last(self, update):\n"
        "    apply(self, update._replace(dropped=()))\n"
        "    for digest in update.dropped:\n"
        "        self.clamp_lists.pop(digest, None)\n"
        "        [tap.clamps.pop(digest, None) for tap in self.taps]\n"
        "w.WorkerGuard.apply_update = last\n",
        "tests/engine/test_reload.py::test_a_set_that_comes_back_between_two_requests",
    ),
    Mutant(
        "latents of TopK and groupmax SAEs fire by rank",
        "they fire by their thresholds alone",
        "import saeguard.guard.topk as r\nr.drop = lambda competitors, x, f: None\n",
        "tests/engine/test_kinds.py::test_kinds_side_by_side",
    ),
    Mutant(
        "attention sinks are left out by the norm of their residual",
        "the rules do not compare it with the bound",
        "import saeguard.guard.ledger as m\n"
        "read = m.reads_of\n"
        "def blind(watchlist, columns):\n"
        "    reads = read(watchlist, columns)\n"
        "    return reads._replace(norms=reads.norms[:0])\n"
        "m.reads_of = blind\n",
        "tests/engine/test_sinks.py::test_model_runner_v1",
    ),
    Mutant(
        "the same, in a clamp",
        "a clamp edits rows of any norm",
        "import math, dataclasses, saeguard.guard.clamp.rules as c\n"
        "make = c.make_clamp\n"
        "c.make_clamp = lambda *a, **k: dataclasses.replace(make(*a, **k), max_norm=math.inf)\n",
        "tests/engine/test_sinks.py::test_model_runner_v1",
    ),
)


class Run(NamedTuple):
    """What became of a mutant's test."""

    passed: bool
    why: str
    """The first line of the failure."""
    accidents: frozenset[str]
    """Python errors that it printed, such as a patch that takes other arguments would cause."""


def run(mutant: Mutant, *, broken: bool) -> Run:
    """Run the mutant's test."""
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
    why = errors[0].strip("E ") if errors else done.stdout[-300:]
    return Run(done.returncode == 0, why, frozenset(ACCIDENT.findall(done.stdout)))


def main(words: Sequence[str], page: Path) -> None:
    """Run them, print and write the table; fail if a broken mechanism goes unnoticed."""
    earlier = {key(row): row for row in page.read_text().splitlines() if row.startswith("| ")}
    rows, unnoticed = {}, 0
    whole: dict[str, Run] = {}
    for mutant in track(MUTANTS, "mutants", console=Console(stderr=True)):
        test = mutant.test.removeprefix("tests/")
        row = f"| {mutant.mechanism} | {mutant.broken} | `{test}` |"
        if words and not any(word in row for word in words):
            rows[key(row)] = earlier.get(key(row), f"{row} not run | not run |")
            continue
        if mutant.test not in whole:
            whole[mutant.test] = run(mutant, broken=False)
        intact, broken = whole[mutant.test], run(mutant, broken=True)
        accidents = broken.accidents - intact.accidents
        unnoticed += not intact.passed or broken.passed or bool(accidents)
        result = "**passes**" if broken.passed else "fails"
        if accidents:
            result = f"**dies of {', '.join(sorted(accidents))}**"
        as_it_is = "passes" if intact.passed else f"**fails**: {cell(intact.why)}"
        rows[key(row)] = f"{row} {as_it_is} | {result}: {cell(broken.why)} |"
        print(rows[key(row)], flush=True)
    page.write_text(
        "# Mechanisms broken on purpose\n\n"
        "`make mutants` runs each test twice, with the code as it is and with one mechanism\n"
        "broken, and writes this page. It fails if a test passes with its mechanism broken, and\n"
        "if it dies of a Python error that the broken line itself caused.\n\n"
        "| mechanism | how it is broken | test | as it is | broken |\n|---|---|---|---|---|\n"
        + "\n".join(rows.values())
        + "\n"
    )
    if unnoticed:
        raise SystemExit(f"{unnoticed} broken mechanisms went unnoticed")


def cell(text: str) -> str:
    """Return the start of a text as a cell of the table, without paths of this machine."""
    text = re.sub(rf"{re.escape(tempfile.gettempdir())}[^\s']*", "…", text)
    return text.replace("|", "/").replace("`", "'")[:90]


def key(row: str) -> tuple[str, ...]:
    """Return what tells a row of the table from the others: mechanism, how broken, test."""
    return tuple(cell.strip() for cell in row.split("|")[1:4])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("words", nargs="*", help="run rows that have one of them")
    parser.add_argument("--page", type=Path, default=TABLE)
    options = parser.parse_args()
    main(options.words, options.page)
