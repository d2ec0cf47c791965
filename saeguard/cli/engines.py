"""Options of the verbs that read many texts, and the engine that they choose."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import typer

from saeguard.cli.report import count
from saeguard.errors import CannotRunError, InputError
from saeguard.real_path import real_path

if TYPE_CHECKING:
    from saeguard.hf.model import Dtype
    from saeguard.hf.readings import Engine
    from saeguard.hf.text_files import TextFile
    from saeguard.part_files import PartFiles

T = TypeVar("T")

EngineOption = Annotated[
    Literal["transformers", "vllm"],
    typer.Option("--engine", help="What runs the model: vllm batches, caches and uses many GPUs."),
]
TensorParallelOption = Annotated[
    int,
    typer.Option(
        "--tensor-parallel-size", help="With --engine vllm: GPUs that share the model.", min=1
    ),
]
ExecutorOption = Annotated[
    str | None,
    typer.Option(
        "--distributed-executor-backend", help="With --engine vllm: mp, or ray for several nodes."
    ),
]
VllmArgsOption = Annotated[
    str,
    typer.Option(
        "--vllm-args",
        help="With --engine vllm: further options of `vllm serve`, as one argument, such as "
        "'--max-model-len 4096 --max-num-seqs 512'.",
    ),
]
TruncateOption = Annotated[
    bool,
    typer.Option(
        "--truncate",
        help="Cut the end off texts that are longer than the model takes; the result says of how "
        "many tokens.",
    ),
]
SkipOption = Annotated[
    bool,
    typer.Option("--skip", help="Leave out lines that are wrong, and list them at the end."),
]
ResumeOption = Annotated[bool, typer.Option("--resume", help="Go on with a run that was cut off.")]


@dataclass(frozen=True, slots=True)
class EngineChoice:
    """The engine that the options of a command choose."""

    name: Literal["transformers", "vllm"] = "transformers"
    dtype: Dtype = "float32"
    device: str = "auto"
    tensor_parallel_size: int = 1
    distributed_executor_backend: str | None = None
    vllm_args: str = ""

    def check(self) -> None:
        """Refuse options of one engine beside the other.

        Raises:
            InputError: names the option, and the engine that takes it.
        """
        of_vllm = {
            "--tensor-parallel-size": self.tensor_parallel_size != 1,
            "--distributed-executor-backend": self.distributed_executor_backend is not None,
            "--vllm-args": bool(self.vllm_args),
        }
        given = [option for option, is_given in of_vllm.items() if is_given]
        if self.name == "transformers" and given:
            raise InputError(
                f"{given[0]}: only --engine vllm takes it; found --engine transformers"
            )
        if self.name == "vllm" and self.device != "auto":
            raise InputError(
                f"--device: found {self.device!r}, but vLLM runs on the device that it was built "
                "for; leave the option out, or set CUDA_VISIBLE_DEVICES"
            )

    def options(self) -> list[str]:
        """Return the options for vLLM.

        Raises:
            InputError: the quotes of --vllm-args do not match.
        """
        try:
            more = shlex.split(self.vllm_args)
        except ValueError as error:
            raise InputError(f"--vllm-args: {error}; found {self.vllm_args!r}") from error
        backend = self.distributed_executor_backend
        return [
            *("--tensor-parallel-size", str(self.tensor_parallel_size)),
            *(("--distributed-executor-backend", backend) if backend else ()),
            *more,
        ]


@contextmanager
def part_files(
    out: Path,
    sections: Sequence[str],
    texts: TextFile,
    choice: EngineChoice,
    model: Path,
    about: Mapping[str, Any],
    resume: bool,
) -> Iterator[PartFiles]:
    """Yield the part files of a result with one item for each text; tell how to go on if it fails.

    Args:
        out: the result.
        sections: of the part files.
        texts: that are read.
        choice: of the engine.
        model: folder of the model.
        about: what else the result depends on.
        resume: whether to go on with an earlier run.

    Raises:
        InputError: the part files cannot be gone on with.
    """
    from saeguard.part_files import PartFiles

    if resume and not texts.sha256:
        raise InputError(f"--resume: {texts.path}: texts from a pipe cannot be read again")
    treated = {name: True for name in ("skip", "truncate") if getattr(texts, name)}
    read_by = {
        **treated,
        "engine": choice.name,
        "dtype": choice.dtype,
        "model": str(real_path(model)),
    }
    parts = PartFiles(out, sections, {"texts": texts.sha256, **read_by, **about}, resume=resume)
    try:
        yield parts
    except BaseException:
        typer.echo(_what_is_kept(parts, texts), err=True)
        if not texts.sha256:
            parts.remove()
        raise
    finally:
        parts.close()


def _what_is_kept(parts: PartFiles, texts: TextFile) -> str:
    """Return what a run that was cut off leaves behind."""
    if not texts.sha256:
        return "nothing is kept: texts from a pipe cannot be read again"
    if not parts.items:
        return f"no text of {texts.count} was finished, so nothing is kept"
    return f"{parts.items} of {texts.count} texts are kept in {parts.folder}; --resume goes on"


def left_out(texts: TextFile) -> Iterator[str]:
    """Yield what a result lacks of its texts: lines that were skipped, and ends that were cut."""
    if texts.left_out:
        yield from texts.mistakes
        yield f"{texts.path}: wrong, and left out: {count(len(texts.left_out), 'line')}"
    if texts.cut:
        yield (
            f"{texts.path}: cut to {texts.most} tokens: {count(texts.cut, 'text')}; what follows "
            "was not read"
        )


def progress(read: Iterable[T], texts: TextFile, parts: PartFiles) -> Iterator[T]:
    """Yield what was read of each text, beside a progress bar.

    Raises:
        CannotRunError: fewer texts were read than there are.
    """
    from tqdm import tqdm

    yield from tqdm(read, desc="read", total=texts.count, initial=parts.items, unit="text")
    if parts.items != texts.count:
        raise CannotRunError(
            f"{texts.path}: expected {texts.count} texts, the engine returned {parts.items}; is "
            "the file being written to?"
        )


def open_engine(
    choice: EngineChoice,
    model: Path,
    tokenizer: Any,
    feature_sets: Path,
    features: Sequence[str],
) -> Engine:
    """Load a model into the chosen engine, to read `features` of texts.

    Args:
        choice: of the engine.
        model: folder of the model.
        tokenizer: the model's.
        feature_sets: folder of feature sets.
        features: `feature_set/feature` of each.

    Raises:
        InputError, CannotRunError: the model, a feature set or the engine does not work.
    """
    if choice.name == "transformers":
        from saeguard.features.load import load_feature_set
        from saeguard.guard.build_watchlist import build_readings
        from saeguard.hf.model import load_model
        from saeguard.hf.readings import TransformersEngine

        ids = sorted({name.rpartition("/")[0] for name in features})
        sets = {name: load_feature_set(feature_sets / f"{name}.yaml") for name in ids}
        readings = build_readings(features, sets)
        lm = load_model(model, tokenizer, dtype=choice.dtype, device=choice.device)
        return TransformersEngine(lm, readings)
    from rich.console import Console

    from saeguard.cli.serve import preflight
    from saeguard.vllm.offline import open_engine as open_vllm

    preflight(Console(stderr=True))
    options = choice.options()
    return open_vllm(model, feature_sets, features, dtype=choice.dtype, options=options)
