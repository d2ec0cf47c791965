"""Golden messages: what is written in a feature set, what is said of it."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import yaml

from saeguard.features.files import (
    KIND,
    FeatureSetError,
    read_feature_file,
    read_feature_set_file,
)
from saeguard.yaml_files.findings import Finding
from saeguard.yaml_files.writer import as_yaml

GOLDEN = Path(__file__).with_name("messages.txt")
ATTACKS = Path("tests/policy/attacks")
GOOD = f"""\
schema: saeguard.features/v1
id: demo
title: Unsafe code
model:
  name: tiny
  hidden_size: 8
  num_layers: 2
sae:
  path: sae
  sha256: {"a" * 64}
  layer: 1
  d_in: 8
  d_sae: 16
exclude_tokens: [0, 1]
features:
  shell_exec:
    title: Shell commands
    behaviour: unsafe_code
    detect: {{3: 1.0, 4: 1.5e-05}}
    clamp: {{3: 1.0}}
    low: 0.0
    high: 2.0
    threshold: 0.5
    evidence: {{auroc: 0.97, note: for people}}
"""


def blocks() -> list[str]:
    """Return the blocks of the golden file."""
    return GOLDEN.read_text().split("\n\n")[1:]


def findings(folder: Path, text: str | bytes) -> tuple[Finding, ...]:
    """Return what is wrong with a feature set of this text."""
    path = folder / "demo.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    try:
        read_feature_file(path)
    except FeatureSetError as error:
        return error.errors
    return ()


def said(folder: Path, block: str) -> str:
    """Return a block as it should be, with today's messages."""
    change = [line for line in block.splitlines() if line.startswith(("- ", "+ "))]
    old = "".join(f"{line[2:]}\n" for line in change if line.startswith("- "))
    new = "".join(f"{line[2:]}\n" for line in change if line.startswith("+ "))
    assert old in GOOD, old
    found = findings(folder, GOOD.replace(old, new, 1))
    return "\n".join([*change, *(f.render().replace(f"{folder}/", "") for f in found)])


def test_the_good_set_is_good(tmp_path: Path) -> None:
    """Every message below comes of its change alone."""
    assert findings(tmp_path, GOOD) == ()


@pytest.mark.parametrize("block", blocks(), ids=lambda block: block.split("[")[1].split("]")[0])
def test_message(tmp_path: Path, block: str) -> None:
    """Each mistake is found where it stands, in words that say what to do."""
    assert said(tmp_path, block) == block.rstrip("\n")


def test_all_at_once(tmp_path: Path) -> None:
    """Mistakes do not hide one another."""
    text = GOOD.replace("title: Shell", "titel: Shell").replace("low: 0.0", "low: no")
    found = findings(tmp_path, text.replace("hidden_size: 8", "hidden_size: eight"))

    assert [(f.line, f.code) for f in found] == [
        (6, "wrong-type"),
        (16, "missing-key"),
        (17, "unknown-key"),
        (21, "ambiguous-value"),
    ]


@pytest.mark.parametrize("path", sorted(ATTACKS.glob("*.yaml")), ids=lambda path: path.stem)
def test_hostile_files_are_refused(tmp_path: Path, path: Path) -> None:
    """Bombs, tags, aliases, directives and the like are refused, as among policies."""
    assert findings(tmp_path, path.read_bytes())


def test_the_caps_hold(tmp_path: Path) -> None:
    """Size, depth and number of values are bounded."""
    deep = GOOD.replace("{auroc: 0.97, note: for people}", "{a: " * 12 + "1" + "}" * 12)
    many = GOOD.replace("[0, 1]", "[" + "0, " * KIND.max_values + "0]")

    assert findings(tmp_path, GOOD + "#" * KIND.max_bytes)[0].code == "too-large"
    assert findings(tmp_path, deep)[0].code == "too-deep"
    assert findings(tmp_path, many)[0].code == "too-many-values"


def test_templates_too(tmp_path: Path) -> None:
    """A mistake in a template has a place as well."""
    text = "schema: saeguard.feature-template/v1\nid: t\ntitle: T\nfeatures:\n  x: {titel: a}\n"
    found = findings(tmp_path, text)

    assert (5, 7, "unknown-key") in [(f.line, f.column, f.code) for f in found]


@pytest.mark.parametrize("text", ["no", "1e9", "y", "0o17", "null", "1:30", "a: b", "\x1b[1m", "é"])
def test_any_text_can_be_written(tmp_path: Path, text: str) -> None:
    """What is saved can be loaded, whatever a snippet holds."""
    content = yaml.safe_load(GOOD) | {"title": text}
    path = tmp_path / "demo.yaml"
    path.write_text(as_yaml(content))

    assert read_feature_set_file(path).title == text.replace("\x1b", "\ufffd")


if __name__ == "__main__":  # python -m tests.features.test_messages writes today's messages
    with TemporaryDirectory() as name:
        rewritten = [said(Path(name), block) for block in blocks()]
    heading = GOLDEN.read_text().split("\n\n")[0]
    GOLDEN.write_text("\n\n".join([heading, *rewritten]) + "\n")
