"""`saeguard policy keygen`, `sign` and `verify`: who answers for a folder of policies."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import typer

Sets = Annotated[Path, typer.Option("--feature-sets", help="Folder of feature sets.")]


def keygen(
    path: Annotated[Path, typer.Argument(help="Where the private key goes; PATH.pub is public.")],
) -> None:
    """Make an Ed25519 key pair: the private key signs, the public one goes to the servers."""
    from saeguard.policy import bundle

    private, public = bundle.keygen()
    try:
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(private)
    except FileExistsError as error:
        typer.echo(f"{path}: there is a file already; keys are not overwritten", err=True)
        raise typer.Exit(2) from error
    path.with_name(f"{path.name}.pub").write_bytes(public)
    typer.echo(f"{path}: private, keep it where you sign; {path}.pub: public, for saeguard.verify")


def sign(
    key: Annotated[Path, typer.Option("--key", help="Private key, PEM.")],
    folder: Annotated[Path, typer.Argument(help="Folder of policies.")] = Path("policies"),
    feature_sets: Sets = Path("feature_sets"),
    revision: Annotated[
        int | None, typer.Option(help="Higher than any before. Default: one more than signed now.")
    ] = None,
) -> None:
    """Sign every policy file of a folder, and the feature sets that they use.

    Exits with 0 where it is signed, 1 where a policy is wrong, 2 where the key is.
    """
    from saeguard.features.load import FeatureSetError, load_feature_set
    from saeguard.policy import bundle
    from saeguard.policy.errors import PolicyErrors
    from saeguard.policy.load import load_policies

    try:
        policies = load_policies(folder)
        names = sorted({p.feature_set for p in policies})
        sets = {n: load_feature_set(feature_sets / f"{n}.yaml", verify=False).digest for n in names}
    except (PolicyErrors, FeatureSetError) as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from error
    try:
        private = key.read_bytes()
        next_one = revision if revision is not None else _signed_now(folder) + 1
        manifest = bundle.sign(folder, policies, sets, next_one, private)
    except (OSError, bundle.BundleError) as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from error
    typer.echo(json.dumps(bundle.summary(manifest)))


def _signed_now(folder: Path) -> int:
    """Return the revision that a folder's bundle claims, whoever signed it; 0 without one."""
    from saeguard.policy import bundle

    return bundle.claimed_revision(folder / bundle.BUNDLE)


def verify(
    key: Annotated[Path, typer.Option("--key", help="Public key, PEM.")],
    folder: Annotated[Path, typer.Argument(help="Folder of policies.")] = Path("policies"),
    feature_sets: Sets = Path("feature_sets"),
) -> None:
    """Check a folder as a server with this key would.

    Exits with 0 where it is as signed, 1 where it is not, 2 where the key cannot be read.
    """
    from saeguard.features.load import FeatureSetError, load_feature_set
    from saeguard.policy import bundle
    from saeguard.policy.errors import PolicyErrors
    from saeguard.policy.load import load_policies

    try:
        public = key.read_bytes()
        bundle.load_public_key(public)
    except (OSError, bundle.BundleError) as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from error
    try:
        manifest = bundle.verify(folder, public)
        sets = {
            name: load_feature_set(feature_sets / f"{name}.yaml", verify=False).digest
            for name in manifest.feature_sets
        }
        bundle.check_loaded(manifest, folder, load_policies(folder), sets)
    except (bundle.BundleError, PolicyErrors, FeatureSetError) as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from error
    typer.echo(json.dumps(bundle.summary(manifest)))
