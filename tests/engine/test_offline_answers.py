"""`LLM.generate`, `chat` and `beam_search`, and batch files, withhold and tell as a server does."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import models
from tests.engine import engines

pytestmark = pytest.mark.engine

MESSAGE = "withheld"
CHAT = [{"role": "user", "content": "hello there, how is it going?"}]
CHILD = """
import json, sys
from vllm import LLM, SamplingParams
from vllm.sampling_params import BeamSearchParams

settings, model, chat = json.loads(sys.argv[1])
llm = LLM(model, dtype="float32", max_model_len=256, enforce_eager=True,
          additional_config={"saeguard": settings})
params = SamplingParams(temperature=1.0, seed=1, max_tokens=60, n=2, logprobs=1)
said = []
for outputs in (llm.generate("hello there", params), llm.chat(chat, params)):
    for choice in outputs[0].outputs:
        said.append({"text": choice.text, "ids": list(choice.token_ids),
                     "why": choice.finish_reason, "reason": choice.stop_reason,
                     "logprobs": choice.logprobs,
                     "saeguard": choice.saeguard})
try:
    llm.beam_search([{"prompt": "hello there"}], BeamSearchParams(beam_width=2, max_tokens=4))
    beams = "searched"
except ValueError as error:
    beams = str(error)
print("SAID", json.dumps([said, beams]))
"""


def guarded(root: Path, **more: Any) -> models.Guarded:
    """Make a model under one policy that stops with a message."""
    model, sae = models.make_model("llama", root / "model"), models.make_sae(root / "sae")
    models.write_feature_set(root / "feature_sets" / "tiny.yaml", sae, latents=(4,))
    found = models.Guarded(model, sae, root / "policies", root / "feature_sets", (4,))
    policy = {
        "id": "test.stop",
        "action": "stop",
        "message": MESSAGE,
        "scope": "output",
        "detect": {"a": {"feature": "f4", "above": 0.1}},
        "condition": "a",
        "for": "2 of 3 tokens",
    }
    models.write_policy(found.policies / "stop.yaml", **{**policy, **more})
    return found


def run(*command: str) -> subprocess.CompletedProcess[str]:
    """Run a command of the environment's Python."""
    return subprocess.run(
        [sys.executable, *command], cwd=engines.ROOT, env=engines.environment(),
        capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip


def test_offline_answers_are_withheld(tmp_path: Path) -> None:
    """Text, ids and probabilities; beams are refused with the policy's name."""
    made = guarded(tmp_path)
    done = run("-c", CHILD, json.dumps([made.settings(), str(made.model), CHAT]))
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    line = next(ln for ln in done.stdout.splitlines() if ln.startswith("SAID "))
    said, beams = json.loads(line.removeprefix("SAID "))
    stopped = [answer for answer in said if answer["reason"] == "saeguard:test.stop"]
    assert len(stopped) >= 2
    for answer in stopped:
        assert (answer["text"], answer["ids"], answer["logprobs"]) == (MESSAGE, [], [])
        assert (answer["why"], answer["saeguard"]["action"]) == ("content_filter", "stop")
    assert "use_beam_search: expected false" in beams
    assert "test.stop" in beams


@pytest.mark.slow
def test_a_batch_file_is_withheld(tmp_path: Path) -> None:
    """Each line of `vllm run-batch` tells what was found."""
    made = guarded(tmp_path)
    body = {"model": str(made.model), "messages": CHAT, "max_tokens": 60, "temperature": 0}
    line = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": body}
    (tmp_path / "in.jsonl").write_text(json.dumps(line) + "\n")
    done = run(
        "-m", "vllm.entrypoints.openai.run_batch", "-i", str(tmp_path / "in.jsonl"),
        "-o", str(tmp_path / "out.jsonl"), "--model", str(made.model), "--dtype", "float32",
        "--max-model-len", "256", "--enforce-eager",
        "--additional-config", json.dumps({"saeguard": made.settings()}),
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    answer = json.loads((tmp_path / "out.jsonl").read_text())["response"]["body"]
    [choice] = answer["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == (MESSAGE, "content_filter")
    assert answer["saeguard"]["coverage"]["tokens"] == answer["usage"]["total_tokens"]
