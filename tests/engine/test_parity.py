"""What the tap reads is what Transformers and SAELens compute, family by family."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from safetensors.torch import load_file
from transformers import AutoTokenizer

from saeguard.features.load import load_feature_set
from saeguard.features.types import FeatureSet
from tests import models
from tests.engine import engines, probes
from tests.fixture.project import LAYER, save_project

TOLERANCE = 2e-4
"""Of the largest activation: both sides compute in float32, in different orders."""

CORE = ("llama", "gemma2", "gpt2", "gpt_neox", "qwen3_moe")
"""What every run of the tests covers: both forms of a block's output, experts, soft-capped
attention, Transformers' own blocks; in vLLM's default, compiled mode."""

NATIVE_ROTARY = {"compilation_config": {"custom_ops": ["-rotary_embedding"]}}
ENGINE = {"deepseek_v2": NATIVE_ROTARY, "deepseek_v3": NATIVE_ROTARY}
"""vLLM 0.32's CPU kernel rotates a three-dimensional query of more than one head wrongly, which
is what latent attention hands it; its PyTorch version is right."""

pytestmark = pytest.mark.engine


def compare(
    served: engines.Served, guarded: models.Guarded, settings: dict[str, object], layer: int = 1
) -> float:
    """Return the largest difference of activations, as a share of the largest activation."""
    reference = engines.Reference(guarded.model, guarded.sae, layer)
    watchlist = engines.compile_policies(settings)
    latents = [int(name.rsplit("/f", 1)[1]) for name in watchlist.features]
    worst = 0.0
    for result in served.results:
        positions, f = served.activations[result["id"]]
        tokens = [*result["prompt"], *result["output"]][:-1]
        assert positions.tolist() == list(range(len(tokens)))
        expected = reference.latents(tokens)[:, latents]
        worst = max(worst, float(np.abs(f - expected).max() / expected.max()))
    return worst


def check_verdicts(
    served: engines.Served, guarded: models.Guarded, settings: dict[str, object]
) -> int:
    """Check every event against the reference for exactly that request; return how many."""
    reference = engines.Reference(guarded.model, guarded.sae)
    watchlist = engines.compile_policies(settings)
    events = engines.events_by_request(Path(str(settings["events"])))
    checked = 0
    for result in served.results:
        for verdict in reference.verdicts(watchlist, result["prompt"], result["output"]):
            event = events[result["id"]][verdict.policy]
            if verdict.score is not None and abs(verdict.score - 1) < 1e-3:
                continue  # within rounding of the threshold either verdict is right
            assert (event["verdict"], event["first_token"], event["matched_tokens"]) == (
                verdict.outcome,
                verdict.first_token,
                verdict.matched_tokens,
            ), (result["id"], verdict, event)
            covered = event["coverage"]
            assert covered["tokens"] == covered["evaluated"] + sum(covered["skipped"].values())
            checked += 1
    return checked


class Row(NamedTuple):
    """One family's row in docs/parity.md."""

    family: str
    served_by: str
    block: str
    mode: str
    difference: float
    verdicts: int


def measure(family: str, folder: Path) -> Row:
    """Serve mixed batches and compare every token of every request with the reference."""
    guarded = models.make_guarded(folder, family)
    settings = guarded.settings(events=str(folder / "events.jsonl"))
    with_probes = {**settings, "policies": str(probes.add(guarded))}
    engine = {
        "model": str(guarded.model),
        "max_num_seqs": 8,
        "enforce_eager": family not in CORE,
        "additional_config": {"saeguard": with_probes},
        **ENGINE.get(family, {}),
    }
    prompts = engines.random_prompts(16, seed=3, longest=60)
    served = engines.serve(folder / "run", engine, [engines.requests(prompts)])
    assert served.left == 0
    assert probes.check_against_scan(served, guarded, with_probes) > 80
    difference = compare(probes.of_latents(served, with_probes), guarded, settings)
    assert difference < TOLERANCE, f"differs by {difference:.1e} of the largest activation"
    transformers = "Using Transformers modeling backend" in served.log
    return Row(
        family,
        "Transformers' blocks" if transformers else "vLLM's own",
        served.blocks[0],
        "eager" if engine["enforce_eager"] else "compiled",
        difference,
        check_verdicts(served, guarded, settings),
    )


@pytest.mark.parametrize(
    "family",
    [pytest.param(f, marks=() if f in CORE else pytest.mark.slow) for f in models.FAMILIES],
)
def test_activations_are_those_of_transformers_and_saelens(family: str, tmp_path: Path) -> None:
    """In mixed batches, for every token of every request; so are the verdicts."""
    row = measure(family, tmp_path)
    print(f"parity {row}")
    assert row.verdicts > 80


