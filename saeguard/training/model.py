"""Load the model that is read, from a folder or by its name on the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

import torch

from saeguard.hf.model import LanguageModel, load_model
from saeguard.training.errors import TrainingCannotRunError, TrainingError

FILES = ("*.json", "*.safetensors", "*.jinja", "tokenizer*", "*.model")


def model_folder(name: str) -> Path:
    """Return the folder of a model; a name on the Hugging Face hub is downloaded.

    Raises:
        TrainingCannotRunError: it is no folder, and the hub does not deliver it.
    """
    folder = Path(name)
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download  # noqa: PLC0415 - only for names
    from huggingface_hub.errors import HFValidationError  # noqa: PLC0415

    try:
        return Path(snapshot_download(name, allow_patterns=list(FILES)))
    except HFValidationError as error:
        raise TrainingError(f"--model: {name}: no such folder") from error
    except Exception as error:  # the hub's client raises what its transport raises
        raise TrainingCannotRunError(
            f"--model: {name}: no such folder here, and the Hugging Face hub does not deliver it: "
            f"{str(error).splitlines()[0]}"
        ) from error


def open_model(folder: Path, device: str, dtype: str | None = None) -> LanguageModel:
    """Load a model onto `device`.

    Args:
        folder: of the model.
        device: as torch names it.
        dtype: of its weights; None for float32 on a CPU and bfloat16 elsewhere.
    """
    lm = load_model(folder)
    chosen = dtype or ("float32" if device == "cpu" else "bfloat16")
    lm.model.to(device, getattr(torch, chosen))
    return lm


def choose_device(wanted: str) -> str:
    """Return the device for `auto`, or the one that is named.

    Raises:
        TrainingError: there is no such device.
    """
    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=wanted)
    except (RuntimeError, AssertionError) as error:
        why = str(error).splitlines()[0]
        raise TrainingError(f"--device: found {wanted!r}, which cannot be used: {why}") from error
    return wanted
