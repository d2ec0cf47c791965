"""What the pages link to and name is there: files, headings, tests."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    path.relative_to(ROOT)
    for pattern in ("*.md", "docs/**/*.md", "benchmarks/*.md", "demo/**/*.md", "policies/*.md",
                    "saeguard/**/*.md")
    for path in ROOT.glob(pattern)
    if "out" not in path.parts
)  # fmt: skip
FENCED = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\((?!https?:)([^)\s#]*)(?:#([^)\s]+))?\)")
OURS = re.compile(r"`((?:saeguard|tests|benchmarks|docs|feature_sets|policies)/[\w./-]+)`")
MODULE = re.compile(
    r"`((?:guard|sae|features|reload|hf|policy|policy_tools|events|cli|vllm)/[\w/]+\.py)`"
)
TEST = re.compile(r"`(test_\w+)(\.py)?`")
CODE = "\n".join(path.read_text() for path in ROOT.glob("tests/**/*.py"))
MADE = {"policies/refusal.yaml", "policies/saeguard.bundle.json"}
"""What a page has its reader write."""


def text(page: Path) -> str:
    """Return a page without its code blocks."""
    return FENCED.sub("", (ROOT / page).read_text())


def anchors(page: Path) -> set[str]:
    """Return what the headings of a page can be linked by."""
    headings = re.findall(r"^#+ (.+)$", text(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_links(page: Path) -> None:
    """Relative links lead to a file, and to a heading of it."""
    broken = []
    for target, anchor in LINK.findall(text(page)):
        path = (ROOT / page).parent / target if target else ROOT / page
        if not path.exists() or (anchor and anchor not in anchors(path.relative_to(ROOT))):
            broken.append(f"{target}#{anchor}")
    assert broken == []


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_names(page: Path) -> None:
    """Files, modules and tests that a page names in code type exist."""
    content = text(page)
    examples = ("policies/", "feature_sets/") if "errors" in page.parts else ()
    gone = [
        name
        for name in OURS.findall(content)
        if name not in MADE and not name.startswith(examples) and not (ROOT / name).exists()
    ]
    gone += [name for name in MODULE.findall(content) if not (ROOT / "saeguard" / name).exists()]
    for name, is_file in TEST.findall(content):
        known = list(ROOT.glob(f"tests/**/{name}.py")) if is_file else re.findall(
            rf"def {name}\b", CODE
        )  # fmt: skip
        gone += [] if known else [name]
    assert gone == []


def test_every_module_that_serves_is_in_the_architecture() -> None:
    """The tables name each module of `guard/` and its wings, and of `vllm/`."""
    architecture = text(Path("docs/architecture.md"))
    paths = [*(ROOT / "saeguard/guard").rglob("*.py"), *(ROOT / "saeguard/vllm").rglob("*.py")]
    modules = {path.relative_to(ROOT / "saeguard") for path in paths if path.stem != "__init__"}

    assert {str(name) for name in modules if f"`{name}`" not in architecture} == set()


def test_all_pages_are_looked_at() -> None:
    """The patterns above find the pages."""
    assert {Path("README.md"), Path("docs/reload.md"), Path("saeguard/vllm/CONTRACT.md")} < set(
        PAGES
    )
    assert LINK.findall("[a](docs/x.md#b) [c](#d)") == [("docs/x.md", "b"), ("", "d")]
