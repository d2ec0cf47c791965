"""The training loop: it reads blocks of residuals, and writes checkpoints and an SAE.

A checkpoint is a folder that gets its name once it is whole. It holds the state of SAELens' trainer
and two more numbers: the position of the block that is being read, and how many of its rows were
used. A run that was cut off computes this block again and continues with the next row.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from saeguard.training.activations import Block, Counts, Source
from saeguard.training.errors import TrainingError
from saeguard.training.saelens import load_state, make_trainer, save_state
from saeguard.training.settings import Settings

DATA = "data.json"
SAVE_SECONDS = 60.0
SHOWN_EVERY = 10
"""Steps between two measurements of L0."""


@dataclass(frozen=True, slots=True)
class Progress:
    """The progress of a run."""

    step: int
    steps: int
    tokens: int
    loss: float
    l0: float
    dead: float
    """Share of the latents."""
    tokens_per_second: float


@dataclass(slots=True)
class Position:
    """The position of a run in its data."""

    block: int = 0
    used: int = 0
    """Rows of the block that were trained on."""
    counts: Counts = Counts()  # noqa: RUF009 - immutable
    """Of the blocks before this one."""


@dataclass(frozen=True, slots=True)
class Trained:
    """The result of a run that has ended."""

    trainer: Any
    """SAELens' `SAETrainer`."""
    position: Position
    counts: Counts
    """Of all blocks that were read."""
    dead: int
    """Latents that have not fired for `Settings.dead_after` steps."""


def train(
    settings: Settings,
    source: Source,
    folder: Path,
    *,
    device: str = "cpu",
    save_every: float = SAVE_SECONDS,
    report: Callable[[Progress], None] = lambda _progress: None,
) -> Trained:
    """Train, from the newest checkpoint in `folder` if there is one.

    Args:
        settings: of the run.
        source: of residuals.
        folder: for checkpoints.
        device: to train on.
        save_every: seconds between two checkpoints: what a run that is cut off loses.
        report: called every few steps.
    """
    first = source.block(0)
    scale = settings.d_in**0.5 / float(first.x.norm(dim=1).mean())
    trainer = make_trainer(settings, device, first.x.mean(0), scale)
    position = restore(trainer, folder)
    block = first if position.block == 0 else source.block(position.block)
    order = _order(settings, position, block)
    began, saved = time.monotonic(), time.monotonic()
    done_before = trainer.n_training_steps
    while trainer.n_training_steps < settings.steps:
        while position.used + settings.batch > len(order):
            counts = position.counts.plus(block.counts)
            position = Position(block.following, 0, counts)
            block = source.block(position.block)
            order = _order(settings, position, block)
            if len(order) < settings.batch:
                raise TrainingError(
                    f"--batch: found {settings.batch}, but a block holds only {len(order)} rows; "
                    "give a smaller --batch, or a larger --buffer"
                )
        rows = order[position.used : position.used + settings.batch]
        out = trainer.step(block.x[rows])
        trainer.n_training_steps += 1
        position.used += settings.batch
        now = time.monotonic()
        step = trainer.n_training_steps
        if step % SHOWN_EVERY == 0 or step == settings.steps:
            speed = (step - done_before) * settings.batch / max(now - began, 1e-9)
            report(_progress(settings, trainer, out, speed))
        if now - saved >= save_every or step == settings.steps:
            checkpoint(trainer, position, folder)
            saved = now
    counts = position.counts.plus(block.counts)
    return Trained(trainer, position, counts, int(trainer.dead_neurons.sum()))


def checkpoint(trainer: Any, position: Position, folder: Path) -> None:
    """Write a checkpoint, and remove those before it."""
    name = f"state-{trainer.n_training_steps:08}"
    part = folder / f".{name}.part"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    save_state(trainer, part)
    (part / DATA).write_text(
        json.dumps({"block": position.block, "used": position.used, "counts": position.counts}),
        encoding="utf-8",
    )
    for path in part.iterdir():
        _to_disk(path)
    if not (folder / name).exists():
        part.rename(folder / name)
    for old in _checkpoints(folder)[:-1]:
        shutil.rmtree(old)
    for stale in folder.glob(".state-*.part"):
        shutil.rmtree(stale)


def restore(trainer: Any, folder: Path) -> Position:
    """Load the newest checkpoint if there is one, and return where in the data it is."""
    found = _checkpoints(folder)
    if not found:
        return Position()
    load_state(trainer, found[-1])
    data = json.loads((found[-1] / DATA).read_text(encoding="utf-8"))
    return Position(data["block"], data["used"], Counts(*data["counts"]))


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(folder.glob("state-*"))


def _to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def _order(settings: Settings, position: Position, block: Block) -> torch.Tensor:
    """Return the order in which a block's rows are used, the same whenever it is read."""
    seed = settings.seed * 1_000_003 + position.block
    return torch.randperm(len(block.x), generator=torch.Generator().manual_seed(seed))


def _progress(settings: Settings, trainer: Any, out: Any, speed: float) -> Progress:
    return Progress(
        step=trainer.n_training_steps,
        steps=settings.steps,
        tokens=trainer.n_training_samples,
        loss=float(out.losses["mse_loss"].detach()) / settings.d_in,
        l0=float(out.feature_acts.bool().float().sum()) / settings.batch,
        dead=float(trainer.dead_neurons.float().mean()),
        tokens_per_second=speed,
    )
