"""MkDocs hooks: bring pages that lie outside `docs/` into the site, and mend their links.

GitHub shows each page where it lies; the site needs them in one folder. So pages keep links that
work on GitHub, and this module rewrites them while the site is built.
"""

from __future__ import annotations

import os
import re
import tomllib
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
OUTSIDE = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
    "CODE_OF_CONDUCT.md": "code-of-conduct.md",
    "benchmarks/README.md": "benchmarks.md",
    "policies/README.md": "policies.md",
    "saeguard/vllm/CONTRACT.md": "contract.md",
}
"""Path in the repository -> path in the site."""
ERRORS = ("Policies", "Error codes")
"""The section of the navigation that takes every page of `docs/errors/`."""
LINK = re.compile(r"(\]\()(?!\w+:|#)([^)\s#]+)")
FENCED = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Take the repository's address from `pyproject.toml`, and the pages of error codes."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    config.repo_url = project["urls"]["Repository"].rstrip("/")
    config.site_url = project["urls"]["Documentation"]
    section: Any = config.nav
    for title in ERRORS:
        section = next(entry[title] for entry in section if title in entry)
    pages = sorted(page.name for page in ROOT.glob("docs/errors/*.md"))
    section += [f"errors/{name}" for name in pages if name != "index.md"]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that lie outside `docs/`."""
    for source, page in OUTSIDE.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, *, page: Any, config: MkDocsConfig, **_: Any) -> str:
    """Rewrite relative links: to the page's place in the site, or to the repository."""
    here = PurePosixPath(page.file.src_uri)
    source = {site: path for path, site in OUTSIDE.items()}.get(str(here), f"docs/{here}")

    def in_site(match: re.Match[str]) -> str:
        target = os.path.normpath(PurePosixPath(source).parent / match[2])
        if target in OUTSIDE:
            place = OUTSIDE[target]
        elif target.startswith("docs/"):
            place = target.removeprefix("docs/")
        else:
            kind = "tree" if (ROOT / target).is_dir() else "blob"
            return f"{match[1]}{config.repo_url}/{kind}/main/{target}"
        return f"{match[1]}{os.path.relpath(place, here.parent)}"

    parts, end = [], 0
    for fence in FENCED.finditer(markdown):
        parts += [LINK.sub(in_site, markdown[end : fence.start()]), fence[0]]
        end = fence.end()
    return "".join([*parts, LINK.sub(in_site, markdown[end:])])
