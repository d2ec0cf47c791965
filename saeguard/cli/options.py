"""Arguments and options that several verbs share, and checks of the paths they are given."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

import typer

from saeguard.errors import InputError

if TYPE_CHECKING:
    from saeguard.features.types import FeatureSet
    from saeguard.sae import SaeInfo

FEATURE_SETS = Path("feature_sets")


def check_file(path: Path, option: str = "") -> None:
    """Check that a file to be read exists; a pipe counts.

    Args:
        path: of the file.
        option: the option that was given the path, for the message; empty for an argument.

    Raises:
        InputError: the path is missing or a folder.
    """
    _check(path, option, "file", "name an existing file")


def check_folder(path: Path, option: str = "", remedy: str = "name an existing folder") -> None:
    """Check that a folder exists.

    Args:
        path: of the folder.
        option: the option that was given the path, for the message; empty for an argument.
        remedy: what to do, for the message.

    Raises:
        InputError: the path is missing or a file.
    """
    _check(path, option, "folder", remedy)


def check_feature_sets(path: Path) -> None:
    """Check the folder that --feature-sets names; see `check_folder`."""
    check_folder(path, "--feature-sets", "give the folder of feature sets that the policies name")


def _check(path: Path, option: str, kind: str, remedy: str) -> None:
    # os, not pathlib, which raises at names that are too long. Typer checks that it may be read.
    found = "folder" if os.path.isdir(path) else "file"  # noqa: PTH112
    problem = None
    if not os.path.exists(path):  # noqa: PTH110
        problem = f"there is no such {kind}"
    elif found != kind:
        problem = f"expected a {kind}, found a {found}"
    if problem is not None:
        raise InputError(f"{_prefix(option)}{path}: {problem}; {remedy}")


def _prefix(option: str) -> str:
    return f"{option}: " if option else ""


def _option(parameter: typer.CallbackParam) -> str:
    return parameter.opts[0] if parameter.param_type_name == "option" else ""


def existing_file(
    context: typer.Context, parameter: typer.CallbackParam, path: Path | None
) -> Path | None:
    """Return the path that an argument or option was given, checked by `check_file`."""
    if path is not None and not context.resilient_parsing:
        check_file(path, _option(parameter))
    return path


def existing_folder(
    context: typer.Context, parameter: typer.CallbackParam, path: Path | None
) -> Path | None:
    """Return the path that an argument or option was given, checked by `check_folder`."""
    if path is not None and not context.resilient_parsing:
        check_folder(path, _option(parameter))
    return path


def model_of_option(
    context: typer.Context, parameter: typer.CallbackParam, path: Path | None
) -> Path | None:
    """Return the folder of the model that an option names; see `saeguard.hf.model_folder`."""
    if path is None or context.resilient_parsing:
        return path
    from saeguard.hf.model_folder import model_folder

    return model_folder(path, _option(parameter))


def feature_sets_of_option(
    context: typer.Context, parameter: typer.CallbackParam, path: Path
) -> Path:
    """Return the folder of feature sets: the one that is named, or else the nearest one.

    By default it is `feature_sets` here, in a folder above, or above a path that was given. So a
    command works from inside the folder of a policy, too.
    """
    name = parameter.name or ""
    source = context.get_parameter_source(name)
    if source is None or source.name != "DEFAULT" or path.is_dir():
        return path
    given = [value for value in context.params.values() if isinstance(value, Path | list)]
    places = [p for value in given for p in (value if isinstance(value, list) else [value])]
    for start in [Path(), *(p for p in places if isinstance(p, Path))]:
        for above in start.absolute().parents:
            if (above / path).is_dir():
                return Path(os.path.relpath(above / path))
    return path


class ModelOptions(NamedTuple):
    """How the options of a command have a model loaded."""

    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device: str = "auto"


FeatureSetsOption = Annotated[
    Path,
    typer.Option(
        "--feature-sets",
        help="Folder of feature sets. Default: the nearest one, here or in a folder above.",
        callback=feature_sets_of_option,
    ),
]
ModelOption = Annotated[
    Path,
    typer.Option(
        "--model",
        help="Folder of a Hugging Face model, or its name on the hub.",
        callback=model_of_option,
    ),
]
OptionalModel = Annotated[
    Path | None,
    typer.Option(
        "--model",
        help="Folder of a Hugging Face model, or its name on the hub; it reads texts.",
        callback=model_of_option,
    ),
]
DtypeOption = Annotated[
    Literal["float32", "bfloat16", "float16"],
    typer.Option(
        "--dtype",
        help="Of the model's weights. bfloat16 is about three times as fast on a CPU with AMX, and "
        "moves scores (docs/correctness.md).",
    ),
]
DeviceOption = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")]
SetOption = Annotated[
    Path | None,
    typer.Option(
        "--set",
        help="Feature-set file: its SAE, special tokens and attention sinks; its features are "
        "named.",
        callback=existing_file,
    ),
]
SaeOption = Annotated[
    Path | None,
    typer.Option(
        "--sae", help="Folder of an SAE checkpoint, in place of --set.", callback=existing_folder
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]


def sae_and_set(sae: Path | None, set_: Path | None) -> tuple[SaeInfo, FeatureSet | None]:
    """Return the SAE that `--sae` or `--set` names, and the set.

    Raises:
        InputError: neither or both are given, or the set has no SAE.
    """
    from saeguard.features.load import load_feature_set, sae_of
    from saeguard.sae import inspect

    if (sae is None) == (set_ is None):
        raise InputError(
            "--set and --sae: expected one of them; give the feature set if you have one"
        )
    if sae is not None:
        return inspect(sae), None
    assert set_ is not None
    features = load_feature_set(set_)
    return sae_of(features).inspect(), features
