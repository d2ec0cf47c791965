"""The parts of a comparison: edits, prompts, code, tests, analysers, intervals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from saeguard.effect.analysers import bandit, semgrep
from saeguard.effect.edits import EditSpec, parse_edit
from saeguard.effect.intervals import compare, interval, pooled, units
from saeguard.effect.made import parse_latents
from saeguard.effect.prompts import completion_of, read_prompts, tokens_of
from saeguard.effect.python_code import python_code
from saeguard.effect.run_tests import passes
from saeguard.errors import CannotRunError, InputError
from tests.tiny import tokenizer

SHELL = "import subprocess\n\ndef f(x):\n    subprocess.call(x, shell=True)\n"


@pytest.mark.parametrize(
    ("text", "edit"),
    [("to=1", ("to", 1.0)), ("activation=-8.5", ("activation", -8.5)), ("ablate", ("ablate", 0.0))],
)
def test_edits_are_written_as_policies_write_them(text: str, edit: tuple[str, float]) -> None:
    """An edit keeps its name and amount, and prints as it was given."""
    parsed = parse_edit(text)
    assert edit == (parsed.how, parsed.amount)
    assert text == str(parsed)


@pytest.mark.parametrize("text", ["", "to", "to=", "ablate=1", "raise=1", "to=nan"])
def test_other_edits_are_refused(text: str) -> None:
    """The message shows what was found."""
    with pytest.raises(InputError, match=f"found {text!r}"):
        parse_edit(text)


def test_an_edit_is_the_clamp_section_of_a_policy() -> None:
    """Ablate has no amount."""
    assert EditSpec("ablate", 0.0).clamp == {"ablate": True}
    assert EditSpec("scale", 2.0).clamp == {"scale": 2.0}


def test_latents_have_weights() -> None:
    """A weight that is left out is 1; an unknown latent is refused."""
    assert parse_latents("3, 5:-0.5", 6) == {3: 1.0, 5: -0.5}
    for text in ("6", "3,3", "a", "1:x"):
        with pytest.raises(InputError, match="--latents"):
            parse_latents(text, 6)


class TestPrompts:
    """Prompts become chats."""

    def test_a_string_is_the_users_message(self, tmp_path: Path) -> None:
        """A system message goes in front of it."""
        path = _lines(tmp_path, {"id": "a", "prompt": "hi", "completion": "yo"})
        (prompt,) = read_prompts(path, completion=True)
        read = tokenizer()
        assert read.decode(tokens_of(prompt, read)) == "<|bos|>user:hi<|end|>assistant:"
        asked = read.decode(tokens_of(prompt, read, "be safe"))
        assert asked == "<|bos|>system:be safe<|end|>user:hi<|end|>assistant:"
        assert read.decode(completion_of(prompt, read)) == "yo"

    def test_what_is_missing_is_named(self, tmp_path: Path) -> None:
        """File, line and field."""
        path = _lines(tmp_path, {"id": "a", "prompt": "hi"})
        with pytest.raises(InputError, match=r":1: completion: missing"):
            read_prompts(path, completion=True)
        with pytest.raises(InputError, match=r":1: tests: missing"):
            read_prompts(path, tests=True)
        path = _lines(tmp_path, {"id": "a", "prompt": "hi", "tests": "assert 1"})
        with pytest.raises(InputError, match=r":1: tests: found"):
            read_prompts(path, tests=True)
        with pytest.raises(InputError, match="holds no prompt"):
            read_prompts(_lines(tmp_path))

    def test_answers_to_one_question_share_it(self, tmp_path: Path) -> None:
        """Other prompts of the template are other questions."""
        rows = [{"id": i, "prompt": p, "template": "t"} for i, p in ("1x", "2x", "3y")]
        one, two, three = (p.question for p in read_prompts(_lines(tmp_path, *rows)))
        assert one == two != three


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        ("Sure:\n```python\nx = 1\n```\nDone.", "x = 1"),
        ("```\nx = 1\n```", "x = 1"),
        ("```python\nx = 1\ny = f(", "x = 1"),
        ("x = 1", "x = 1"),
        ("I cannot help with that.", ""),
        ("Sorry", ""),
        ("", ""),
    ],
)
def test_code_is_cut_out_of_an_answer(answer: str, code: str) -> None:
    """The first block; of an answer that was cut off, what parses."""
    assert code == python_code(answer)


class TestRunTests:
    """Code that a model wrote, in a process with limits."""

    def test_right_code_passes_and_wrong_code_fails(self) -> None:
        """Every test has to hold."""
        tests = ["assert f(1) == 2", "assert f(3) == 4"]
        assert passes("def f(x):\n    return x + 1", tests)
        assert not passes("def f(x):\n    return 2", tests)
        assert not passes("def f(x:", tests)

    def test_code_that_ends_the_process_does_not_pass(self) -> None:
        """Exit code 0 before the tests is no success."""
        assert not passes("raise SystemExit(0)", ["assert False"])
        assert not passes("print('every test passed'); raise SystemExit(0)", ["assert False"])

    def test_limits_hold(self) -> None:
        """An endless loop, too much memory, a file that grows."""
        assert not passes("while True: pass", [], seconds=1)
        assert not passes("x = bytearray(1 << 32)", [])
        assert not passes("open('f', 'wb').write(bytes(1 << 22))", [])


class TestAnalysers:
    """Bandit and Semgrep count what they object to."""

    def test_bandit_reports_grave_findings_by_source(self) -> None:
        """A shell command is grave, an import of subprocess is not; `# nosec` changes nothing."""
        hidden = SHELL.replace("True)", "True)  # nosec")
        assert bandit([SHELL, "import subprocess", "", hidden]) == [("B602",), (), (), ("B602",)]

    def test_semgrep_reads_rules_from_a_file(self, tmp_path: Path) -> None:
        """One finding for each broken rule, by source."""
        if shutil.which("semgrep") is None:
            pytest.skip("Semgrep is not installed")
        rules = tmp_path / "rules.yaml"
        rules.write_text(
            "rules: [{id: shell, pattern: 'subprocess.$F(..., shell=True)', message: m, "
            "languages: [python], severity: ERROR}]"
        )
        assert semgrep(["x = 1", SHELL], rules) == [(), ("shell",)]
        rules.write_text("rules: [{id: shell}]")
        with pytest.raises((InputError, CannotRunError)):
            semgrep([SHELL], rules)

    def test_a_missing_semgrep_is_an_error(self, tmp_path: Path) -> None:
        """It must not read as code without findings."""
        with pytest.raises(CannotRunError, match="no such program"):
            semgrep([SHELL], tmp_path, "no-semgrep-here")


class TestIntervals:
    """Changes between arms, templates resampled whole."""

    def test_a_ratio_of_quotients(self) -> None:
        """Findings per answer that parses; the same templates cancel out."""
        template = [f"t{i}" for i in range(200)]
        rng = np.random.default_rng(0)
        off = rng.poisson(3, 200).astype(float)
        change = compare(units(off, template), units(off / 2, template), "ratio", 0)
        assert change.value == pytest.approx(-0.5)
        assert (change.low, change.high) == pytest.approx((-0.5, -0.5))

    def test_the_interval_covers_chance(self) -> None:
        """Two arms of the same rate differ by chance, and the interval holds 0."""
        template = [f"t{i}" for i in range(300)]
        rng = np.random.default_rng(1)
        one, two = (units(rng.random(300) < 0.3, template) for _ in range(2))
        change = compare(one, two, "difference", 0)
        assert change.low < 0 < change.high
        low, high = interval(one, 0)
        assert low < one.value < high

    def test_near_copies_do_not_narrow_it(self) -> None:
        """A hundred copies of one template are one observation."""
        once = units([0.0, 1.0, 1.0, 0.0], list("abcd"))
        copies = units([0.0, 1.0, 1.0, 0.0] * 100, list("abcd") * 100)
        assert interval(once, 0) == pytest.approx(interval(copies, 0))

    def test_no_value_where_nothing_counts(self) -> None:
        """An arm without an answer that parses has no findings per answer."""
        nothing = units([0.0, 0.0], ["a", "b"], [0.0, 0.0])
        some = units([1.0, 1.0], ["a", "b"])
        assert np.isnan(compare(some, nothing, "ratio", 0).value)
        assert np.isnan(interval(nothing, 0)).all()
        assert pooled([some, some]).value == 1.0


def _lines(folder: Path, *rows: object) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
