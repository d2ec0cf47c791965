"""A model is a folder or a name on the hub; one function finds it, and says what is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from huggingface_hub import constants

from saeguard.features.model_fit import name_of, read_shape
from saeguard.hf.model_folder import REMEDY, HubError, ModelFolderError, model_folder
from tests.cli.project import run

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model in the hub's cache, and a hub that cannot be reached."""
    repository = tmp_path / "hub" / "models--owner--small"
    folder = repository / "snapshots" / COMMIT
    folder.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    (folder / "config.json").write_text(json.dumps({"hidden_size": 16, "num_hidden_layers": 3}))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    return folder


def test_a_name_is_taken_from_the_cache(cached: Path) -> None:
    """Offline too; feature sets know the model by its name, not by the folder's commit."""
    found = model_folder("owner/small")
    assert found == cached
    assert name_of(found) == "small"
    assert read_shape(found).name == "small"


def test_a_folder_goes_before_a_name(cached: Path) -> None:
    """A folder owner/small on this machine is that folder."""
    here = Path("owner/small")
    here.mkdir(parents=True)
    (here / "config.json").write_text("{}")
    assert model_folder("owner/small") == here
    assert cached.is_dir()


def test_a_hub_that_does_not_deliver(cached: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 3, and both readings of what was given."""
    del cached
    with pytest.raises(HubError, match="--model: owner/other: there is no such folder, and the"):
        model_folder("owner/other")
    Path("policies").mkdir()
    Path("in.jsonl").write_text('{"id": "a", "text": "x"}')
    scan = "scan in.jsonl --policies policies --out out.jsonl --model owner/other"
    assert run(*scan.split()) == 3
    assert REMEDY in capsys.readouterr().err


@pytest.mark.parametrize("name", ["gone", "../gone/model", "a/b/c", "x" * 300])
def test_what_is_no_name_is_a_missing_folder(name: str) -> None:
    """The hub is not asked for what cannot be a name there."""
    with pytest.raises(ModelFolderError, match="owner/name"):
        model_folder(name)
