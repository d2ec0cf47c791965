"""The guard on a GPU, in under four minutes: what holds there, and what it costs.

    python3 -m benchmarks.gpu

Part A needs no vLLM: every Triton kernel against its reference, eagerly and in CUDA graphs, and its
times beside copies and products of the same sizes. Part B runs vLLM engines. See docs/gpu.md.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from rich.console import Console

from benchmarks import gpu_engines
from benchmarks.gpu_engines import STATES, Plan
from benchmarks.gpu_process import log_of, run_groups, stop_all, stop_on_signals
from benchmarks.gpu_record import append, conditions, read
from benchmarks.gpu_report import show, status

KERNELS = "kernels"
CHECKS = (
    "read, checks",
    "edit, checks",
    "op, checks",
    "ranks, checks",
    "encode, checks",
    "whole encode, checks",
)
TIMES = ("read, times", "op, times", "ranks, times", "edit, times", "encode, times")
SHARE = 0.4
"""Of the time, for part A where both run."""
CHECKS_SHARE = 0.65
"""Of part A's, for checks."""
WIDTH = 170


def kernels(args: argparse.Namespace, until: float) -> None:
    """Run part A: checks side by side, then times alone."""

    def command(names: Sequence[str], child_until: float) -> list[str]:
        told = ["-m", "benchmarks.gpu_kernels", f"--pieces={';'.join(names)}", f"--out={args.out}"]
        return [*told, f"--until={child_until}", *(["--tiny"] if args.tiny else [])]

    env = {} if args.gpu else {"TRITON_INTERPRET": "1"}
    run = partial(run_groups, KERNELS, command=command, out=args.out, env=env)
    began = time.monotonic()
    if not args.gpu:
        run([[*CHECKS, *TIMES]], until=until, together=1)
        return
    checks_until = began + CHECKS_SHARE * (until - began)
    run([[name] for name in CHECKS], until=checks_until, together=args.together)
    run([TIMES], until=until, together=1)


def plan_of(args: argparse.Namespace, folder: Path) -> Plan:
    """Return what part B is to run."""
    return Plan(
        model=args.model,
        dtype=args.dtype,
        folder=folder,
        out=args.out,
        states=args.states,
        runners=args.runners,
        batches=args.batches,
        steps=args.steps,
        rounds=args.rounds,
        prompts=args.prompts,
        answer=args.answer,
        longest=args.longest,
        start_s=args.start,
        together=args.together,
        eager=args.eager,
        gpu=args.gpu,
    )


def has_gpu() -> bool:
    """Return whether CUDA finds a device, without importing torch."""
    try:
        return bool(ctypes.CDLL("libcuda.so.1").cuInit(0) == 0)
    except OSError:
        return False


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def words(text: str) -> tuple[str, ...]:
        return tuple(text.split(","))

    def numbers(text: str) -> tuple[int, ...]:
        return tuple(int(part) for part in text.split(","))

    add = parser.add_argument
    add("--parts", type=words, default=("a", "b"), help="a: kernels; b: vLLM (default a,b)")
    add("--seconds", type=float, default=235, help="all of it, at most (default 235)")
    add("--out", type=Path, help="file of records, JSON lines (default $OUT/gpu.jsonl, else here)")
    add("--tiny", action="store_true", help="smallest sizes; without a GPU, in an interpreter")
    add("--report", type=Path, help="print the tables of a file of records, run nothing")
    add("--model", type=Path, help="that vLLM serves (default: the tests' own, 256 wide)")
    add("--dtype", default="float32", choices=tuple(gpu_engines.NEAR), help="of the model")
    add("--states", type=words, default=STATES, help=f"of {', '.join(STATES)}")
    add("--runners", type=words, help="model runners (default V1,V2; V1 without a GPU)")
    add("--batches", type=numbers, help="requests in a step (default 1,8,64,256)")
    add("--steps", type=int, help="decode steps of a block (default 64)")
    add("--rounds", type=int, help="of a block each, at most (default 10)")
    add("--together", type=int, help="processes that start at once (default 6; 1 without a GPU)")
    add("--eager", action="store_true", help="engines neither compile nor capture graphs")
    add("--start", type=float, default=90, help="seconds that an engine has to start")
    args = parser.parse_args()
    args.gpu = has_gpu()
    if not args.gpu and not args.tiny and args.report is None:
        parser.error("there is no GPU; --tiny runs the same in Triton's interpreter and on a CPU")
    defaults = {"runners": ("V1", "V2"), "batches": (1, 8, 64, 256), "steps": 64, "rounds": 10}
    defaults |= {"together": 6, "prompts": 32, "answer": 64, "longest": 512}
    if args.tiny:
        defaults |= {"batches": (1, 2), "steps": 6, "rounds": 1, "prompts": 4, "answer": 12}
        defaults |= {"longest": 256}
    if not args.gpu:
        defaults |= {"runners": ("V1",), "together": 1}
    for name, value in defaults.items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)
    if unknown := {*args.states} - {*STATES}:
        parser.error(f"--states: {', '.join(sorted(unknown))}: expected {', '.join(STATES)}")
    args.out = args.out or Path(os.environ.get("OUT", ".")) / "gpu.jsonl"
    return args


def main() -> None:
    """Run the parts and print what they found; the exit status says whether all held."""
    args = parse()
    console = Console(width=WIDTH)
    if args.report is not None:
        records = read(args.report)
        show(records, console)
        raise SystemExit(status(records))
    began = time.monotonic()
    until = began + args.seconds
    stop_on_signals()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for old in (args.out, log_of(args.out)):
        old.unlink(missing_ok=True)
    replays = "CUDA graphs" if args.gpu else "plain calls: Triton's interpreter, times mean nothing"
    append(args.out, **conditions(vars(args)), replays=replays)
    with tempfile.TemporaryDirectory(prefix="saeguard-gpu-") as name:
        plan = plan_of(args, Path(name))
        try:
            prepared = gpu_engines.prepare(plan) if "b" in args.parts else None
            if "a" in args.parts:
                append(args.out, part=KERNELS, pieces=[*CHECKS, *TIMES])
                kernels(args, until if prepared is None else began + SHARE * args.seconds)
            if prepared is not None:
                append(args.out, part=gpu_engines.PART, pieces=list(plan.pieces()))
                gpu_engines.run(plan, prepared, until)
        finally:
            stop_all()
            append(args.out, seconds=round(time.monotonic() - began, 1))
            records = read(args.out)
            show(records, console)
            console.print(f"{records[-1]['seconds']} s; records in {args.out}", soft_wrap=True)
    raise SystemExit(status(records))


if __name__ == "__main__":
    main()
