"""`saeguard policy keygen`, `sign` and `verify`: signed folders of policies."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from saeguard.atomic_files import write_new
from saeguard.cli.options import (
    FEATURE_SETS,
    FeatureSetsOption,
    check_feature_sets,
    check_folder,
    existing_file,
)
from saeguard.errors import FINDINGS, CannotRunError, InputError

if TYPE_CHECKING:
    from collections.abc import Iterable

Folder = Annotated[Path, typer.Argument(help="Folder of policies. Default: policies.")]


def keygen(
    path: Annotated[
        Path, typer.Argument(help="File for the private key; the public key goes to PATH.pub.")
    ],
) -> None:
    """Make an Ed25519 key pair: the private key signs, servers hold the public one.

    Exit codes: 0 written, 2 one of the files exists, 3 they cannot be written.
    """
    from saeguard.policy import signing_keys

    public_path = path.with_name(f"{path.name}.pub")
    for file in (path, public_path):
        if os.path.lexists(file):  # also a link to nowhere
            raise InputError(f"{file}: exists already, and keys are not overwritten; name another")
    if not path.parent.is_dir():
        raise CannotRunError(f"{path.parent}: there is no such folder")
    private, public = signing_keys.keygen()
    write_new({path: private.decode(), public_path: public.decode()}, private=[path])
    typer.echo(f"{path}: private key, keep it where you sign")
    typer.echo(f"{public_path}: public key, for `saeguard serve --verify`")


def sign(
    key: Annotated[
        Path, typer.Option("--key", help="Private key, a PEM file.", callback=existing_file)
    ],
    folder: Folder = Path("policies"),
    feature_sets: FeatureSetsOption = FEATURE_SETS,
    revision: Annotated[
        int | None,
        typer.Option(
            help="Number above that of every earlier signature. Default: one more than the last.",
            min=1,
        ),
    ] = None,
) -> None:
    """Sign every policy file of a folder, and the feature sets that they use.

    A policy whose features are still a template is signed without its feature set, since servers
    leave it out. Exit codes: 0 signed, 2 the key, a policy or a feature set is wrong, 3 the
    signature cannot be written.
    """
    from saeguard.policy import signing
    from saeguard.policy.errors import BundleError
    from saeguard.policy.lint import leave_out_templates
    from saeguard.policy.load import load_policies

    if folder.is_file():
        raise InputError(f"{folder}: expected a folder, found a file; sign the whole folder")
    check_feature_sets(feature_sets)
    private = key.read_bytes()
    policies = load_policies(folder)
    served, _ = leave_out_templates(policies, feature_sets)
    names = {policy.feature_set for policy in served}
    _refuse_unpinned(feature_sets, names)
    digests = _digests(feature_sets, names)
    last = signing.claimed_revision(folder / signing.BUNDLE)
    if revision is not None and revision <= last:
        raise InputError(
            f"--revision: expected a number above {last}, the revision of "
            f"{folder / signing.BUNDLE}, got {revision}; a server that has seen {last} would "
            "refuse it"
        )
    try:
        manifest = signing.sign(folder, policies, digests, revision or last + 1, private)
    except BundleError as error:
        raise InputError(f"{key}: {error}") from error
    typer.echo(json.dumps(signing.summary(manifest)))


def verify(
    key: Annotated[
        Path, typer.Option("--key", help="Public key, a PEM file.", callback=existing_file)
    ],
    folder: Folder = Path("policies"),
    feature_sets: FeatureSetsOption = FEATURE_SETS,
) -> None:
    """Check a folder's signature as a server with this key would.

    Exit codes: 0 everything is as signed, 1 something is not, 2 the key or the folder is wrong.
    """
    from saeguard.errors import SaeguardError
    from saeguard.policy import signing, signing_keys
    from saeguard.policy.errors import BundleError
    from saeguard.policy.load import load_policies

    public = key.read_bytes()
    try:
        signing_keys.load_public_key(public)
    except BundleError as error:
        raise InputError(f"{key}: {error}") from error
    check_folder(folder)
    check_feature_sets(feature_sets)
    try:
        manifest = signing.verify(folder, public)
        digests = _digests(feature_sets, manifest.feature_sets)
        signing.check_loaded(manifest, folder, load_policies(folder), digests)
    except SaeguardError as error:  # whatever does not verify is what this command looks for
        typer.echo(str(error), err=True)
        raise typer.Exit(FINDINGS) from error
    typer.echo(json.dumps(signing.summary(manifest)))


def _refuse_unpinned(folder: Path, names: Iterable[str]) -> None:
    """Refuse to sign over a feature set that does not pin what it rests on.

    Raises:
        InputError: names each missing pin.
    """
    from saeguard.features.files import read_with_positions
    from saeguard.features.unpinned import unpinned

    paths = [folder / f"{name}.yaml" for name in sorted(names)]
    missing = [finding for path in paths for finding in unpinned(*read_with_positions(path))]
    if missing:
        raise InputError(
            "a signature would cover less than it seems to:\n"
            + "\n".join(finding.render() for finding in missing)
        )


def _digests(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """Return the digest of each named feature set; checkpoints are not read."""
    from saeguard.features.load import load_feature_set

    return {
        name: load_feature_set(folder / f"{name}.yaml", verify=False).digest
        for name in sorted(names)
    }