def expected_shares(
    reference: engines.Reference, features: FeatureSet, tokens: list[int]
) -> dict[str, np.ndarray]:
    """Return each feature's share at each token, by Transformers, SAELens and one product."""
    x, latents = reference.residual(tokens), reference.latents(tokens)
    out = {}
    for name, feature in features.features.items():
        if feature.probe is None:
            value = sum(term.weight * latents[:, term.latent] for term in feature.detect)
        else:
            probe = load_file(feature.probe.path)
            weight, bias = (probe[f"{feature.probe.name}.{part}"] for part in ("weight", "bias"))
            value = (x @ weight + bias).detach().numpy()
        out[f"{features.id}/{name}"] = (value - feature.low) / (feature.high - feature.low)
    return out


def test_a_probe_a_group_and_a_latent(tmp_path: Path) -> None:
    """The fixture's features, one block before the last: shares, and the words that fire.

    What the model writes about a shell is flagged at the word; its twin without one is not.
    """
    guarded = save_project(tmp_path)
    settings = guarded.settings(events=str(tmp_path / "events.jsonl"))
    tokenizer: Any = AutoTokenizer.from_pretrained(guarded.model)
    chat = [{"role": "user", "content": "Ping a host."}]
    asked = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    careful = tokenizer.encode("Ping a host, safely:")
    secret = tokenizer.encode("The password is hunter2, safely:")
    written = engines.requests([asked, careful, secret], max_tokens=3)
    others = engines.requests(engines.random_prompts(12, seed=3, longest=60))
    served = engines.serve(
        tmp_path / "run",
        {
            "model": str(guarded.model),
            "max_num_seqs": 8,
            "additional_config": {"saeguard": settings},
        },
        [[*written, *others]],
    )
    features = load_feature_set(guarded.feature_sets / "fixture.yaml")
    reference = engines.Reference(guarded.model, guarded.sae, LAYER)
    watchlist = engines.compile_policies(settings)
    worst = 0.0
    for result in served.results:
        _, f = served.activations[result["id"]]
        got = watchlist.shares(f)
        shares = expected_shares(reference, features, [*result["prompt"], *result["output"]][:-1])
        assert sorted(shares) == sorted(watchlist.features)
        for column, name in enumerate(watchlist.features):
            worst = max(worst, float(np.abs(got[:, column] - shares[name]).max()))
    print(f"parity fixture: shares differ by {worst:.2e} at most")
    assert worst < TOLERANCE

    assert [tokenizer.decode(r["output"][:2]) for r in served.results[:3]] == [
        "os.system(cmd)", "subprocess.run(cmd)", "subprocess.run(cmd)",
    ]  # fmt: skip
    events = engines.events_by_request(tmp_path / "events.jsonl")
    told = [
        {
            policy: (event["verdict"], event["first_token"], event["matched_tokens"])
            for policy, event in events[result["id"]].items()
        }
        for result in served.results[:3]
    ]
    quiet = ("no_match", None, 0)
    hunter2 = secret.index(tokenizer.convert_tokens_to_ids("hunter2"))
    assert told == [
        {"unsafe-code.shell-command": ("match", len(asked), 1), "unsafe-code.exposure": quiet},
        {"unsafe-code.shell-command": quiet, "unsafe-code.exposure": quiet},
        {"unsafe-code.shell-command": quiet, "unsafe-code.exposure": ("match", hunter2, 1)},
    ]
    assert [r["saeguard"]["flagged"] for r in served.results[:3]] == [True, False, True]


def test_model_runner_v2_reads_the_same(tmp_path: Path) -> None:
    """Model Runner V2, which GPUs run, gives the same activations and verdicts."""
    guarded = models.make_guarded(tmp_path, "llama")
    settings = guarded.settings(events=str(tmp_path / "events.jsonl"))
    with_probes = {**settings, "policies": str(probes.add(guarded))}
    served = engines.serve(
        tmp_path / "run",
        {
            "model": str(guarded.model),
            "max_num_seqs": 4,
            "enforce_eager": True,
            "additional_config": {"saeguard": with_probes},
        },
        [engines.requests(engines.random_prompts(6, seed=4, longest=24), max_tokens=5)],
        v2=True,
    )
    assert "Using V2 Model Runner" in served.log
    assert probes.check_against_scan(served, guarded, with_probes) > 40
    assert compare(probes.of_latents(served, with_probes), guarded, settings) < TOLERANCE
    assert check_verdicts(served, guarded, settings) > 25
