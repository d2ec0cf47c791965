"""A small random model, an SAE on it, a corpus, and its index."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

from saeguard.features.load import load_feature_set
from saeguard.features.types import FeatureSet
from saeguard.hf.model import LanguageModel, load_model
from saeguard.hf.text_files import TextFile, check_file
from saeguard.latents.build import build_index
from saeguard.sae import SaeInfo
from tests import guarded
from tests.tiny import D, save_model

TEXTS = 60


@dataclass(frozen=True)
class Made:
    """What the tests of an index need."""

    root: Path
    lm: LanguageModel
    features: FeatureSet
    info: SaeInfo
    corpus: Path
    index: Path

    @property
    def files(self) -> list[TextFile]:
        """The corpus, checked."""
        return [check_file(self.corpus, self.lm.tokenizer)]


def write_corpus(path: Path, texts: int = TEXTS, seed: int = 0) -> Path:
    """Write texts of letters, some of them with a prompt."""
    rng = random.Random(seed)  # noqa: S311 - seeded texts, not secrets
    rows = []
    for i in range(texts):
        words = "".join(rng.choices("abcdefgh #<&", k=rng.randint(3, 90)))
        own = {"text": words} if i % 3 else {"prompt": "Say: ", "completion": words}
        rows.append({"id": f"t{i}", **own, "label": i % 2})
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def make(root: Path) -> Made:
    """Make everything, with the index in three chunks or more."""
    lm = load_model(save_model(root / "model"))
    features = load_feature_set(guarded.feature_set(root / "feature_sets", D).path)
    assert features.sae is not None
    info = features.sae.inspect()
    made = Made(
        root, lm, features, info, write_corpus(root / "corpus.jsonl"), root / "index.duckdb"
    )
    build_index(lm, info, made.files, made.index, features=features, chunk_tokens=700)
    return made
