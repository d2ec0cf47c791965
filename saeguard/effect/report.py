"""Arms side by side: a JSON document, and the same as a table in Markdown."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from saeguard.effect.arms import OFF, Arm
from saeguard.effect.intervals import Units, compare, interval, pooled
from saeguard.effect.measures import Measure, Measured

RANDOM = "random, all draws like {edit}"


def report(
    arms: Sequence[Arm], measured: Mapping[str, Measured], conditions: Mapping[str, Any], seed: int
) -> dict[str, Any]:
    """Return the measures of the arms that were run, `off` among them, with changes from `off`."""
    arms = [a for a in arms if a.name in measured]
    by_arm: dict[str, list[Measure]] = {a.name: list(measured[a.name].measures) for a in arms}
    for edit, draws in _by_edit(arms).items():
        if len(draws) > 1:
            columns = zip(*(by_arm[a.name] for a in draws), strict=True)
            by_arm[RANDOM.format(edit=edit)] = [
                Measure(same[0].name, same[0].how, pooled([m.units for m in same]))
                for same in columns
            ]
    off = {m.name: m.units for m in by_arm[OFF]}
    return {
        "conditions": dict(conditions),
        "arms": [
            {
                "name": a.name,
                "edit": a.edit,
                "edit_norm": _round(a.edit_norm),
                "latents": {str(k): _round(v) for k, v in (a.latents or {}).items()},
                "system": a.system,
            }
            for a in arms
        ],
        "measures": {
            name: {m.name: _row(m, None if name == OFF else off[m.name], seed) for m in found}
            for name, found in by_arm.items()
        },
    }


def _by_edit(arms: Sequence[Arm]) -> dict[str, list[Arm]]:
    found: dict[str, list[Arm]] = {}
    for arm in arms:
        if arm.random:
            found.setdefault(arm.name.rpartition("like ")[2], []).append(arm)
    return found


def _row(measure: Measure, off: Units | None, seed: int) -> dict[str, Any]:
    low, high = interval(measure.units, seed)
    row: dict[str, Any] = {
        "value": _round(measure.units.value),
        "interval": [_round(low), _round(high)],
        "units": len(measure.units.template),
        "templates": len(set(measure.units.template)),
        "sum": _round(float(measure.units.numerator.sum())),
        "of": _round(float(measure.units.denominator.sum())),
    }
    if off is not None:
        change = compare(off, measure.units, measure.how, seed)
        row["how"] = measure.how
        row["change"] = _round(change.value)
        row["change_interval"] = [_round(change.low), _round(change.high)]
    return row


def _round(value: float) -> float | None:
    """Round for the file; JSON has no NaN."""
    return float(f"{value:.5g}") if math.isfinite(value) else None


def markdown(result: Mapping[str, Any]) -> str:
    """Return one table per measure, arms as rows."""
    norms = {arm["name"]: arm["edit_norm"] for arm in result["arms"]}
    parts = []
    for name in result["measures"][OFF]:
        lines = [
            f"**{name[0].upper()}{name[1:]}**",
            "",
            "| arm | norm of edit | value | change from off | 95 % |",
            "|---|--:|--:|--:|---|",
        ]
        for arm, rows in result["measures"].items():
            row = rows[name]
            norm = norms.get(arm)
            cells = [
                arm,
                f"{norm:.1f}" if norm else "",
                _number(row["value"]),
                _change(row, row.get("change")),
                " to ".join(_change(row, x) for x in row.get("change_interval", ())),
            ]
            lines.append(f"| {' | '.join(cells)} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _change(row: Mapping[str, Any], value: float | None) -> str:
    if value is None:
        return "-" if "change" in row else ""
    return f"{value:+.1%}" if row["how"] == "ratio" else f"{value:+.4f}"
