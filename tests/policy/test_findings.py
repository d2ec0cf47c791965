"""Golden messages of what needs more than one file: folders, feature sets, tests, the calendar.

`tests/policy/messages.txt` has those of a policy file alone. Together they show every code.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import get_args

import pytest

from saeguard.cli.check import of_other_model
from saeguard.cli.feature_folder import read_feature_sets
from saeguard.cli.run_tests import run
from saeguard.cli.test import gather
from saeguard.policy.errors import PolicyErrors
from saeguard.policy.files import MAX_FILES
from saeguard.policy.lint import of_feature_set, resolve
from saeguard.policy.load import read_policies
from saeguard.policy_tools.formatter import laid_out
from saeguard.policy_tools.test_cases import missing_tests
from saeguard.yaml_files.codes import Code
from saeguard.yaml_files.findings import Finding, in_order
from tests.cli.project import BOTH, FEATURES, ONE, SET
from tests.policy.example import GOOD
from tests.policy_tools.test_test_cases import CASES

GOLDEN = Path(__file__).with_name("findings.txt")
MESSAGES = Path(__file__).with_name("messages.txt")
FEATURE_SETS = Path("tests/features/messages.txt")
PAGES = sorted(Path("docs/errors").glob("*.md"))
TODAY = date(2026, 6, 1)

TEMPLATE = """\
schema: saeguard.feature-template/v1
id: demo/unsafe-code
title: Unsafe code
features:
  shell_exec: {title: a, behaviour: b, positives: c, negatives: d}
  string_built: {title: a, behaviour: b, positives: c, negatives: d}
"""

RATE = "{rate: 0.9, interval: [0.8, 0.95], hits: 90, tokens: 100}"
STAND_IN = f"{{threshold: 1.5, precision: {RATE}, recall: {RATE}}}"
APPROXIMATE = FEATURES.replace(
    "d_sae: 16",
    "d_sae: 16, topk: approximate, topk_measured: {k: 4, "
    f"sha256: {'a' * 64}, texts_sha256: {'b' * 64}, texts: 20, tokens: 1200, "
    f"latents: {{3: {STAND_IN}, 4: {STAND_IN}}}}}",
)

CHANCE = "holdout: {auroc: 0.531, interval: [0.42, 0.64]}, tpr_holdout: {rate: 0.4}"
RANDOM = "holdout: {auroc: 0.7, interval: [0.6, 0.8]}, compared: {random_group: {auroc: 0.72}}"


def evidence(text: str) -> str:
    """Return the set in which the first feature's evidence is this."""
    return FEATURES.replace("threshold: 0.5", f"threshold: 0.5\n    evidence: {{{text}}}", 1)


Scene = Callable[[Path], Iterable[Finding]]


def check(folder: Path, policy: str | bytes = GOOD, features: str = FEATURES) -> list[Finding]:
    """Return what `saeguard check` says of a policy and its feature set."""
    (folder / "p.yaml").write_bytes(policy if isinstance(policy, bytes) else policy.encode())
    (folder / "sets" / SET).parent.mkdir(parents=True, exist_ok=True)
    (folder / "sets" / SET).write_text(features)
    policies, errors = read_policies(folder / "p.yaml")
    sets = read_feature_sets(folder / "sets" / "feature_sets")
    known = [p for p in policies if p.feature_set not in sets.broken]
    found = resolve(known, sets.known, templates=sets.templates, today=TODAY)
    of_sets = [e for p in known for d in [sets.known.get(p.feature_set)] if d
               for e in of_feature_set(p, d)]  # fmt: skip
    return [*errors, *sets.mistakes, *found, *of_sets]


def in_folder(change: Callable[[Path], object]) -> Scene:
    """Return what is said of a folder of policies after a change."""

    def scene(folder: Path) -> list[Finding]:
        (folder / "policies").mkdir()
        change(folder / "policies")
        return read_policies(folder / "policies")[1]

    return scene


def in_tests(old: str, new: str) -> Scene:
    """Return what is said of a test file with a change, or of its failing cases."""

    def scene(folder: Path) -> list[Finding]:
        (folder / "p.yaml").write_text(GOOD)
        assert old in CASES
        (folder / "p.test.yaml").write_text(CASES.replace(old, new, 1))
        policies, _ = read_policies(folder / "p.yaml")
        cases, errors, absent = gather([folder], policies, require_tests=True)
        results = [run(policy, case) for policy, case in cases]
        failed = [r.finding() for r in results if r.status in {"failed", "passes"}]
        return [*errors, *absent, *failed]

    return scene


