"""Recorded feature values of some texts, `saeguard.recording/v1`: one safetensors file.

The values are recorded once, so that policies can be judged on them again and again without model,
SAE or accelerator. It holds the *value* of each feature at each token,
before its calibrated range is applied: thresholds, windows, conditions and ranges may change
after the recording, what a feature is made of may not. It holds no text unless that was asked
for when it was made.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from saeguard.atomic_files import write_atomically
from saeguard.errors import InputError
from saeguard.features.schema import FeatureSetFile, layers_of, layers_read
from saeguard.features.value import share
from saeguard.guard.scopes import BY_ROLE, ROLES, SCOPES
from saeguard.policy.types import Policy

SCHEMA = "saeguard.recording/v1"
UNTOLD = "it was recorded without roles; record the texts again with `saeguard policy record`"


class RecordingError(InputError):
    """A recording cannot be read, or does not hold what a policy needs."""


@dataclass(frozen=True, slots=True)
class Recording:
    """The values of some features at every token of some texts; T tokens in all."""

    path: Path
    model: str
    """Name of the model that read the texts."""
    ids: tuple[str, ...]
    """One per text."""
    lengths: np.ndarray
    """[texts] int64: tokens of each text."""
    prompt_tokens: np.ndarray
    """[texts] int64: how many of them are the prompt."""
    evaluable: np.ndarray
    """[T] bool: false at BOS and the like, which the feature sets leave out."""
    definitions: Mapping[str, str]
    """`set/feature` of each column -> digest of what the feature was made of."""
    values: np.ndarray
    """[T, columns] float32."""
    roles: np.ndarray | None = None
    """[T] uint8, the role of each token of a prompt: an index into `saeguard.guard.scopes.ROLES`.
    None if the model's chat template does not mark roles, or the file is older."""
    no_roles: str = UNTOLD
    """Why there are none."""
    pieces: tuple[str, ...] | None = None
    """[T] the text of each token, None if the recording was made without text."""
    massive: np.ndarray | None = None
    """[T] bool: attention sinks by the bounds of the feature sets; None in older recordings."""

    def span(self, text: int) -> slice:
        """Return the slice of a text's tokens among all tokens."""
        start = int(self.lengths[:text].sum())
        return slice(start, start + int(self.lengths[text]))

    def roles_of_prompt(self, text: int, policy: Policy) -> np.ndarray:
        """Return the role of each token of a text's prompt.

        Args:
            text: its index.
            policy: that asks; its scope is a role.

        Raises:
            RecordingError: roles were not recorded; names the policy, the reason, and what is
                allowed.
        """
        if self.roles is None:
            allowed = ", ".join(scope for scope in SCOPES if scope not in BY_ROLE)
            raise RecordingError(
                f"{policy.path}: scope: {policy.scope}, but {self.path} does not hold the roles "
                f"of a prompt's tokens: {self.no_roles}; allowed here: {allowed}"
            )
        start = self.span(text).start
        return self.roles[start : start + int(self.prompt_tokens[text])]

    def text(self, id_: str) -> int:
        """Return the index of the text named `id_`.

        Raises:
            RecordingError: the recording holds no such text.
        """
        if id_ not in self.ids:
            known = ", ".join(self.ids[:10]) + (", ..." if len(self.ids) > 10 else "")  # noqa: PLR2004
            raise RecordingError(f"{self.path}: there is no text {id_!r}; there are: {known}")
        return self.ids.index(id_)

    def shares(self, document: FeatureSetFile, feature: str, here: slice) -> np.ndarray:
        """Return the feature's share of its range at the tokens `here`, float32.

        Args:
            document: the feature set as it is today.
            feature: one of its features.
            here: which of the tokens.

        Raises:
            RecordingError: it was not recorded, or was made of something else then.
        """
        name = f"{document.id}/{feature}"
        if name not in self.definitions:
            known = ", ".join(sorted(self.definitions))
            raise RecordingError(
                f"{self.path}: the feature {name!r} was not recorded; recorded are: {known}; "
                "record the texts again with `saeguard policy record`"
            )
        if self.definitions[name] != definition(document, feature):
            raise RecordingError(
                f"{self.path}: the feature {name!r} was made of other latents, or of another "
                "checkpoint, when this was recorded; record the texts again with "
                "`saeguard policy record`"
            )
        part = document.features[feature]
        column = list(self.definitions).index(name)
        return share(self.values[here, column], part.low, part.high)


