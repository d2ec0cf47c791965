"""The settings of a training run; the same settings give the same SAE."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from saeguard.atomic_files import write_atomically
from saeguard.training.errors import TrainingError

Kind = Literal["batchtopk", "jumprelu"]
RUN = "run.json"


@dataclass(frozen=True, slots=True)
class Settings:
    """The settings of the training of one SAE."""

    model: str
    """Folder or name of the model, as given."""
    layer: int
    d_in: int
    latents: int
    tokens: int
    """Number of tokens to train on; rounded down to whole batches."""
    kind: Kind = "batchtopk"
    k: int = 32
    """Latents that fire on a token: the mean that BatchTopK keeps, or JumpReLU aims at."""
    batch: int = 2048
    lr: float = 5e-4
    seed: int = 0
    texts_sha256: Mapping[str, str] | None = None
    context: int = 512
    """Tokens at which texts are cut."""
    buffer: int = 65536
    """Tokens that are shuffled together."""
    recorded: str = ""
    """Type of the recorded residuals; empty if they are streamed from the model."""
    model_dtype: str = ""
    """Type of the model's weights; empty for float32 on a CPU and bfloat16 elsewhere."""

    @property
    def steps(self) -> int:
        """Number of steps of the run."""
        return self.tokens // self.batch

    @property
    def dead_after(self) -> int:
        """Steps without firing after which a latent is dead: a tenth of a run, a thousand at most.

        A latent that never fires gets no gradient; the auxiliary loss then lets it explain what the
        others leave over.
        """
        return max(1, min(1000, self.steps // 10))

    def check(self) -> None:
        """Refuse settings with which no run is possible.

        Raises:
            TrainingError: names the option, what was found and what is allowed.
        """
        if self.steps < 1:
            raise TrainingError(
                f"--tokens: found {self.tokens}, expected at least one batch of {self.batch}"
            )
        if self.buffer < 2 * self.batch:
            raise TrainingError(
                f"--buffer: found {self.buffer}, expected two batches or more, {2 * self.batch}"
            )
        if not 0 < self.k <= self.latents:
            raise TrainingError(f"--k: found {self.k}, expected 1 to {self.latents}, the latents")


def keep_settings(folder: Path, settings: Settings, *, resume: bool) -> dict[str, Any]:
    """Write the settings of a new run, or compare with those of the run that is there.

    Returns:
        The other content of `run.json`.

    Raises:
        TrainingError: there is a run and `resume` is false, or its settings are others.
    """
    path = folder / RUN
    wanted = asdict(settings)
    if not path.exists():
        write_atomically(path, json.dumps({"settings": wanted}, indent=1) + "\n")
        return {}
    if not resume:
        raise TrainingError(
            f"{folder.parent}: a run is there; continue it with --resume, or remove {folder}"
        )
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        begun = found.pop("settings")
    except (ValueError, KeyError, AttributeError) as error:
        raise TrainingError(
            f"{path}: not the settings of a run: {error}; remove {folder}"
        ) from None
    for name, value in wanted.items():
        if begun.get(name) != value:
            raise TrainingError(
                f"{path}: settings.{name}: found {value!r}, expected {begun.get(name)!r}, as the "
                "run began; give the same to continue, or another --out"
            )
    return found


def add_to_run(folder: Path, **facts: Any) -> None:
    """Add facts that are measured once per run to `run.json`."""
    path = folder / RUN
    found = json.loads(path.read_text(encoding="utf-8"))
    write_atomically(path, json.dumps(found | facts, indent=1) + "\n")