def other_model(folder: Path) -> list[Finding]:
    """Return what is said where the server's model has another shape."""
    assert check(folder) == []
    (folder / "llama").mkdir()
    (folder / "llama" / "config.json").write_text('{"hidden_size": 8, "num_hidden_layers": 4}')
    sets = read_feature_sets(folder / "sets" / "feature_sets")
    return list(of_other_model(read_policies(folder / "p.yaml")[0], sets, folder / "llama"))


def orphan(folder: Path) -> list[Finding]:
    """Return what is said of a test file without its policy."""
    (folder / "q.test.yaml").write_text(CASES)
    return gather([folder], [], require_tests=False)[2]


def untested(folder: Path) -> list[Finding]:
    """Return what is said of a policy without tests."""
    (folder / "p.yaml").write_text(GOOD)
    return [missing_tests(policy) for policy in read_policies(folder / "p.yaml")[0]]


def many(folder: Path) -> list[Finding]:
    """Return what is said of more files than may be."""
    for i in range(MAX_FILES + 1):
        (folder / f"{i}.yaml").touch()
    return read_policies(folder)[1]


def link_back(folder: Path) -> None:
    """Make a link to the folder it lies in."""
    (folder / "up").symlink_to(folder)
    (folder / "p.yaml").write_text(GOOD)


def twice(folder: Path) -> None:
    """Write one policy under two names."""
    (folder / "a.yaml").write_text(GOOD)
    (folder / "b.yaml").write_text(GOOD)


CLAMP = "action: clamp\nclamp: {features: [shell_exec], to: 0}"
TRACE = "    prompt_tokens: 2\n    shares: {shell_exec: 0.1 0.2x5}\n"
RECORDED = "    recording: p.safetensors\n    recorded_text: t\n"

MORE = (
    "  - {name: more, todo: true, prompt_tokens: 0, expect: match, "
    "shares: {shell_exec: 0.9x8, string_built: 0.9x8}}"
)

