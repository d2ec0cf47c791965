"""One reading of the policies is of one moment."""

from __future__ import annotations

from pathlib import Path

import pytest

from saeguard.reload import policy_source
from saeguard.reload.policy_source import Source, SourceError, load
from tests import models


@pytest.fixture
def files(tmp_path: Path) -> Source:
    """Two versions of a folder, as Kubernetes mounts them, and a link to the first."""
    models.write_feature_set(
        tmp_path / "sets" / "tiny.yaml", models.make_sae(tmp_path / "sae"), latents=(0, 1)
    )
    for version, above in (("..a", 0.25), ("..b", 0.75)):
        for name in ("one", "two"):
            models.write_policy(
                tmp_path / "policies" / version / "set" / f"{name}.yaml",
                detect={"a": {"feature": "f0", "above": above}},
                condition="a",
            )
    (tmp_path / "policies" / "set").symlink_to("..data/set")
    (tmp_path / "policies" / "..data").symlink_to("..a")
    return Source(tmp_path / "policies", tmp_path / "sets")


def turn(files: Source, version: str) -> None:
    """Turn the link."""
    part = files.policies / "..data_tmp"
    part.symlink_to(version)
    part.rename(files.policies / "..data")


def test_a_link_that_is_turned_while_reading(
    files: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A set of which one file is old and one new was never there, and never comes out."""
    read, reads = policy_source.load_policies, []

    def slow(path: Path, _cache: object) -> object:
        found = read(path, None)
        if not reads:
            turn(files, "..b")
            mixed = [found[0], *read(path, None)[1:]]
            reads.append([p.detect["a"].above for p in mixed])
            return tuple(mixed)
        reads.append([p.detect["a"].above for p in found])
        return found

    monkeypatch.setattr(policy_source, "load_policies", slow)
    loaded = load(files)
    assert reads == [[0.25, 0.75], [0.75, 0.75]]
    assert [p.detect["a"].above for p in loaded.watchlist.policies] == [0.75, 0.75]


def test_what_never_stands_still(files: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is given up, and says so."""
    read = policy_source.load_policies
    versions = ["..a", "..b"] * policy_source.ATTEMPTS

    def turning(path: Path, _cache: object) -> object:
        turn(files, versions.pop())
        return read(path, None)

    monkeypatch.setattr(policy_source, "load_policies", turning)
    with pytest.raises(SourceError, match="the files change faster than they can be read"):
        load(files)


def test_what_is_wrong_and_stands_still_is_told(files: Source) -> None:
    """With the loader's own message."""
    (files.policies / "..a" / "set" / "one.yaml").write_text("schema: [")
    with pytest.raises(Exception, match=r"one\.yaml:1"):
        load(files)
