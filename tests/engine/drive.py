"""Child process of the engine tests: serve a job with the real vLLM and write what happened.

`python -m tests.engine.drive JOB.json OUT.npz`, where the job holds `engine` (arguments of
`vllm.LLM`) and `batches` (each a list of requests with `prompt` token ids and sampling `params`).
The result goes to `OUT.json`, one a choice under the name that the engine core knows it by, the
watched activations by request to `OUT.npz`.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from tests.engine import child


def record_activations() -> dict[str, dict[int, np.ndarray]]:
    """Keep a copy of every row that the rules are given, by request and position."""
    from saeguard.vllm.engine_core import step

    rows: dict[str, dict[int, np.ndarray]] = defaultdict(dict)
    valid_rows = step.valid_rows

    def recording(guard: Any, forward_pass: Any, *args: Any) -> Any:
        now = guard.versions.current  # the taps have room for more than the list reads
        read = [c.first + i for c in guard.columns for i in sorted(now.reads[c.layer])]
        for i, request_id in enumerate(forward_pass.request_ids):
            for row in range(forward_pass.query_start[i], forward_pass.query_start[i + 1]):
                rows[request_id.split("-")[0]][int(forward_pass.positions[row])] = forward_pass.f[
                    row, read
                ]
        return valid_rows(guard, forward_pass, *args)

    step.valid_rows = recording
    return rows


def record_block() -> list[str]:
    """Keep the form of what tapped blocks return, as the self-test's uncompiled pass shows it."""
    from saeguard.vllm.worker import selftest

    observe, forms = selftest.observe_layers, []

    def note(_module: Any, _args: Any, output: Any) -> None:
        first = output if hasattr(output, "dim") else output[0]
        form = "one tensor" if first is output else "(hidden, residual)"
        forms.append(f"{form}, batch of 1" if first.dim() > 2 else form)

    def observing(model: Any, layers: Any, taps: Any, seen: Any) -> list[Any]:
        noting = [layers[tap.layer].register_forward_hook(note) for tap in taps]
        return [*observe(model, layers, taps, seen), *noting]

    selftest.observe_layers = observing
    return forms


def main(job_path: Path, out_path: Path) -> None:
    """Run the job."""
    job = json.loads(job_path.read_text())
    guarded = "saeguard" in job["engine"].get("additional_config", {})
    rows, forms = (record_activations(), record_block()) if guarded else ({}, [])
    from vllm import LLM, SamplingParams

    llm = LLM(**job["engine"])
    child.ready()
    results = []
    for batch in job["batches"]:
        prompts = [{"prompt_token_ids": r["prompt"]} for r in batch]
        params = [SamplingParams(**r["params"]) for r in batch]
        for out in llm.generate(prompts, params, use_tqdm=False):
            base = out.request_id.split("-")[0]
            results += [
                {
                    "id": f"{choice.index}_{base}" if len(out.outputs) > 1 else base,
                    "prompt": list(out.prompt_token_ids),
                    "output": list(choice.token_ids),
                    "cached": out.num_cached_tokens,
                    "saeguard": child.said(choice),
                }
                for choice in out.outputs
            ]
    core = llm.llm_engine.engine_core.engine_core
    guard = getattr(core.scheduler, "saeguard_engine", None)
    leftover = 0 if guard is None else sum(len(v.ledger) for v in guard.versions.live)
    core.scheduler.shutdown()
    out_path.with_suffix(".json").write_text(
        json.dumps(
            {
                "results": results,
                "left": leftover,
                "blocks": forms,
                "graph": llm.llm_engine.vllm_config.compute_hash(),
            }
        )
    )
    np.savez(
        out_path,
        **{
            f"{request_id}.{name}": array
            for request_id, by_position in rows.items()
            for name, array in (
                ("positions", np.array(sorted(by_position))),
                ("f", np.stack([by_position[p] for p in sorted(by_position)])),
            )
        },
    )


if __name__ == "__main__":
    child.run(main, Path(sys.argv[1]), Path(sys.argv[2]))