SCENES: dict[str, Scene] = {
    "a path that is not there": lambda f: read_policies(f / "polices")[1],
    "a folder without policies": in_folder(lambda f: f),
    "a file that cannot be read": in_folder(lambda f: (f / "p.yaml").symlink_to("p.yaml")),
    "a file that would be overlooked": in_folder(lambda f: (f / "p.yml").write_text(GOOD)),
    "a link to a folder above": in_folder(link_back),
    "one id and mode twice": in_folder(twice),
    "too many files": many,
    "too large a file": lambda f: check(f, GOOD + "#" * 70_000),
    "not UTF-8": lambda f: check(f, GOOD.encode() + "# é".encode("latin-1")),
    "an invisible character": lambda f: check(f, GOOD.replace("shell command", "shell\u202e")),
    "an empty file": lambda f: check(f, "# nothing yet\n"),
    "nested too deep": lambda f: check(f, GOOD + "x: " + "[" * 12),
    "too many values": lambda f: check(f, "x: [" + "1, " * 5000 + "1]"),
    "nested conditions": lambda f: check(f, ONE.replace("condition: shell", f"condition: {'(' * 14}shell{')' * 14}")),  # noqa: E501
    "an unknown feature set": lambda f: check(f, GOOD.replace("demo/unsafe-code", "demo/unsafe")),
    "an unknown feature": lambda f: check(f, GOOD.replace("shell_exec", "shel_exec")),
    "a feature that cannot be clamped": lambda f: check(f, BOTH.replace("action: flag", CLAMP)),
    "a broken feature set": lambda f: check(f, GOOD, FEATURES.replace("low: 0.0", "low: 3.0")),
    "features that nobody has calibrated": lambda f: check(f, BOTH, TEMPLATE),
    "and enforced all the same": lambda f: check(f, BOTH.replace("shadow", "enforce"), TEMPLATE),
    "published latents that would act": lambda f: check(
        f,
        BOTH.replace("shadow", "enforce"),
        FEATURES.replace("model:", "status: published\nmodel:"),
    ),
    "ranks that are approximated": lambda f: check(f, BOTH, APPROXIMATE),
    "an approximation that nobody measured": lambda f: check(
        f, BOTH, FEATURES.replace("d_sae: 16", "d_sae: 16, topk: approximate")
    ),
    "a feature that tells nothing": lambda f: check(f, BOTH, evidence(CHANCE)),
    "and enforced without a reason": lambda f: check(
        f, BOTH.replace("shadow", "enforce"), evidence(CHANCE)
    ),
    "or with one": lambda f: check(
        f, BOTH.replace("mode: shadow", "mode: enforce\naccept_weak: a drill"), evidence(CHANCE)
    ),
    "a reason without need": lambda f: check(
        f, BOTH.replace("mode: shadow", "mode: shadow\naccept_weak: a drill")
    ),
    "no better than random latents": lambda f: check(f, BOTH, evidence(RANDOM)),
    "a threshold that hardly a positive exceeds": lambda f: check(f, BOTH, evidence("reach: 0.55")),
    "a window that hardly a positive passes": lambda f: check(
        f, BOTH, evidence("tpr_holdout: {rate: 0.012}, window: 3 of 8")
    ),
    "a threshold above the range": lambda f: check(f, BOTH.replace("0.6", "1.2")),
    "an edit longer than the residual": lambda f: check(
        f,
        BOTH.replace("action: flag", CLAMP.replace("0}", "5}")),
        evidence("edit: {per_activation: 12.0, residual: 98.4}").replace(
            "detect: {3: 1.0}", "detect: {3: 1.0}\n    clamp: {3: 1.0}"
        ),
    ),
    "a set that is still to be calibrated": lambda f: check(
        f, BOTH, FEATURES.replace("    low: 0.0\n    high: 2.0\n    threshold: 0.5\n", "", 1)
    ),
    "a feature set of another model": other_model,
    "an expired exception": lambda f: check(f, GOOD.replace("2027-03-31", "2026-03-31")),
    "a day of review that has passed": lambda f: check(f, GOOD.replace("2027-02-01", "2026-02-01")),
    "an enforced policy on the user's messages": lambda f: check(
        f, BOTH.replace("shadow", "enforce").replace("scope: output", "scope: user")
    ),
    "what `new` left to do": lambda f: check(f, GOOD.replace("title: ", "title: TODO ")),
    "no tests": untested,
    "tests without their policy": orphan,
    "tests of another policy": in_tests("policy: unsafe-code.shell", "policy: other.shell"),
    "tests that only match": in_tests("expect: no_match", "expect: match"),
    "a trace that cannot be read": in_tests("0x2 0.9x3 0", "0x2 0.9*3 0"),
    "tokens given in two ways": in_tests("prompt_tokens: 2", "prompt_tokens: 2\n    prompt: a"),
    "a recording that is not there": in_tests(TRACE, RECORDED),
    "an expectation that cannot be": in_tests("first_token: 4", "first_token: 6"),
    "a case that fails": in_tests("first_token: 4", "first_token: 3"),
    "a flag that is none": in_tests("expect: match", "expect: match\n    todo: 3"),
    "a case that is to do, and passes": in_tests("  - name: stays", f"{MORE}\n  - name: stays"),
}  # fmt: skip


def told(name: str) -> str:
    """Return what is said in one scene, under its name."""
    with TemporaryDirectory() as folder:
        errors = in_order(SCENES[name](Path(folder)))
        messages = "\n".join(error.render() for error in errors)
    return f"== {name}\n{messages}".replace(f"{folder}/", "").replace(folder, "policies")


@pytest.mark.parametrize("name", SCENES)
def test_message(name: str) -> None:
    """Each is told in words that say what to do."""
    assert told(name) in GOLDEN.read_text().rstrip("\n").split("\n\n")


def test_every_code_has_a_golden_message() -> None:
    """No kind of mistake is without a message that was looked at.

    But for the one that stands for any other: no file is known to bring it out.
    """
    texts = [path.read_text() for path in (GOLDEN, MESSAGES, FEATURE_SETS, *PAGES)]
    shown = set(re.findall(r"\[([a-z0-9-]+)\]: ", "".join(texts)))

    assert set(get_args(Code)) - shown == {"invalid-value"}


def test_layout_tells_the_same(tmp_path: Path) -> None:
    """`fmt` refuses what `check` refuses, in the same words."""
    [error] = check(tmp_path, "id: [")

    with pytest.raises(PolicyErrors) as caught:
        laid_out(tmp_path / "p.yaml", b"id: [")

    assert caught.value.errors == (error,)


if __name__ == "__main__":  # python -m tests.policy.test_findings writes today's messages
    GOLDEN.write_text("\n\n".join(told(name) for name in SCENES) + "\n")
