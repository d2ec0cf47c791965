"""The documentation holds: its examples load, its messages are those of today."""

from __future__ import annotations

import re
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from saeguard.cli.run_tests import run
from saeguard.policy.schema import PolicyFile
from saeguard.policy_tools.test_cases import read_cases
from saeguard.yaml_files.findings import render_all
from tests.policy.example import read_policy

LANGUAGE = Path("docs/policy-language.md")
ERRORS = Path("docs/policy-errors.md")

EXAMPLES = re.findall(r"^```yaml\n(.*?)^```$", LANGUAGE.read_text(), re.DOTALL | re.MULTILINE)
COMPLETE, *FRAGMENTS = [text for text in EXAMPLES if "saeguard.test/v1" not in text]
LAST = LANGUAGE.read_text().index("## Tests")
MISTAKE = re.compile(r"^```diff\n(.*?)^```\n\n```text\n(.*?)^```$", re.DOTALL | re.MULTILINE)
MISTAKES = MISTAKE.findall(ERRORS.read_text())


def with_fragment(fragment: str) -> str:
    """Return the complete example with the keys of a fragment in place of its own."""
    text = COMPLETE
    for key in re.findall(r"^(\w+):", fragment, re.MULTILINE):
        text = re.sub(rf"^{key}:.*\n(?: .*\n)*", "", text, flags=re.MULTILINE)
    return text + fragment


def told(folder: Path, diff: str) -> str:
    """Return what is said of the complete example with a change."""
    lines = diff.splitlines()
    old = "".join(f"{line[2:]}\n" for line in lines if line.startswith("- "))
    new = "".join(f"{line[2:]}\n" for line in lines if line.startswith("+ "))
    assert old in COMPLETE
    path = folder / "shell-injection.yaml"
    path.write_text(COMPLETE.replace(old, new, 1))
    _, errors = read_policy(path)
    return f"{render_all(errors)}\n".replace(f"{folder}/", "policies/unsafe-code/")


def examples_with_tests() -> list[tuple[str, str]]:
    """Return the test files of the documentation, each with the policy that it is about.

    That is the complete example with the fragment above it; at the end, the complete example.
    """
    found: list[tuple[str, str]] = []
    policy = COMPLETE
    for text in EXAMPLES[1:]:
        if "saeguard.test/v1" not in text:
            policy = with_fragment(text)
        elif LANGUAGE.read_text().index(text) > LAST:
            found.append((COMPLETE, text))
        else:
            found.append((policy, text))
    return found


@pytest.mark.parametrize("example", [COMPLETE, *map(with_fragment, FRAGMENTS)])
def test_examples_load(tmp_path: Path, example: str) -> None:
    """Each example is a policy, or turns the first one into another."""
    path = tmp_path / "p.yaml"
    path.write_text(example)

    policy, errors = read_policy(path)

    assert [error.render() for error in errors] == []
    assert policy is not None


@pytest.mark.parametrize(("example", "tests"), examples_with_tests())
def test_example_tests_pass(tmp_path: Path, example: str, tests: str) -> None:
    """Each test file of the documentation passes on its policy."""
    (tmp_path / "p.yaml").write_text(example)
    (tmp_path / "p.test.yaml").write_text(tests)
    policy, _ = read_policy(tmp_path / "p.yaml")
    assert policy is not None

    cases, errors = read_cases(tmp_path / "p.test.yaml", policy)

    assert [error.render() for error in errors] == []
    assert [run(policy, case).complaint for case in cases] == ["", ""]


def test_there_are_tests_of_each_way_to_look_at_several_tokens() -> None:
    """Windows, means, points, counts and the last token have an example that runs."""
    assert len(examples_with_tests()) == 6


def test_every_key_has_a_row() -> None:
    """The table of keys is complete and says which are needed."""
    rows = dict(
        re.findall(r"^\| `(\w+)` \| (yes|no|with [^|]+) \|", LANGUAGE.read_text(), re.MULTILINE)
    )
    fields = {f.alias or name: f for name, f in PolicyFile.model_fields.items()}

    assert list(rows) == list(fields)
    assert {key for key, needed in rows.items() if needed == "yes"} == {
        key for key, field in fields.items() if field.is_required()
    }


@pytest.mark.parametrize(("diff", "messages"), MISTAKES)
def test_messages(tmp_path: Path, diff: str, messages: str) -> None:
    """Each message is what the tool says today."""
    assert told(tmp_path, diff) == messages


def test_ten_mistakes() -> None:
    """There are ten mistakes to learn from."""
    assert len(MISTAKES) == 10


if __name__ == "__main__":  # python -m tests.policy.test_docs writes today's messages
    with TemporaryDirectory() as name:
        ERRORS.write_text(
            MISTAKE.sub(
                lambda m: f"```diff\n{m[1]}```\n\n```text\n{told(Path(name), m[1])}```",
                ERRORS.read_text(),
            )
        )
