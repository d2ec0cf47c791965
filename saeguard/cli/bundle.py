"""`saeguard policy keygen`, `sign` and `verify`: who answers for a folder of policies."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from saeguard.atomic_files import write_new
from saeguard.cli.failures import BAD_INPUT, COULD_NOT_RUN, reason, stop

NO_CRYPTOGRAPHY = (
    "keys and signatures need the package `cryptography`: pip install 'saeguard[sign]'"
)

Sets = Annotated[Path, typer.Option("--feature-sets", help="Folder of feature sets.")]


def keygen(
    path: Annotated[Path, typer.Argument(help="Where the private key goes; PATH.pub is public.")],
) -> None:
    """Make an Ed25519 key pair: the private key signs, the public one goes to the servers.

    Exits with 0, 2 where one of the files is there, 3 where they cannot be written.
    """
    from saeguard.policy import signing

    beside = path.with_name(f"{path.name}.pub")
    for file in (path, beside):
        if os.path.lexists(file):  # also a link to nowhere
            stop(f"{file}: is there already; keys are not overwritten", BAD_INPUT)
    if not path.parent.is_dir():
        stop(f"{path.parent}: there is no such folder", COULD_NOT_RUN)
    try:
        private, public = signing.keygen()
        write_new({path: private.decode(), beside: public.decode()}, private=[path])
    except ImportError:
        stop(NO_CRYPTOGRAPHY, COULD_NOT_RUN)
    except OSError as error:
        stop(reason(error), COULD_NOT_RUN)
    typer.echo(f"{path}: private, keep it where you sign; {path}.pub: public, for saeguard.verify")


def sign(
    key: Annotated[Path, typer.Option("--key", help="Private key, PEM.")],
    folder: Annotated[Path, typer.Argument(help="Folder of policies.")] = Path("policies"),
    feature_sets: Sets = Path("feature_sets"),
    revision: Annotated[
        int | None,
        typer.Option(help="Higher than any before. Default: one more than signed now.", min=1),
    ] = None,
) -> None:
    """Sign every policy file of a folder, and the feature sets that they use.

    Exits with 0 where it is signed, 1 where a policy is wrong, 2 where the key or the folder is,
    3 where the bundle cannot be written. What a server leaves out, as its features are a template,
    is signed without its feature set.
    """
    from saeguard.features.load import FeatureSetError, load_feature_set
    from saeguard.policy import signing
    from saeguard.policy.errors import PolicyErrors
    from saeguard.policy.lint import leave_out_templates
    from saeguard.policy.load import load_policies

    if folder.is_file():
        stop(f"{folder}: this is a file; a whole folder is signed", BAD_INPUT)
    private = _key(key)
    try:
        policies = load_policies(folder)
        served, _ = leave_out_templates(policies, feature_sets)
        names = sorted({p.feature_set for p in served})
        sets = {n: load_feature_set(feature_sets / f"{n}.yaml", verify=False).digest for n in names}
    except (PolicyErrors, FeatureSetError) as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from error
    try:
        next_one = revision if revision is not None else _signed_now(folder) + 1
        manifest = signing.sign(folder, policies, sets, next_one, private)
    except signing.BundleError as error:
        stop(f"{key}: {error}", BAD_INPUT)
    except ImportError:
        stop(NO_CRYPTOGRAPHY, COULD_NOT_RUN)
    except OSError as error:
        stop(reason(error), COULD_NOT_RUN)
    typer.echo(json.dumps(signing.summary(manifest)))


def _key(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        stop(f"--key: {reason(error)}", BAD_INPUT)


def _signed_now(folder: Path) -> int:
    """Return the revision that a folder's bundle claims, whoever signed it; 0 without one."""
    from saeguard.policy import signing

    return signing.claimed_revision(folder / signing.BUNDLE)


def verify(
    key: Annotated[Path, typer.Option("--key", help="Public key, PEM.")],
    folder: Annotated[Path, typer.Argument(help="Folder of policies.")] = Path("policies"),
    feature_sets: Sets = Path("feature_sets"),
) -> None:
    """Check a folder as a server with this key would.

    Exits with 0 where it is as signed, 1 where it is not, 2 where the key cannot be read or
    there is no folder.
    """
    from saeguard.features.load import FeatureSetError, load_feature_set
    from saeguard.policy import signing
    from saeguard.policy.errors import PolicyErrors
    from saeguard.policy.load import load_policies

    public = _key(key)
    try:
        signing.load_public_key(public)
    except signing.BundleError as error:
        stop(f"{key}: {error}", BAD_INPUT)
    if not folder.is_dir():
        stop(f"{folder}: there is no such folder", BAD_INPUT)
    try:
        manifest = signing.verify(folder, public)
        sets = {
            name: load_feature_set(feature_sets / f"{name}.yaml", verify=False).digest
            for name in manifest.feature_sets
        }
        signing.check_loaded(manifest, folder, load_policies(folder), sets)
    except (signing.BundleError, PolicyErrors, FeatureSetError) as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from error
    typer.echo(json.dumps(signing.summary(manifest)))
