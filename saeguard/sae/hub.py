"""Find and download SAEs by name: a release and an id, or a repository of the Hugging Face hub.

Downloads go through `huggingface_hub`: resumed, kept in its cache, and with `HF_HUB_OFFLINE=1`
taken from there alone. What is served is compared with the digest in the feature set, so neither
the hub nor the cache has to be trusted.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from saeguard.sae.errors import DownloadError, SaeError

_COMMIT = re.compile(r"[0-9a-f]{40}")
_PLACES = {
    "layer": "[0-9]+",
    "n": "[0-9]+",
    "times": "[0-9]+",
    "l0": "[A-Za-z0-9_]+",  # `medium_seed_1` among them
}
"""Values that placeholders of the table may have."""


@dataclass(frozen=True, slots=True)
class HubRef:
    """The files of one SAE in a repository."""

    repo: str
    """`owner/name`."""
    folder: str
    """Within the repository; empty for its root."""
    files: tuple[str, ...]
    """Within the folder, the weights first."""
    revision: str
    """Commit, or a branch if nothing is pinned yet."""

    @property
    def pickled(self) -> bool:
        """Whether the weights have to be converted before they can be served."""
        return not self.files[0].endswith((".safetensors", ".npz"))

    @property
    def converted(self) -> Path:
        """The folder that `saeguard sae fetch` converts a pickle into."""
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        name = f"{self.folder}/{self.files[0]}".strip("/").replace("/", "--")
        return root / "saeguard" / "sae" / self.repo.replace("/", "--") / self.revision / name


def named(release: str, id_: str, revision: str | None) -> HubRef:
    """Return the repository and files of the SAE `id_` of a release.

    Raises:
        SaeError: the release or the id is not known; the message lists those that are.
    """
    entries = _releases()
    for entry in entries:
        found = _match(entry["release"], release)
        if found is None:
            continue
        parts = _match(entry["id"], id_, found)
        if parts is None:
            raise SaeError(
                f"release {release!r} has no SAE {id_!r}; its ids are {entry['id']!r}"
                + (". The `canonical` ids are SAELens' own: give the average_l0 they stand for"
                   if "canonical" in id_ else "")
            )  # fmt: skip
        return HubRef(
            repo=entry["repo"].format(**found),
            folder=entry["path"].format(**parts),
            files=tuple(name.format(**parts) for name in entry["files"]),
            revision=revision or "main",
        )
    known = ", ".join(entry["release"] for entry in entries)
    raise SaeError(f"release {release!r} is not known; known: {known}. Or give repo and folder")


def fetch(ref: HubRef) -> Path:
    """Return the folder on this machine that holds the files of `ref`, downloading what is missing.

    Of a pickled SAE it is the folder that `saeguard sae fetch` made; nothing is downloaded then.

    Raises:
        SaeError: the files cannot be downloaded; the message gives the remedy.
    """
    if ref.pickled:
        if ref.converted.is_dir():
            return ref.converted
        raise SaeError(
            f"{ref.repo}: {ref.files[0]} is a pickle, which is never read while serving; "
            "`saeguard sae fetch` with the same names downloads and converts it"
        )
    return download(ref).parents[ref.files[0].count("/")]


def download(ref: HubRef) -> Path:
    """Download the files of `ref` and return the path of the weights.

    Raises:
        DownloadError: the files cannot be downloaded; the message gives the remedy.
    """
    from huggingface_hub import hf_hub_download  # noqa: PLC0415 - a second, and rarely needed
    from huggingface_hub.errors import (  # noqa: PLC0415
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
    )

    paths = []
    for name in ref.files:
        file = f"{ref.folder}/{name}" if ref.folder else name
        try:
            paths.append(hf_hub_download(ref.repo, file, revision=ref.revision))
        except LocalEntryNotFoundError as error:
            raise DownloadError(
                f"{ref.repo}: {file} at {ref.revision} is not in the cache, and the hub cannot be "
                "reached (or HF_HUB_OFFLINE is set); run `saeguard sae fetch` where it can"
            ) from error
        except (HfHubHTTPError, HFValidationError, OSError) as error:
            lines = str(error).strip().splitlines()
            raise DownloadError(
                f"{ref.repo}: {file} at {ref.revision}: {lines[-1] if lines else error!r}; are the "
                "names right, and may this account read the repository (`hf auth login`)?"
            ) from error
    return Path(paths[0])


def commit_of(folder: Path) -> str | None:
    """Return the commit that a folder of the hub's cache holds; None for another folder."""
    return next((part for part in reversed(folder.parts) if _COMMIT.fullmatch(part)), None)


@cache
def _releases() -> list[dict[str, Any]]:
    file = Path(__file__).with_name("releases.yaml")
    entries: list[dict[str, Any]] = yaml.safe_load(file.read_text(encoding="utf-8"))
    return entries


def _match(
    pattern: str, text: str, known: Mapping[str, str] | None = None
) -> dict[str, str] | None:
    """Return the values of the placeholders of `pattern` in `text`; None if it does not fit."""
    known = dict(known or {})
    expression = ""
    for part in re.split(r"(\{\w+\})", pattern):
        name = part[1:-1]
        if not part.startswith("{"):
            expression += re.escape(part)
        elif name in known:
            expression += re.escape(known[name])
        else:
            expression += f"(?P<{name}>{_PLACES.get(name, '[A-Za-z0-9.]+')})"
    found = re.fullmatch(expression, text)
    return None if found is None else {**known, **found.groupdict()}
