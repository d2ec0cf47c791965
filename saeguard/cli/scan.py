"""`saeguard scan`: judge a file of texts offline, with Transformers or with vLLM."""

from __future__ import annotations

import json
from collections import Counter
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from saeguard.cli.engines import (
    EngineChoice,
    EngineOption,
    ExecutorOption,
    ResumeOption,
    SkipOption,
    TensorParallelOption,
    TruncateOption,
    VllmArgsOption,
    left_out,
    open_engine,
    part_files,
    progress,
)
from saeguard.cli.options import (
    FEATURE_SETS,
    DeviceOption,
    DtypeOption,
    FeatureSetsOption,
    ModelOption,
    check_feature_sets,
    existing_file,
)
from saeguard.errors import InputError

if TYPE_CHECKING:
    from saeguard.guard.watchlist import WatchList
    from saeguard.hf.readings import Engine
    from saeguard.hf.text_files import TextFile
    from saeguard.part_files import PartFiles

VERDICTS = "verdicts.jsonl"
"""The section of the part files."""


def verb(
    texts: Annotated[
        Path,
        typer.Argument(
            help="JSON lines, CSV or Parquet: an id, and a text, or a prompt or messages with a "
            "completion.",
            callback=existing_file,
        ),
    ],
    model: ModelOption,
    policies: Annotated[Path, typer.Option(help="Policy file or folder.")],
    out: Annotated[Path, typer.Option(help="JSON lines to write, one per text and policy.")],
    feature_sets: FeatureSetsOption = FEATURE_SETS,
    engine: EngineOption = "transformers",
    dtype: DtypeOption = "float32",
    device: DeviceOption = "auto",
    tensor_parallel_size: TensorParallelOption = 1,
    distributed_executor_backend: ExecutorOption = None,
    vllm_args: VllmArgsOption = "",
    truncate: TruncateOption = False,
    skip: SkipOption = False,
    resume: ResumeOption = False,
) -> None:
    """Judge every text by every policy, by the rules that serve, and write the verdicts.

    Actions are not taken: nothing is clamped or stopped. A run that is cut off keeps its verdicts
    in OUT.part. Exit codes: 0 whatever the verdicts, 2 a file, the model or the command is wrong, 3
    a package is missing or the engine failed.
    """
    from saeguard.hf.model import load_tokenizer
    from saeguard.hf.scan import role_marks_for
    from saeguard.hf.text_files import check_file

    choice = EngineChoice(
        engine, dtype, device, tensor_parallel_size, distributed_executor_backend, vllm_args
    )
    choice.check()
    check_feature_sets(feature_sets)
    watchlist = _watchlist(policies, feature_sets)
    tokenizer = load_tokenizer(model)
    role_marks_for(tokenizer, watchlist)  # raises before the model is loaded
    file = check_file(texts, tokenizer, truncate=truncate, skip=skip)
    about = {"watch list": watchlist.digest}
    features = watchlist.features
    with (
        part_files(out, [VERDICTS], file, choice, model, about, resume) as parts,
        closing(open_engine(choice, model, tokenizer, feature_sets, features)) as reader,
    ):
        file = file.fitted(reader.longest)
        found = _judge(reader, watchlist, tokenizer, file, parts)
        parts.finish(parts.path(VERDICTS))
    for line in left_out(file):
        typer.echo(line, err=True)
    typer.echo(f"{found['match']} of {file.count} texts match a policy. Wrote {out}.")
    if found["error"]:
        typer.echo(f"{found['error']} texts hold tokens that could not be read.", err=True)


def _watchlist(policies: Path, feature_sets: Path) -> WatchList:
    from saeguard.features.load import load_feature_set
    from saeguard.guard.build_watchlist import build_watchlist
    from saeguard.policy.lint import leave_out_templates
    from saeguard.policy.load import load_policies

    loaded, notes = leave_out_templates(load_policies(policies), feature_sets)
    for note in notes:
        typer.echo(note.render(), err=True)
    if not loaded:
        raise InputError(f"{policies}: found no policy whose features are calibrated")
    wanted = sorted({policy.feature_set for policy in loaded})
    paths = ((name, feature_sets / f"{name}.yaml") for name in wanted)
    sets = {name: load_feature_set(path) for name, path in paths if path.is_file()}
    return build_watchlist(loaded, sets)


def _judge(
    reader: Engine, watchlist: WatchList, tokenizer: Any, file: TextFile, parts: PartFiles
) -> Counter[str]:
    """Judge the texts that the part files lack, and add their verdicts.

    Returns:
        Number of texts with a verdict of each kind.

    Raises:
        CannotRunError: the engine failed, or returned fewer texts than there are.
    """
    from saeguard.events.records import verdict_record
    from saeguard.hf.readings import see_texts

    found = _counted(parts.path(VERDICTS), len(watchlist.policies))
    rest = file.read(parts.items)
    for text, seen in progress(see_texts(reader, watchlist, tokenizer, rest), file, parts):
        records = [verdict_record(verdict) for verdict in seen.judge(watchlist.rules)]
        found.update({record["verdict"] for record in records})
        about = {"id": text.id} | ({"tokens_cut": text.cut} if text.cut else {})
        parts.add("".join(json.dumps(about | r) + "\n" for r in records).encode())
    return found


def _counted(verdicts: Path, policies: int) -> Counter[str]:
    """Return the number of texts with a verdict of each kind, of an earlier run."""
    found: Counter[str] = Counter()
    with verdicts.open("rb") as lines:
        while some := list(islice(lines, policies)):
            found.update({json.loads(line)["verdict"] for line in some})
    return found
