"""Which policies can be served: those whose features somebody has calibrated."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from saeguard.features.feature_template import is_template
from saeguard.policy.errors import PolicyError, PolicyErrors
from saeguard.policy.lint import uncalibrated
from saeguard.policy.types import Policy


def leave_out_templates(
    policies: Sequence[Policy], feature_sets: Path
) -> tuple[tuple[Policy, ...], tuple[PolicyError, ...]]:
    """Return the policies that can be served, and a note on each that cannot yet.

    Args:
        policies: as they were loaded.
        feature_sets: the folder of feature sets.

    Raises:
        PolicyErrors: one of them is enforced: it would look like a guard and be none.
    """
    names = {policy.feature_set for policy in policies}
    open_ = {name for name in names if is_template(feature_sets / f"{name}.yaml")}
    notes = [uncalibrated(policy) for policy in policies if policy.feature_set in open_]
    errors = [note for note in notes if note.level == "error"]
    if errors:
        raise PolicyErrors(errors)
    return tuple(policy for policy in policies if policy.feature_set not in open_), tuple(notes)
