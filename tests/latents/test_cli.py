"""The verbs that look at latents: a table for people, JSON for programs, errors that help."""

from __future__ import annotations

import json
from typing import Any

from typer.testing import CliRunner

from saeguard.cli.features import verb
from tests.latents.made import TEXTS, Made


def run(*arguments: object, code: int = 0) -> str:
    """Run a verb of `saeguard features`, and return what it printed."""
    result = CliRunner().invoke(verb, [str(a) for a in arguments])
    assert result.exit_code == code, result.output
    return result.stdout if code == 0 else result.output


def as_json(*arguments: object) -> Any:
    """Run a verb with --json, and return what it printed."""
    return json.loads(run(*arguments, "--json"))


def test_index(made: Made) -> None:
    """A folder of texts becomes an index; figures are printed."""
    out = made.root / "cli.duckdb"
    common = ("index", made.root, "--model", made.root / "model", "--out", out)
    facts = as_json(*common, "--set", made.features.path)
    assert facts["texts"] == TEXTS
    assert facts["latents"] == 64
    out.unlink()
    words = run(*common, "--sae", made.info.path)
    assert f"tokens of {TEXTS} texts; of 64 latents" in words

    assert "expected one of them" in run(*common, code=2)
    assert "holds no *.jsonl file" in run(
        "index", made.info.path, *common[2:], "--sae", made.info.path, code=2
    )


def common(made: Made) -> tuple[object, ...]:
    """Return the options that name model, set and index."""
    return ("--model", made.root / "model", "--set", made.features.path, "--index", made.index)


def test_search_by_prompt(made: Made) -> None:
    """On in two prompts and off in a third; by rarity, by position; in words and in JSON."""
    found = as_json(
        "search", *common(made), "--prompt", "ab#", "--prompt", "b#c", "--without", "h", "--top", 4
    )
    assert 0 < len(found["latents"]) <= 4
    assert len(found["latents"][0]["prompts"]) == 2
    assert len(found["latents"][0]["tokens"]) == 10
    rare = as_json("search", *common(made), "--prompt", "ab#", "--by", "specific")
    shares = [row["background"] for row in rare["latents"]]
    assert shares == sorted(shares)
    positions = as_json("search", *common(made), "--prompt", "ab#", "--by", "position")
    assert positions["tokens"][0]["latents"] == []  # BOS
    assert positions["tokens"][-1]["latents"][0]["activation"] > 0
    table = run("search", *common(made), "--prompt", "[bold]a", "--by", "position")
    assert "left out: special" in table
    assert "'['" in table
    named = as_json("search", *common(made), "--prompt", "ab#", "--top", 64)
    assert any(row["features"] == ["loud"] for row in named["latents"])


def test_what_does_not_go_together_is_refused(made: Made) -> None:
    """Each message says what to give."""
    model_and_set = common(made)[:4]
    assert "give --index or --benign" in run(
        "search", *model_and_set, "--prompt", "a", "--by", "specific", code=2
    )
    assert "give --prompt, or --data" in run("search", *model_and_set, code=2)
    assert "expected no --data" in run(
        "search", *model_and_set, "--prompt", "a", "--data", made.corpus, code=2
    )
    assert "expected one --prompt" in run(
        "search", *common(made), "--prompt", "a", "--prompt", "b", "--by", "position", code=2
    )
    assert "give --prompt and --target, or --data" in run("attribute", *model_and_set, code=2)
    assert "--target: missing" in run("attribute", *model_and_set, "--prompt", "a", code=2)
    assert "'ab' is 2: 'a', 'b'" in run(
        "ablate", *model_and_set, "--prompt", "a", "--target", "ab", code=2
    )
    assert "give --index" in run("steer", 1, *model_and_set, "--prompt", "a", code=2)
    assert "there is no latent 64" in run("steer", 64, *common(made), "--prompt", "a", code=2)


def test_neighbours(made: Made) -> None:
    """Both sides are shown; the map has the latent and its neighbours."""
    found = as_json("neighbours", 1, "--set", made.features.path, "--most", 6, "--map")
    assert len(found["neighbours"]) == 6
    assert found["map"][0]["latent"] == 1
    assert len(found["map"]) == 7
    across = as_json("neighbours", 1, "--sae", made.info.path, "--other", made.info.path)
    assert across["neighbours"][0] == {
        "latent": 1, "decoder": 1.0, "encoder": 1.0, "features": [],
    }  # fmt: skip
    assert "decoder cosine" in run("neighbours", 1, "--set", made.features.path)


def test_coactivate(made: Made) -> None:
    """Latents that fire together, by lift."""
    found = as_json("coactivate", 1, "--index", made.index, "--least", 3)
    lifts = [row["lift"] for row in found["latents"]]
    assert lifts == sorted(lifts, reverse=True)
    assert "lift" in run("coactivate", 1, "--index", made.index, "--set", made.features.path)


def test_attribute_ablate_and_steer(made: Made) -> None:
    """Effects on a prompt's next token; the two estimates are compared; answers side by side."""
    target = ("--prompt", "ab#cab#c", "--target", "a", "--against", "b")
    found = as_json("attribute", *common(made), *target, "--most", 5)
    assert len(found["entries"]) == 5
    effects = [abs(row["effect"]) for row in found["entries"]]
    assert effects == sorted(effects, reverse=True)
    assert "the effects of all latents add up to" in run(
        "attribute", *common(made), *target, "--steps", 4
    )
    checked = as_json("ablate", *common(made), *target, "--most", 8)
    assert len(checked["latents"]) == 8
    assert -1 <= checked["correlation"]["pearson"] <= 1
    assert "Pearson" in run("ablate", *common(made), *target, "--latent", 1, "--latent", 2)
    steered = as_json(
        "steer", 1, *common(made), "--prompt", "ab", "--scale", 0, "--scale", 9, "--max-tokens", 4
    )
    assert [arm["scale"] for arm in steered["arms"]] == [None, 0.0, 9.0]
    assert all(arm["loss"] > 0 for arm in steered["arms"])