def definition(document: FeatureSetFile, feature: str) -> str:
    """Return the digest of what a feature is made of; its range and threshold do not matter."""
    part = document.features[feature]
    sae = document.sae
    made_of: dict[str, Any] = {}
    if sae is not None:
        made_of = {"sae": sae.sha256, "layer": sae.layer}
    if part.probe is not None:
        made_of["probe"] = [part.probe.sha256, part.probe.name]
        layers = layers_read(part.probe, sae)
        if sae is None or layers != (sae.layer,):  # other recordings keep their digest
            made_of["layers"] = list(layers)
    elif sae is not None:
        made_of["detect"] = sorted((part.detect or {}).items())
        measured = sae.topk_measured
        if measured is not None:  # thresholds in place of ranks give other values
            made_of["topk"] = [
                [n, measured.latents[n].threshold] for n in sorted(part.detect or {})
            ]
    bounds = {
        n: x for n, x in (document.max_norm or {}).items() if n in layers_of(document, feature)
    }
    if bounds:
        made_of["max_norm"] = sorted(bounds.items())
    return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()


def write_recording(recording: Recording, path: Path) -> None:
    """Write the recording to `path` by rename."""
    kept = {
        "schema": SCHEMA,
        "model": recording.model,
        "ids": json.dumps(recording.ids),
        "definitions": json.dumps(dict(recording.definitions)),
    }
    if recording.pieces is not None:
        kept["pieces"] = json.dumps(recording.pieces)
    roles = {} if recording.roles is None else {"roles": recording.roles.astype(np.uint8)}
    if recording.roles is None:
        kept["no_roles"] = recording.no_roles
    tensors = {
        **roles,
        "lengths": recording.lengths.astype(np.int64),
        "prompt_tokens": recording.prompt_tokens.astype(np.int64),
        "evaluable": recording.evaluable.astype(bool),
        "values": np.ascontiguousarray(recording.values, np.float32),
        **({} if recording.massive is None else {"massive": recording.massive.astype(bool)}),
    }
    write_atomically(path, save(tensors, metadata=kept))


def read_recording(path: Path) -> Recording:
    """Read a recording.

    Raises:
        RecordingError: the file is no recording, or its parts do not fit together.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            kept: Mapping[str, str] = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        found = kept.get("schema", "no schema")
        if found == SCHEMA:
            return _read(path, kept, tensors)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise RecordingError(f"{path}: this is no recording: {error}") from error
    raise RecordingError(
        f"{path}: found {found}, expected {SCHEMA}; make one with `saeguard policy record`"
    )


def _read(path: Path, kept: Mapping[str, str], tensors: Mapping[str, np.ndarray]) -> Recording:
    recording = Recording(
        path=path,
        model=kept["model"],
        ids=tuple(json.loads(kept["ids"])),
        lengths=tensors["lengths"],
        prompt_tokens=tensors["prompt_tokens"],
        evaluable=tensors["evaluable"],
        definitions=json.loads(kept["definitions"]),
        values=tensors["values"],
        massive=tensors.get("massive"),
        roles=tensors.get("roles"),
        no_roles=kept.get("no_roles", UNTOLD),
        pieces=tuple(json.loads(kept["pieces"])) if "pieces" in kept else None,
    )
    _fits(recording)
    return recording


def _fits(recording: Recording) -> None:
    texts, tokens = len(recording.ids), int(recording.lengths.sum())
    wanted: Sequence[tuple[str, tuple[int, ...], tuple[int, ...]]] = (
        ("lengths", recording.lengths.shape, (texts,)),
        ("prompt_tokens", recording.prompt_tokens.shape, (texts,)),
        ("evaluable", recording.evaluable.shape, (tokens,)),
        (
            "roles",
            () if recording.roles is None else recording.roles.shape,
            () if recording.roles is None else (tokens,),
        ),
        ("values", recording.values.shape, (tokens, len(recording.definitions))),
        (
            "massive",
            () if recording.massive is None else recording.massive.shape,
            () if recording.massive is None else (tokens,),
        ),
        ("pieces", (len(recording.pieces or ()),), (tokens if recording.pieces else 0,)),
    )
    for name, found, expected in wanted:
        if tuple(found) != expected:
            raise ValueError(f"{name}: found shape {list(found)}, expected {list(expected)}")
    if recording.roles is not None and (recording.roles >= len(ROLES)).any():
        raise ValueError(f"a token's role is {recording.roles.max()}, {len(ROLES) - 1} is the last")
    if (recording.lengths < 1).any() or (recording.prompt_tokens > recording.lengths).any():
        raise ValueError("a text is empty, or its prompt is longer than the text")
    if len(set(recording.ids)) != texts:
        raise ValueError("two texts have one id")
