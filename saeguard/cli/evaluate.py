"""`saeguard evaluate`: policies on labelled texts, beside floors and baselines."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import typer

from saeguard.atomic_files import write_atomically
from saeguard.cli.engines import (
    EngineChoice,
    EngineOption,
    ExecutorOption,
    TensorParallelOption,
    VllmArgsOption,
    open_engine,
)
from saeguard.cli.options import (
    FEATURE_SETS,
    DeviceOption,
    DtypeOption,
    FeatureSetsOption,
    ModelOption,
    check_feature_sets,
)

if TYPE_CHECKING:
    from saeguard.features.model_fit import ModelShape
    from saeguard.features.types import FeatureSet
    from saeguard.policy.types import Policy


def verb(
    policies: Annotated[Path, typer.Option(help="Policy file or folder.")],
    model: ModelOption,
    data: Annotated[
        list[Path] | None,
        typer.Option(help="JSON lines of labelled texts, or a folder of such files. Repeatable."),
    ] = None,
    benign: Annotated[
        list[Path] | None,
        typer.Option(help="JSON lines of ordinary texts, or a folder of them. Repeatable."),
    ] = None,
    feature_sets: FeatureSetsOption = FEATURE_SETS,
    pair: Annotated[
        list[str] | None,
        typer.Option(
            help="POLICY=DATASET, with * for any name. Repeatable. Without it, a policy is judged "
            "on the datasets of its features' behaviour."
        ),
    ] = None,
    every: Annotated[
        bool, typer.Option("--all", help="Judge every policy on every dataset.")
    ] = False,
    length: Annotated[bool, typer.Option(help="The floor of length alone.")] = True,
    words: Annotated[bool, typer.Option(help="The floor of a bag of words.")] = True,
    probe: Annotated[
        bool, typer.Option(help="A probe on the residual that the policy's features read.")
    ] = True,
    judge: Annotated[
        bool, typer.Option(help="The model's own answer. It reads each text once more.")
    ] = False,
    worst: Annotated[
        int, typer.Option(help="False positives and negatives shown of each policy.", min=0)
    ] = 5,
    resume: Annotated[
        Path | None,
        typer.Option(help="Keep scores in this file, and do not compute those that it holds."),
    ] = None,
    as_json: Annotated[Path | None, typer.Option("--json", help="Report to write, JSON.")] = None,
    html: Annotated[Path | None, typer.Option(help="Report to write, one page.")] = None,
    seed: Annotated[int, typer.Option(help="Of the resampling for intervals.")] = 0,
    engine: EngineOption = "transformers",
    dtype: DtypeOption = "float32",
    device: DeviceOption = "auto",
    tensor_parallel_size: TensorParallelOption = 1,
    distributed_executor_backend: ExecutorOption = None,
    vllm_args: VllmArgsOption = "",
) -> None:
    """Measure policies on labelled texts and on ordinary ones, before anything is enforced.

    Beside each policy stand the floors that it has to beat on the same texts. Exit codes: 0
    whatever the figures, 2 a file, the model or the command is wrong, 3 a package is missing.
    """
    from saeguard.cli.evaluation_table import show
    from saeguard.evaluation.choose import choose_pairs, parse_pair
    from saeguard.evaluation.datasets import EvaluationError, data_files, read_datasets
    from saeguard.evaluation.judging import (
        make_keys,
        model_digest,
        reading_engine,
        transformers_engine,
    )
    from saeguard.evaluation.results import record
    from saeguard.evaluation.run import Inputs, Options, evaluate
    from saeguard.evaluation.store import Store
    from saeguard.guard.build_watchlist import build_watchlist
    from saeguard.hf.model import load_tokenizer
    from saeguard.hf.readings import TransformersEngine

    choice = EngineChoice(
        engine, dtype, device, tensor_parallel_size, distributed_executor_backend, vllm_args
    )
    choice.check()
    if engine == "vllm" and judge:
        raise EvaluationError("--judge: --engine vllm does not answer; use --engine transformers")
    if engine == "vllm" and probe:
        typer.echo("no probe: --engine vllm gives out feature values, no residuals", err=True)
        probe = False
    named = [parse_pair(text) for text in pair or ()]
    if not data and not benign:
        raise EvaluationError("no text to judge; give --data, --benign or both")
    loaded, sets = _load(policies, feature_sets)
    watchlist = build_watchlist(loaded, sets)
    if html is not None:
        # A missing package is reported now, not after the texts have been judged.
        from saeguard.evaluation.page import render
    tokenizer = load_tokenizer(model)
    datasets = read_datasets(data_files(data or ()), tokenizer)
    ordinary = read_datasets(data_files(benign or ()), tokenizer, benign=True)
    pairs = choose_pairs(watchlist.policies, sets, datasets, named, every=every)
    digest = model_digest(model)
    read_by = engine if dtype == "float32" else f"{engine} {dtype}"
    reader = open_engine(choice, model, tokenizer, feature_sets, watchlist.features)
    lm = reader.lm if isinstance(reader, TransformersEngine) else None
    inputs = Inputs(
        watchlist=watchlist,
        lm=lm,
        tokenizer=tokenizer,
        engine=reading_engine(reader, watchlist, tokenizer)
        if lm is None
        else transformers_engine(lm, watchlist),
        keys=make_keys(digest, read_by, watchlist, sets),
        datasets=tuple(datasets),
        pairs=tuple(pairs),
        benign=tuple(ordinary),
    )
    options = Options(length, words, probe, judge, worst, seed)
    facts = _facts(reader.shape, digest, read_by, seed)
    with (
        closing(reader),
        TemporaryDirectory() as folder,
        closing(Store(resume or Path(folder) / "s")) as store,
    ):
        found = evaluate(inputs, options, store, facts)
    show(found)
    if as_json is not None:
        write_atomically(as_json, json.dumps(record(found), indent=1, ensure_ascii=False) + "\n")
        typer.echo(f"Wrote {as_json}.")
    if html is not None:
        write_atomically(html, render(found))
        typer.echo(f"Wrote {html}.")


def _load(policies: Path, feature_sets: Path) -> tuple[Sequence[Policy], dict[str, FeatureSet]]:
    """Return the policies whose features are calibrated, and their feature sets."""
    from saeguard.errors import InputError
    from saeguard.features.load import load_feature_set
    from saeguard.policy.lint import leave_out_templates
    from saeguard.policy.load import load_policies

    check_feature_sets(feature_sets)
    loaded, notes = leave_out_templates(load_policies(policies), feature_sets)
    for note in notes:
        typer.echo(note.render(), err=True)
    if not loaded:
        raise InputError(f"{policies}: found no policy whose features are calibrated")
    names = sorted({policy.feature_set for policy in loaded})
    paths = ((name, feature_sets / f"{name}.yaml") for name in names)
    return loaded, {name: load_feature_set(path) for name, path in paths if path.is_file()}


def _facts(shape: ModelShape, digest: str, engine: str, seed: int) -> dict[str, Any]:
    from datetime import UTC, datetime
    from importlib import metadata

    packages = ("torch", "transformers", "scikit-learn")
    return {
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["saeguard", *sys.argv[1:]]),
        "model": {
            "name": shape.name,
            "digest": digest,
            "hidden_size": shape.hidden_size,
            "num_layers": shape.num_layers,
        },
        "engine": engine,
        "versions": {name: metadata.version(name) for name in ("saeguard", *packages)},
        "seed": seed,
    }
