"""The page as files: links lead to files, nothing needs a server."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from saeguard.browse.export import export, usual_latents
from saeguard.browse.site import Site
from saeguard.errors import InputError
from tests.browse.test_server import elements


def test_links_of_written_pages_lead_to_files(site: Site, tmp_path: Path) -> None:
    """All but those to latents that were left out; the same content as served."""
    out = tmp_path / "pages"
    pages = export(site, out, [1, 2, 5])
    files = sorted(str(file.relative_to(out)) for file in out.rglob("*.html"))
    assert len(files) == pages
    assert {"index.html", "latent/1.html", "feature/loud.html", "policy/noise.own.html",
            "events.html", "event/0.html"} <= set(files)  # fmt: skip
    for file in out.rglob("*.html"):
        html = file.read_text()
        for _, attrs in elements(html):
            for name in ("href", "src", "action"):
                target = attrs.get(name)
                if target and not target.startswith(("#", "data:")):
                    path = file.parent / target
                    assert path.exists() or re.search(r"(latent|policy)/[\w.]+\.html$", target)
    home = (out / "index.html").read_text()
    assert re.findall(r'class="n" href="latent/(\d+)\.html"', home) == ["1", "2", "5"]
    assert "Try a text" not in (out / "latent/1.html").read_text()
    with pytest.raises(InputError, match="is not empty"):
        export(site, out, [1])


def test_the_usual_latents_are_those_of_features_and_the_densest(site: Site) -> None:
    """Features' first, no latent twice."""
    chosen = usual_latents(site, 10)
    assert chosen[:3] == [1, 2, 9]
    assert len(set(chosen)) == len(chosen) == 10
