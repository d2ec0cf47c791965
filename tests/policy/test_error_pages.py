"""Every code has a page, and the page's example brings out that very code."""

from __future__ import annotations

import re
import shlex
import subprocess
from contextlib import chdir
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import get_args

import pytest

from saeguard.cli.check import of_other_model, unmatched
from saeguard.cli.feature_folder import read_feature_sets
from saeguard.cli.run_tests import run
from saeguard.cli.test import gather
from saeguard.features.files import FeatureSetError
from saeguard.features.load import load_feature_set
from saeguard.policy.lint import of_feature_set, resolve
from saeguard.policy.load import read_policies
from saeguard.policy_tools.test_cases import cases_path, missing_tests
from saeguard.sae import inspect
from saeguard.yaml_files.codes import Code, page
from saeguard.yaml_files.findings import Finding, in_order
from tests.cli.project import record
from tests.features.planted import save_sae

PAGES = Path("docs/errors").resolve()
NAMES = sorted(path.stem for path in PAGES.glob("*.md") if path.stem != "index")
WITHOUT_EXAMPLE = "invalid-value"
PROJECT = re.findall(
    r"^`([\w./-]+)`:\n\n```yaml\n(.*?)^```$",
    (PAGES / "index.md").read_text(),
    re.MULTILINE | re.DOTALL,
)
SHOWN_DIGEST = "0" * 64
"""Stands on the pages for the digest of the example's SAE."""
EXAMPLE = re.compile(r"^```(diff|sh)\n(.*?)^```\n\n```text\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SET = Path("feature_sets/demo/code.yaml")


def project(folder: Path) -> str:
    """Write the example of the index page, and return the digest of its SAE."""
    save_sae(folder / "sae")
    digest = inspect(folder / "sae").sha256
    for name, text in PROJECT:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.replace(SHOWN_DIGEST, digest))
    with chdir(folder):
        apart = {"a": ([0, 0, 0.2, 0.9], [0, 0, 0.7, 0]), "b": ([0, 0.1, 0, 0], [0, 0.2, 0, 0])}
        record(Path("unsafe.safetensors"), apart, of=SET)
    return digest


def change(folder: Path, diff: str, digest: str) -> None:
    """Apply the changes of a page, each to the file that its first line names."""
    for part in re.split(r"^--- ", diff, flags=re.MULTILINE)[1:]:
        name, *lines = part.replace(SHOWN_DIGEST, digest).splitlines()
        old, new = (
            "".join(f"{line[2:]}\n" for line in lines if line.startswith(sign))
            for sign in ("- ", "+ ")
        )
        text = (folder / name).read_text()
        assert old in text, old
        (folder / name).write_text(text.replace(old, new, 1))


def checked(arguments: list[str]) -> list[Finding]:
    """Return what `saeguard check` with these arguments says in the present folder."""
    given = {"llama", "unsafe.safetensors"}
    paths = [Path(a) for a in arguments if not a.startswith("--") and a not in given]
    policies, found = read_policies(*(paths or [Path("policies")]))
    sets = read_feature_sets(Path("feature_sets"))
    referring = [p for p in policies if p.feature_set not in sets.broken]
    found += [*sets.mistakes, *resolve(referring, sets.known, templates=sets.templates)]
    for policy in referring:
        if policy.feature_set in sets.known:
            found += of_feature_set(policy, sets.known[policy.feature_set])
    if "--model" in arguments:
        found += of_other_model(referring, sets, Path("llama"))
    if "--corpus" in arguments:
        found += unmatched(referring, sets, Path("unsafe.safetensors"), None, Path("feature_sets"))
    if "--require-tests" in arguments:
        found += [missing_tests(p) for p in policies if not cases_path(p.path).exists()]
    return found


def run_tests() -> list[Finding]:
    """Return what `saeguard test` says in the present folder."""
    policies, _ = read_policies(Path("policies"))
    cases, errors, absent = gather([Path("policies")], policies, require_tests=False)
    results = [run(policy, case) for policy, case in cases]
    return [*errors, *absent, *(r.finding() for r in results if r.status in {"failed", "passes"})]


def loaded() -> list[Finding]:
    """Return what keeps the feature set from being loaded, its checkpoint included."""
    try:
        load_feature_set(SET)
    except FeatureSetError as error:
        return list(error.errors)
    return []


def found(folder: Path, language: str, example: str) -> tuple[Finding, ...]:
    """Return what is said after the example of a page."""
    digest = project(folder)
    with chdir(folder):
        if language == "diff":
            change(folder, example, digest)
            findings = checked([]) or run_tests() or loaded()
        else:
            *commands, last = example.strip().splitlines()
            subprocess.run(["bash", "-ec", "\n".join(commands)], check=True)
            _, verb, *arguments = shlex.split(last)
            findings = checked(arguments) if verb == "check" else run_tests()
    return in_order(findings)


def text_of(findings: tuple[Finding, ...], folder: Path, digest: str) -> str:
    """Return findings as a page shows them."""
    text = "".join(f"{finding.render()}\n" for finding in findings)
    return text.replace(digest, SHOWN_DIGEST).replace(f"{folder.resolve()}/", "")


def example(name: str) -> re.Match[str]:
    """Return the first example of a page."""
    match = EXAMPLE.search((PAGES / f"{name}.md").read_text())
    assert match, name
    return match


def test_every_code_has_a_page() -> None:
    """The pages are those of the codes, and no others."""
    assert set(NAMES) == set(get_args(Code))


def test_every_page_can_be_reached() -> None:
    """The index links to each page, and says in one line what it is about."""
    rows = re.findall(
        r"^\| \[`([a-z0-9-]+)`\]\(\1\.md\) \| \S", (PAGES / "index.md").read_text(), re.MULTILINE
    )

    assert sorted(rows) == NAMES


def test_the_address_is_that_of_the_page() -> None:
    """Messages link to where the site has the page."""
    assert page("unknown-key").endswith("/errors/unknown-key/")


@pytest.mark.parametrize("name", NAMES)
def test_pages_are_short(name: str) -> None:
    """A page can be read at a glance."""
    text = (PAGES / f"{name}.md").read_text()

    assert text.startswith(f"# `{name}`\n")
    assert len(text.splitlines()) <= 45


def test_the_example_project_is_sound(tmp_path: Path) -> None:
    """Whatever the pages show comes of their change alone."""
    project(tmp_path)
    with chdir(tmp_path):
        assert [f.render() for f in (*checked([]), *run_tests(), *loaded())] == []


@pytest.mark.parametrize("name", [name for name in NAMES if name != WITHOUT_EXAMPLE])
def test_example(tmp_path: Path, name: str) -> None:
    """The example of a page brings out its code, with the message that the page shows."""
    language, change_, shown = example(name).groups()
    findings = found(tmp_path, language, change_)

    assert name in {finding.code for finding in findings}
    assert text_of(findings, tmp_path, inspect(tmp_path / "sae").sha256) == shown


if __name__ == "__main__":  # python -m tests.policy.test_error_pages writes today's messages
    for name_ in NAMES:
        if name_ == WITHOUT_EXAMPLE:
            continue
        at = PAGES / f"{name_}.md"
        match = example(name_)
        with TemporaryDirectory() as temporary:
            here = Path(temporary)
            findings_ = found(here, match[1], match[2])
            now = text_of(findings_, here, inspect(here / "sae").sha256)
        if name_ not in {f.code for f in findings_}:
            print(name_, "is not among", [f.code for f in findings_])
        start, end = match.span(3)
        at.write_text(match.string[:start] + now + match.string[end:])
