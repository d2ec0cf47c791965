"""`saeguard policy`: the verbs for policy files."""

from __future__ import annotations

import json
from typing import Annotated, Literal

import typer

from saeguard.cli import bundle, check, diff, explain, fmt, list_, new, record, replay, test
from saeguard.cli.failures import Verbs

verb = typer.Typer(cls=Verbs, no_args_is_help=True)
verb.command("check")(check.verb)
verb.command("test")(test.verb)
verb.command("diff")(diff.verb)
verb.command("replay")(replay.verb)
verb.command("explain")(explain.verb)
verb.command("record")(record.verb)
verb.command("list")(list_.verb)
verb.command("fmt")(fmt.verb)
verb.command("new")(new.verb)
verb.command("keygen")(bundle.keygen)
verb.command("sign")(bundle.sign)
verb.command("verify")(bundle.verify)


@verb.command()
def schema(
    of: Annotated[
        Literal["policy", "test"],
        typer.Argument(help="policy: of policy files; test: of test files."),
    ] = "policy",
) -> None:
    """Print the JSON Schema of policy files or test files, for editors."""
    from saeguard.policy import schema as policy_schema
    from saeguard.policy_tools import test_case_schema

    found = test_case_schema.json_schema() if of == "test" else policy_schema.json_schema()
    typer.echo(json.dumps(found, indent=2))
