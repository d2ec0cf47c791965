"""Texts of our own, the model's residuals on them, and what the shipped set makes of these.

`python -m tests.shipped.sample --model models/SmolLM2-135M-Instruct` records the residuals and the
verdicts again; it is to be run when the shipped set or its policies change. The test runs without
the model: from the residuals it recomputes every value, share and verdict.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file, save_file

from saeguard.features.calibrate import shares, values
from saeguard.features.corpus import Corpus, peaks
from saeguard.features.files import read_feature_set_file
from saeguard.features.load import load_feature_set
from saeguard.features.reading import read_words
from saeguard.features.types import FeatureSet
from saeguard.policy.load import load_policies
from saeguard.policy.types import Policy
from saeguard.policy_tools.explanation import judge_recorded
from saeguard.policy_tools.recording import Recording, definition

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]
TEXTS, RESIDUALS, EXPECTED = (
    HERE / name for name in ("sample.jsonl", "residuals.safetensors", "expected.json")
)
SET = ROOT / "feature_sets" / "smollm2.yaml"
LAYER = 16


def policies() -> list[Policy]:
    """Return the shipped policies of the shipped set."""
    return [p for p in load_policies(ROOT / "policies") if p.feature_set == SET.stem]


def ids() -> list[str]:
    """Return the names of the texts."""
    return [json.loads(line)["id"] for line in TEXTS.read_text("utf-8").splitlines()]


def read_residuals(features: FeatureSet) -> Corpus:
    """Return the recorded residuals, with the tokens that the set leaves out marked."""
    of = load_file(RESIDUALS)
    texts = len(of["lengths"])
    corpus = Corpus(
        x=torch.from_numpy(of["x"]).float(),
        layers=(LAYER,),
        tokens=of["tokens"],
        lengths=of["lengths"],
        output=of["output"],
        special=np.isin(of["tokens"], np.array(features.exclude_tokens)),
        label=np.zeros(texts, bool),
        kind=np.full(texts, ""),
        template=np.array(ids()),
    )
    return corpus.without_massive(features.max_norm)


def found(features: FeatureSet, corpus: Corpus) -> dict[str, Any]:
    """Return by text each feature's share and the policies that match, by the rules that serve."""
    names = list(features.features)
    of = [values(features, features.features[name], corpus) for name in names]
    document = read_feature_set_file(features.path)
    excluded = np.isin(corpus.tokens, np.array(features.exclude_tokens))
    prompt = np.bincount(corpus.owner, weights=~corpus.output, minlength=len(corpus))
    recording = Recording(
        path=RESIDUALS,
        model=features.model.name,
        ids=tuple(ids()),
        lengths=corpus.lengths,
        prompt_tokens=prompt.astype(np.int64),
        evaluable=~excluded,
        massive=corpus.special & ~excluded,
        definitions={f"{features.id}/{n}": definition(document, n) for n in names},
        values=np.stack(of, axis=1).astype(np.float32),
    )
    verdicts = judge_recorded(policies(), {features.id: document}, recording, range(len(corpus)))
    matched = [[v.policy for v in some if v.outcome == "match"] for some in verdicts]
    return {
        name: {"matches": matched[i], "shares": text_shares(features, corpus, of, i)}
        for i, name in enumerate(ids())
    }


def text_shares(
    features: FeatureSet, corpus: Corpus, of: list[np.ndarray], text: int
) -> Mapping[str, float]:
    """Return a text's share of each feature that has a token to read, by the feature's reading."""
    mask = np.arange(len(corpus)) == text
    out = {}
    for feature, value in zip(features.features.values(), of, strict=True):
        alone = corpus.select(mask)
        alone = alone.scoped(feature.evidence["scope"])
        if len(alone):
            own = shares(feature, value[corpus.owner == text])
            reading = read_words(feature.evidence["window"])
            out[feature.id] = round(float(peaks(alone, own, reading)[0]), 4)
    return out


def main() -> None:
    """Record the residuals with the model, and write what the set makes of them."""
    from saeguard.hf.corpus import make_corpus
    from saeguard.hf.model import load_model, load_tokenizer
    from saeguard.hf.texts import read_texts

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    folder = parser.parse_args().model
    tokenizer = load_tokenizer(folder)
    lm = load_model(folder, tokenizer)
    corpus = make_corpus(lm, read_texts(TEXTS, tokenizer), (LAYER,), lm.special_tokens)
    save_file(
        {
            "x": corpus.x.numpy().astype(np.float16),
            "tokens": corpus.tokens,
            "lengths": corpus.lengths,
            "output": corpus.output,
        },
        RESIDUALS,
    )
    features = load_feature_set(SET)
    rows = found(features, read_residuals(features))
    EXPECTED.write_text(json.dumps(rows, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
