"""Speculative decoding: rejected drafts never count, accepted ones count once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests import models
from tests.engine import engines

pytestmark = pytest.mark.engine

NEEDS_TRITON = ("0.30.",)
"""vLLM versions whose CPU build dies of its own first draft, guarded or not.

They wrap the rejection kernel before their CPU kernels are put in its place. In Triton's
interpreter the kernel itself runs.
"""


@pytest.mark.parametrize("at_once", [False, True], ids=["judged-after", "judged-before"])
def test_rejected_drafts_never_count(tmp_path: Path, at_once: bool) -> None:
    """With n-gram drafts, verdicts are the reference's and every ledger balances.

    Where a policy could stop, each pass is judged before it is known where its requests end.
    """
    import vllm

    guarded = models.make_guarded(tmp_path)
    if at_once:
        models.write_policy(
            guarded.policies / "never.yaml", id="test.never", action="stop",
            detect={"a": {"feature": "f4", "above": 99}}, condition="a",
        )  # fmt: skip
    settings = guarded.settings(events=str(tmp_path / "events.jsonl"))
    rng = np.random.default_rng(8)
    patterns = [rng.integers(3, 512, int(n)).tolist() for n in rng.integers(2, 6, 12)]
    served = engines.serve(
        tmp_path / "run",
        {
            "model": str(guarded.model),
            "max_num_seqs": 6,
            "enforce_eager": True,
            "speculative_config": {
                "method": "ngram",
                "num_speculative_tokens": 3,
                "prompt_lookup_max": 2,
                "prompt_lookup_min": 1,
            },
            "additional_config": {"saeguard": settings},
        },
        [engines.requests([[1, *(p * 5)] for p in patterns], max_tokens=24)],
        triton=vllm.__version__.startswith(NEEDS_TRITON),
    )
    reference = engines.Reference(guarded.model, guarded.sae)
    watchlist = engines.compile_policies(settings)
    events = engines.events_by_request(tmp_path / "events.jsonl")
    drafted = 0
    for result in served.results:
        tokens = len(result["prompt"]) + len(result["output"])
        positions, _ = served.activations[result["id"]]
        drafted += int(positions.max() >= tokens)
        coverage = result["saeguard"]["coverage"]
        assert coverage["tokens"] == tokens
        assert coverage["evaluated"] + sum(coverage["skipped"].values()) == tokens
        for verdict in reference.verdicts(watchlist, result["prompt"], result["output"]):
            event = events[result["id"]][verdict.policy]
            if verdict.first_token is None and event["first_token"] == tokens - 1:
                continue  # a draft foresaw the last token, which is then read after all
            if verdict.score is not None and abs(verdict.score - 1) < 1e-3:
                continue
            assert (event["verdict"], event["first_token"]) == (
                verdict.outcome,
                verdict.first_token,
            )
    assert drafted, "no draft reached behind an end: the test has not seen what it is for"
