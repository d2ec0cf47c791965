"""`make fuzz`: a million spoilt policies, led by coverage. Needs `pip install saeguard[fuzz]`.

atheris keeps inputs that reach code no other did and spoils those further. libFuzzer bounds time
and memory of each input; whatever is not a policy error ends the run, and the input is kept.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["saeguard.policy", "saeguard.yaml_files"]):
    from tests.fuzz.target import read
    from tests.policy.example import read_policy

from tests.fuzz.mutate import MAX_BYTES, mutate

ROOT = Path(__file__).resolve().parents[2]
OURS = ROOT / "tests" / "fixture" / "policies" / "unsafe-code"
MEMORY_MIB = 1024
SHARE_ATHERIS, SHARE_GOOD = 0.1, 0.6
"""Of the inputs: changed by libFuzzer itself; made of a good file rather than of a kept one."""
SECONDS = 10


def main() -> None:
    """Read `--inputs` spoilt files, and write how many became what."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=ROOT / ".fuzz")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    corpus = options.out / "corpus"
    corpus.mkdir(exist_ok=True)
    for i, path in enumerate(seeds()):
        (corpus / f"{i}-{path.parent.name}-{path.name}").write_bytes(path.read_bytes())

    folder = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))  # noqa: S108
    good, errors = read_policy(OURS / "exposure.yaml")
    assert good, errors
    good_files = [path.read_bytes() for path in seeds()]
    seen: Counter[str] = Counter()
    start = time.monotonic()

    def one(raw: bytes) -> None:
        seen.update({"inputs"} | read(folder / "p.yaml", raw, good))
        if seen["inputs"] % 10_000 == 0:
            tell()

    def spoilt(raw: bytes, size: int, seed: int) -> bytes:
        chance = random.Random(seed)  # noqa: S311 - to run again, not to keep secrets
        level = chance.random()
        if level < SHARE_ATHERIS:
            return bytes(atheris.Mutate(raw, size))
        # What was kept is mostly broken at its start; good files reach the checks that come last.
        raw = chance.choice(good_files) if level < SHARE_GOOD else raw
        return mutate(raw, chance)[:size]

    def tell() -> None:
        report = {
            "seconds": round(time.monotonic() - start),
            "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10,
            "corpus": sum(1 for _ in corpus.iterdir()),
            "inputs with": dict(seen.most_common()),
        }
        (options.out / "report.json").write_text(json.dumps(report, indent=2) + "\n")

    atheris.Setup(
        [
            sys.argv[0],
            f"-runs={options.inputs}",
            f"-seed={options.seed}",
            f"-timeout={SECONDS}",
            f"-rss_limit_mb={MEMORY_MIB}",
            f"-max_len={MAX_BYTES}",
            "-mutate_depth=1",  # `mutate` makes several changes of its own
            "-len_control=0",  # whole policies from the first input on
            f"-artifact_prefix={options.out}/",
            "-print_final_stats=1",
            str(corpus),
        ],
        one,
        custom_mutator=spoilt,
    )
    atheris.Fuzz()


def seeds() -> list[Path]:
    """Return the files to start from: shipped and the tests' policies, their tests, attacks."""
    attacks = ROOT / "tests" / "policy" / "attacks"
    files = [*(ROOT / "policies").rglob("*.yaml"), *OURS.glob("*.yaml"), *attacks.glob("*.yaml")]
    return [path for path in sorted(files) if path.stat().st_size <= MAX_BYTES]


if __name__ == "__main__":
    main()
