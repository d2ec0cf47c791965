"""`saeguard policy record`: the feature values of some texts, to judge policies on later."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Annotated

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
    existing_file,
)
from saeguard.errors import InputError


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
    out: Annotated[Path, typer.Option(help="Recording to write, a .safetensors file.")],
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="Name of a feature set. Repeatable. Default: all made for the model."
        ),
    ] = None,
    feature_sets: FeatureSetsOption = FEATURE_SETS,
    with_text: Annotated[
        bool,
        typer.Option("--with-text", help="Keep the text of each token, so that explain shows it."),
    ] = False,
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
    """Record the value of every feature at every token of some texts; by default without the text.

    A run that is cut off keeps its values in OUT.part. Exit codes: 0, 2 a file, the model or the
    command is wrong, 3 a package is missing or the engine failed.
    """
    from saeguard.cli.feature_folder import read_feature_sets

    choice = EngineChoice(
        engine, dtype, device, tensor_parallel_size, distributed_executor_backend, vllm_args
    )
    choice.check()
    if out.suffix != ".safetensors":  # by which the other tools tell it from texts
        raise InputError(f"--out: {out}: name a file that ends in .safetensors")
    sets = read_feature_sets(feature_sets)
    if not sets.known:
        raise InputError(f"{feature_sets}: found no feature set that can be used")
    unknown = [name for name in set_ or () if name not in sets.known]
    if unknown:
        known = ", ".join(sorted(sets.known))
        raise InputError(f"there is no feature set {', '.join(unknown)}; there are: {known}")
    from saeguard.features.model_fit import misfit, name_of, read_shape
    from saeguard.guard.roles.chat_template import role_marks_of
    from saeguard.hf.model import load_tokenizer
    from saeguard.hf.text_files import check_file
    from saeguard.policy_tools.record_features import definitions, recorded
    from saeguard.policy_tools.recording_parts import SECTIONS, add, write

    shape = read_shape(model)
    of_model = [
        name for name, known in sorted(sets.known.items()) if not misfit(known.model, shape)
    ]
    names = set_ or of_model
    if not names:
        raise InputError(
            f"no feature set in {feature_sets} is made for {model}, which is {shape.hidden_size} "
            f"wide and has {shape.num_layers} layers; name one with --set"
        )
    tokenizer = load_tokenizer(model)
    file = check_file(texts, tokenizer, truncate=truncate, skip=skip)
    columns = definitions([feature_sets / f"{name}.yaml" for name in names])
    features = list(columns)
    about = {"features": columns, "text kept": with_text}
    with (
        part_files(out, SECTIONS, file, choice, model, about, resume) as parts,
        closing(open_engine(choice, model, tokenizer, feature_sets, features)) as reader,
    ):
        file = file.fitted(reader.longest)
        rest = file.read(parts.items)
        read = recorded(reader, features, tokenizer, rest, with_text=with_text)
        for text in progress(read, file, parts):
            add(parts, text)
        marks = role_marks_of(tokenizer)
        no_roles = marks if isinstance(marks, str) else ""
        count, tokens = write(parts, columns, model=name_of(model), no_roles=no_roles)
    for line in left_out(file):
        typer.echo(line, err=True)
    typer.echo(f"{count} texts, {tokens} tokens, {len(columns)} features written to {out}")
