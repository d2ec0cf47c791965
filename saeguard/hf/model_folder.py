"""Find the folder of a model: one on this machine, or one that the Hugging Face hub delivers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from saeguard.errors import CannotRunError, InputError

FILES = ("*.json", "*.safetensors", "*.jinja", "tokenizer*", "*.model")
"""Of a repository, what is downloaded: no pickles, no weights of other frameworks."""
NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
"""A model's name on the hub, `owner/name`."""
REMEDY = "give the folder of a Hugging Face model, or its name on the hub (owner/name)"


class ModelFolderError(InputError):
    """A model is neither a folder here nor known to the hub."""


class HubError(CannotRunError):
    """The hub cannot be reached, and its cache lacks the model."""


def model_folder(name: str | Path, option: str = "--model", files: Sequence[str] = FILES) -> Path:
    """Return the folder of a model; a name on the hub is downloaded into the hub's cache.

    With `HF_HUB_OFFLINE=1` the model comes from that cache alone, as it does if the hub cannot be
    reached.

    Args:
        name: a folder, or `owner/name`.
        option: that was given the name, for the message; empty for an argument.
        files: what to download, as patterns.

    Raises:
        ModelFolderError: the folder is no model's, or the hub knows no such model.
        HubError: the hub cannot be reached, and its cache lacks the model.
    """
    folder, at = Path(name), f"{option}: {name}" if option else f"{name}"
    try:
        if folder.is_dir():
            if not (folder / "config.json").is_file():
                raise ModelFolderError(f"{at}: the folder holds no config.json; {REMEDY}")
            return folder
        if folder.exists():
            raise ModelFolderError(f"{at}: expected a folder, found a file; {REMEDY}")
    except OSError as error:  # a name that is too long
        raise ModelFolderError(f"{at}: {error.strerror}; {REMEDY}") from error
    if not NAME.fullmatch(str(name)):
        raise ModelFolderError(f"{at}: there is no such folder; {REMEDY}")
    return _downloaded(str(name), at, files)


def _downloaded(name: str, at: str, files: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download  # noqa: PLC0415 - a second, and only for names
    from huggingface_hub.errors import (  # noqa: PLC0415
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
    )

    try:
        folder = Path(snapshot_download(name, allow_patterns=list(files)))
    except GatedRepoError as error:
        raise HubError(
            f"{at}: the hub gives this model to accounts that its owner has accepted; ask there, "
            "then `hf auth login`"
        ) from error
    except (HFValidationError, RepositoryNotFoundError) as error:
        raise ModelFolderError(
            f"{at}: there is no such folder, and the hub has no model of this name (for this "
            f"account: `hf auth login`); {REMEDY}"
        ) from error
    except Exception as error:  # the hub's client raises what its transport raises
        lines = str(error).strip().splitlines()
        raise HubError(
            f"{at}: there is no such folder, and the hub does not deliver a model of this name: "
            f"{lines[0] if lines else type(error).__name__}; {REMEDY}"
        ) from error
    if not (folder / "config.json").is_file():
        raise ModelFolderError(f"{at}: the hub's repository holds no config.json; {REMEDY}")
    return folder
