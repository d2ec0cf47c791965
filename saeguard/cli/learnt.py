"""What `saeguard features learn` prints and writes for each feature that it learnt."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from saeguard.atomic_files import write_new
from saeguard.cli.new import missing_schemas, rounded_up
from saeguard.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from saeguard.features.learn import Learned, Wish
    from saeguard.features.types import FeatureSet
    from saeguard.hf.labelled import Group


def named_apart(groups: Sequence[Group], *, topic: bool) -> Sequence[Group]:
    """Return the groups; if topics are learnt, none has the name of another one's.

    Raises:
        InputError: one has; names both.
    """
    from saeguard.features.joint import topic_of

    known = {group.name for group in groups} if topic else set()
    for name in sorted(known):
        if topic_of(name) in known:
            raise InputError(
                f"--topic: the topic of {name} would be called {topic_of(name)}, as is one of the "
                "labelled texts; rename that one"
            )
    return groups


def write_policy(
    learnt: Learned, features: FeatureSet, folder: Path, wish: Wish, owner: str, model: str
) -> list[Path]:
    """Write a shadow policy with tests for a learnt feature; return its path, nothing if kept.

    Raises:
        OSError: a file cannot be written.
    """
    from saeguard.features.joint import thresholds_of
    from saeguard.policy_tools.learned_policy import paths_of, texts_of

    at = paths_of(learnt, folder)
    assert learnt.feature is not None
    if any(os.path.lexists(path) for path in (at.policy, at.tests)):
        typer.echo(f"  {at.policy} is kept as it is; compare its threshold", err=True)
        return []
    at.policy.parent.mkdir(parents=True, exist_ok=True)
    texts = texts_of(
        learnt,
        features,
        {name: rounded_up(above) for name, above in thresholds_of(learnt.feature).items()},
        wish,
        at,
        owner=owner,
        schema=f"{Path(os.path.relpath(folder, at.policy.parent)).as_posix()}/",
        model=model,
        today=datetime.now(UTC).date(),
    )
    write_new(texts | missing_schemas(folder))
    return [at.policy]


def print_learnt(learnt: Learned, features: FeatureSet) -> None:
    """Print why a feature was not learnt, or what speaks against it."""
    if learnt.feature is None:
        typer.echo(f"  nothing: {learnt.reason}", err=True)
        if learnt.subject.name in features.features:
            typer.echo(f"  {features.path} still holds the feature of an earlier run", err=True)
    elif learnt.reason:
        typer.echo(f"  warning: {learnt.reason}", err=True)


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    """Print a line for each row of the report; with a topic, the rates of both together."""
    from rich.console import Console
    from rich.table import Table

    table = Table("feature", "form", "AUROC hold-out (95 %)", "random latents", "threshold",
                  "caught", "twins above", "ordinary above")  # fmt: skip
    for row in rows:
        evidence = row["evidence"]
        if evidence is None:
            table.add_row(row["feature"], "-", row["reason"], "", "", "", "", "")
            continue
        low, high = evidence["holdout"]["interval"]
        control = evidence["compared"].get("random_group")
        rates = evidence.get("with_topic", evidence)
        table.add_row(
            row["feature"],
            evidence["form"].partition(":")[0],
            f"{evidence['holdout']['auroc']:.3f} ({low:.3f} to {high:.3f})",
            f"{control['auroc']:.3f}" if control else "",
            f"{row['threshold']:g}",
            f"{rates['tpr_holdout']['rate']:.1%}",
            f"{rates['twin_rate_holdout']['rate']:.1%}",
            f"{rates['fpr_holdout']['rate']:.2%}",
        )
    Console().print(table)
