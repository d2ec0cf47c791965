"""Load the model that is read."""

from __future__ import annotations

from pathlib import Path

from saeguard.hf.model import Dtype, LanguageModel, load_model


def open_model(folder: Path, device: str, dtype: Dtype | None = None) -> LanguageModel:
    """Load a model onto `device`.

    Args:
        folder: of the model.
        device: as torch names it.
        dtype: of its weights; None for float32 on a CPU and bfloat16 elsewhere.
    """
    return load_model(
        folder, dtype=dtype or ("float32" if device == "cpu" else "bfloat16"), device=device
    )
