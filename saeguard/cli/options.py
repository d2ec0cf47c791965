"""Arguments and options that several verbs share, and checks of the paths they are given."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from saeguard.errors import InputError

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


def check_model_folder(path: Path, option: str = "") -> None:
    """Check that a folder holds the config.json of a Hugging Face model.

    Raises:
        InputError: it does not.
    """
    remedy = "give the folder of a Hugging Face model"
    check_folder(path, option, remedy)
    if not (path / "config.json").is_file():
        raise InputError(f"{_prefix(option)}{path}: the folder holds no config.json; {remedy}")


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


def model_folder(
    context: typer.Context, parameter: typer.CallbackParam, path: Path | None
) -> Path | None:
    """Return the path that an argument or option was given, checked by `check_model_folder`."""
    if path is not None and not context.resilient_parsing:
        check_model_folder(path, _option(parameter))
    return path


FeatureSetsOption = Annotated[Path, typer.Option("--feature-sets", help="Folder of feature sets.")]
ModelOption = Annotated[
    Path, typer.Option("--model", help="Folder of a Hugging Face model.", callback=model_folder)
]
OptionalModel = Annotated[
    Path | None,
    typer.Option(
        "--model", help="Folder of a Hugging Face model, which reads texts.", callback=model_folder
    ),
]
