"""One run from texts to a checkpoint with its card."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from saeguard.hf.model import LanguageModel
from saeguard.sae import inspect
from saeguard.training.activations import Counts, Source, Streamed, norm_bound
from saeguard.training.card import CARD, write_card
from saeguard.training.errors import TrainingError
from saeguard.training.evaluate import figures, fit, open_autoencoder
from saeguard.training.recording import DTYPES, open_recording, record, recorded_bound
from saeguard.training.saelens import WEIGHTS, save_result
from saeguard.training.settings import Settings, add_to_run, keep_settings
from saeguard.training.texts import Chunks
from saeguard.training.train import SAVE_SECONDS, Progress, Trained, train

STATE = "training"
"""Folder of a run's checkpoints, below that of the result; removed when the run has ended."""


@dataclass(frozen=True, slots=True)
class Options:
    """How a run is carried out; no option changes the SAE by more than rounding."""

    out: Path
    resume: bool = False
    recording: Path | None = None
    dtype: str = "float32"
    """Of the saved matrices."""
    device: str = "cpu"
    save_every: float = SAVE_SECONDS


@dataclass(frozen=True, slots=True)
class Shown:
    """The callbacks that a run reports its progress to."""

    stage: Callable[[str], None] = lambda _stage: None
    recorded: Callable[[int], None] = lambda _tokens: None
    trained: Callable[[Progress], None] = lambda _progress: None


def is_trained(out: Path) -> bool:
    """Return whether a run that ended left its result in `out`."""
    return (out / WEIGHTS).exists() and (out / CARD).exists() and not (out / STATE).exists()


def run(
    settings: Settings, options: Options, lm: LanguageModel, chunks: Chunks, shown: Shown
) -> dict[str, Any]:
    """Record if asked to, train, save, and return the training section of the card.

    Raises:
        TrainingError: settings, folders or texts do not fit each other.
    """
    settings.check()
    if not 0 <= settings.layer < len(lm.layers):
        raise TrainingError(
            f"--layer: found {settings.layer}, expected 0 to {len(lm.layers) - 1} for {lm.path}"
        )
    state = options.out / STATE
    facts = keep_settings(state, settings, resume=options.resume)
    shown.stage("norms")
    known = facts.get("bound")
    if known is None and options.recording is not None:
        known = recorded_bound(options.recording)
    if known is None:
        known = norm_bound(lm, settings.layer, chunks, settings.seed)
    add_to_run(state, bound=known)
    streamed = Streamed(lm, settings.layer, chunks, settings.seed, settings.buffer, known)
    source: Source = streamed
    if options.recording is not None:
        shown.stage("record")
        source = _recorded(settings, options, streamed, shown)
    shown.stage("train")
    done = train(
        settings, source, state, device=options.device, save_every=options.save_every,
        report=shown.trained,
    )  # fmt: skip
    shown.stage("save")
    return _finish(settings, options, chunks, source, done, known)


def _recorded(settings: Settings, options: Options, streamed: Streamed, shown: Shown) -> Source:
    """Return the recording, made or continued as far as the run needs it."""
    assert options.recording is not None
    of = {
        name: value
        for name, value in asdict(settings).items()
        if name in {"model", "model_dtype", "layer", "d_in", "texts_sha256", "context", "seed"}
    } | {"rows": settings.buffer}
    record(
        streamed, options.recording, of, settings.tokens, dtype=settings.recorded,
        report=shown.recorded,
    )  # fmt: skip
    return open_recording(options.recording, of, settings.seed)


def _finish(
    settings: Settings,
    options: Options,
    chunks: Chunks,
    source: Source,
    done: Trained,
    bound: float,
) -> dict[str, Any]:
    """Save the SAE and its card, and remove the checkpoints."""
    part = options.out / STATE / "result"
    shutil.rmtree(part, ignore_errors=True)
    save_result(done.trainer, part, DTYPES[options.dtype])
    # Measured on what was saved, by the reader that serves, on the last tokens of the run.
    block = source.block(done.position.block)
    found = fit(open_autoencoder(inspect(part)), block.x)
    section = {
        **asdict(settings),
        "steps": settings.steps,
        "tokens_trained": settings.steps * settings.batch,
        "texts": chunks.texts,
        "chunks": len(chunks),
        "blocks": Counts(*done.counts)._asdict(),
        "massive_above": bound,
        "dtype": options.dtype,
        "dead_at_the_end": done.dead,
        "last_block": {"tokens": found.tokens, **figures(found)},
        "torch": torch.__version__,
    }
    for name in ("cfg.json", WEIGHTS):
        (part / name).replace(options.out / name)
    write_card(options.out, training=section)
    gone = options.out / f".{STATE}.done"
    shutil.rmtree(gone, ignore_errors=True)
    (options.out / STATE).rename(gone)  # at once, so that half of it is never taken for a run
    shutil.rmtree(gone)
    return section
