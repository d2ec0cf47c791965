"""The tables of what the guard costs are made by a command."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import cost_tables


def results() -> dict[str, object]:
    """Return the part of a result that the tables show."""
    states = {
        state: {"step_ms": 20.0, "host_us": us, "host_share": us / 20_000}
        for state, us in (("idle", 6.0), ("armed", 100.0), ("firing", 101.0), ("clamping", 500.0))
    }
    return {
        "machine": {"cpu": "Some CPU", "cores": 2, "torch_threads": 2},
        "versions": {"vllm": "0.32.0"},
        "revision": "0123456789ab",
        "date": "2026-11-29T10:00:00+00:00",
        "model": {
            "parameters": 222e6,
            "watch_list": {"policies": {"armed": 8}, "latents": 32, "d_sae": 65_536},
        },
        "batches": {"8": states},
        "reference": [{"rows": 8, "full_us": 31_600.0}],
    }


def test_the_command_writes_both_tables(tmp_path: Path) -> None:
    """With machine, date and revision, and without touching the rest of the pages."""
    (tmp_path / "docs").mkdir()
    for page in cost_tables.PAGES:
        (tmp_path / page).write_text(
            f"before\n{cost_tables.BEGIN}\nold\n{cost_tables.END}\nafter\n"
        )

    cost_tables.document(results(), tmp_path)

    for page, states in cost_tables.PAGES.items():
        text = (tmp_path / page).read_text()
        assert text.startswith(f"before\n{cost_tables.BEGIN}\n8 policies on 32 of 65,536 latents")
        assert text.endswith(f"{cost_tables.END}\nafter\n")
        assert "| 8 | 20 ms | 6 µs | 100 µs (0.50 %) |" in text
        assert ("101 µs" in text) == ("firing" in states)
        assert "2026-11-29, revision `0123456789ab`" in text
        assert "old" not in text


def test_a_page_without_markers_is_named(tmp_path: Path) -> None:
    """Nothing is written into a page that has no place for the table."""
    (tmp_path / "README.md").write_text("no table here\n")
    with pytest.raises(ValueError, match=r"README.md: needs one line"):
        cost_tables.document(results(), tmp_path)
