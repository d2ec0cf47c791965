"""`saeguard policy`: everything about policy files under one name."""

from __future__ import annotations

import json

import typer

from saeguard.cli import bundle, check, test

verb = typer.Typer(no_args_is_help=True)
verb.command("check")(check.verb)
verb.command("test")(test.verb)
verb.command("keygen")(bundle.keygen)
verb.command("sign")(bundle.sign)
verb.command("verify")(bundle.verify)


@verb.command()
def schema() -> None:
    """Print the JSON Schema of policy files, for editors."""
    from saeguard.policy.schema import json_schema

    typer.echo(json.dumps(json_schema(), indent=2))
