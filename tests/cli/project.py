"""A small project of policies, feature set and recording, and the command run in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest

from saeguard.cli import main
from saeguard.features.files import read_feature_set_file
from saeguard.policy_tools.recording import Recording, definition, write_recording
from tests.policy.example import GOOD

FEATURES = f"""\
schema: saeguard.features/v1
id: demo/unsafe-code
title: Unsafe code
model: {{name: tiny, hidden_size: 8, num_layers: 2, sha256: {"c" * 64}}}
sae: {{path: nowhere, sha256: {"a" * 64}, config_sha256: {"b" * 64}, layer: 1, d_in: 8, d_sae: 16}}
features:
  shell_exec:
    title: Shell
    behaviour: Writes shell commands
    detect: {{3: 1.0}}
    low: 0.0
    high: 2.0
    threshold: 0.5
  string_built:
    title: Strings
    behaviour: Builds strings
    detect: {{4: 1.0}}
    low: 0.0
    high: 2.0
    threshold: 0.5
"""
RATE = "{rate: 0.9, interval: [0.8, 0.95], hits: 90, tokens: 100}"
BY_THRESHOLD = FEATURES.replace(
    "d_sae: 16}",
    f"""d_sae: 16, topk: approximate, topk_measured: {{
  k: 4, sha256: {"a" * 64}, texts_sha256: {"b" * 64}, texts: 10, tokens: 1000, latents: {{
    3: {{threshold: 0.5, precision: {RATE}, recall: {RATE}}},
    4: {{threshold: 0.5, precision: {RATE}, recall: {RATE}}}}}}}}}""",
)
"""The same set over a TopK SAE whose latents are read by thresholds in place of ranks."""
SET = Path("feature_sets/demo/unsafe-code.yaml")
BOTH = GOOD.replace("2027", "2999")
PLAIN = BOTH.replace("for: 3 of 8 tokens\nkeep: 16 tokens\n", "")
ONE = PLAIN.replace("  untrusted: {feature: string_built, above: 0.4}\n", "").replace(
    "condition: shell and untrusted", "condition: shell"
)
"""Holds where `shell_exec` is above 0.6 at one token."""


def lay_out(folder: Path, policy: str = BOTH) -> None:
    """Write one policy and its feature set below `folder`."""
    (folder / "policies").mkdir()
    (folder / "policies" / "p.yaml").write_text(policy)
    (folder / SET).parent.mkdir(parents=True)
    (folder / SET).write_text(FEATURES)


def run(*arguments: str) -> int:
    """Run the command and return its exit code."""
    with pytest.raises(SystemExit) as exited:
        main(arguments)
    assert isinstance(exited.value.code, int)
    return exited.value.code


def plain(text: str) -> str:
    """Return what a person reads of a message that was set in a frame and wrapped."""
    return " ".join(text.replace("\u2502", " ").split())


def record(
    path: Path,
    texts: Mapping[str, Sequence[Sequence[float]]],
    *,
    spelt: bool = False,
    of: Path = SET,
) -> Recording:
    """Write a recording of texts whose first two tokens are the prompt.

    Args:
        path: where to.
        texts: by id, the shares of `shell_exec` and of `string_built` at each token.
        spelt: keep a spelling of each token.
        of: the feature set's file.
    """
    document = read_feature_set_file(of)
    shares = np.concatenate([np.array(text, np.float32).T for text in texts.values()])
    lengths = np.array([len(text[0]) for text in texts.values()])
    recording = Recording(
        path=path,
        model="tiny",
        ids=tuple(texts),
        lengths=lengths,
        prompt_tokens=np.full(len(texts), 2),
        evaluable=np.concatenate([np.arange(n) > 0 for n in lengths]),
        definitions={
            f"{document.id}/{name}": definition(document, name) for name in document.features
        },
        values=shares * 2,  # the range of both features is 0 to 2
        pieces=tuple(f" t{i}" for n in lengths for i in range(n)) if spelt else None,
    )
    write_recording(recording, path)
    return recording
