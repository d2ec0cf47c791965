"""`saeguard policy keygen`, `sign`, `verify`, and `saeguard reload` without a server."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import pytest

from saeguard.cli import main
from saeguard.policy.load import load_policies
from tests import models
from tests.fixture.project import save_project


def run(*arguments: object) -> int:
    """Return the exit code of a command."""
    with pytest.raises(SystemExit) as ended:
        main([str(a) for a in arguments])
    return int(ended.value.code or 0)


def test_sign_and_verify(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A key is made once and not overwritten; each signature has the next revision."""
    key, folder, sets = tmp_path / "key", tmp_path / "policies", tmp_path / "sets"
    models.write_feature_set(
        sets / "tiny.yaml", models.make_sae(tmp_path / "sae"), latents=(0, 1), model_sha256="a" * 64
    )
    detect = {"a": {"feature": "f0", "above": 0.5}}
    models.write_policy(folder / "one.yaml", detect=detect, condition="a")
    where = [folder, "--feature-sets", sets]
    assert run("policy", "keygen", key) == 0
    assert key.stat().st_mode & 0o777 == 0o600
    assert run("policy", "keygen", key) == 2
    public = f"{key}.pub"
    assert run("policy", "verify", "--key", public, *where) == 1
    assert run("policy", "sign", "--key", key, *where) == 0
    assert run("policy", "sign", "--key", key, *where) == 0
    capsys.readouterr()
    assert run("policy", "verify", "--key", public, *where) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["revision"], said["policies"]) == (2, 1)
    assert run("policy", "sign", "--key", key, *where, "--revision", "2") == 2
    assert "--revision: expected a number above 2" in capsys.readouterr().err
    models.write_policy(folder / "two.yaml", detect=detect, condition="a")
    assert run("policy", "verify", "--key", public, *where) == 1
    assert "two.yaml: found, but not signed" in capsys.readouterr().err
    assert run("policy", "verify", "--key", key, *where) == 2
    assert run("policy", "sign", "--key", public, *where) == 2
    (folder / "two.yaml").write_text("schema: [")
    assert run("policy", "sign", "--key", key, *where) == 2
    assert "two.yaml:1:" in capsys.readouterr().err


def test_a_bundle_is_there_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While it is written, and where that ends half-way, a server sees the signed one before."""
    key, folder, sets = tmp_path / "key", tmp_path / "policies", tmp_path / "sets"
    models.write_feature_set(
        sets / "tiny.yaml", models.make_sae(tmp_path / "sae"), latents=(0,), model_sha256="a" * 64
    )
    detect = {"a": {"feature": "f0", "above": 0.5}}
    models.write_policy(folder / "one.yaml", detect=detect, condition="a")
    sign = ["policy", "sign", "--key", key, folder, "--feature-sets", sets]
    assert run("policy", "keygen", key) == 0
    assert run(*sign) == 0
    before = (folder / "saeguard.bundle.json").read_bytes()
    seen = []

    def full(_: int) -> None:
        seen.append((folder / "saeguard.bundle.json").read_bytes())
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        assert run(*sign) == 3
    assert seen == [before]
    assert (folder / "saeguard.bundle.json").read_bytes() == before
    assert sorted(p.name for p in folder.iterdir()) == ["one.yaml", "saeguard.bundle.json"]
    assert run(*sign) == 0
    assert run("policy", "verify", "--key", f"{key}.pub", folder, "--feature-sets", sets) == 0


def test_reload_without_a_server(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder without a state, or with one of a process that is gone: no process is signalled."""
    assert run("reload", tmp_path / "gone") == 2
    assert run("reload", tmp_path) == 3
    status = {"pid": 1, "started_at": "another", "asked": 0}
    (tmp_path / "engine-0.json").write_text(json.dumps(status))
    assert run("reload", tmp_path) == 3
    assert "no running server keeps its state here" in capsys.readouterr().err


def test_policies_over_templates_are_signed(tmp_path: Path) -> None:
    """With others beside them: what a server leaves out needs no calibrated feature set."""
    guarded = save_project(tmp_path)
    shutil.copytree("policies/bias", guarded.policies / "bias")
    shutil.copytree("feature_sets/templates", guarded.feature_sets / "templates")
    where = [guarded.policies, "--feature-sets", guarded.feature_sets]
    assert run("policy", "keygen", tmp_path / "key") == 0
    assert run("policy", "sign", "--key", tmp_path / "key", *where) == 0
    assert run("policy", "verify", "--key", tmp_path / "key.pub", *where) == 0
    assert run("check", *where) == 0


def test_the_library_is_signed(tmp_path: Path) -> None:
    """The shipped policies can be signed, over the feature sets that ship."""
    shutil.copytree("policies", tmp_path / "policies")
    assert run("policy", "keygen", tmp_path / "key") == 0
    assert run("policy", "sign", "--key", tmp_path / "key", tmp_path / "policies") == 0
    assert run("policy", "verify", "--key", tmp_path / "key.pub", tmp_path / "policies") == 0


def test_keys_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder that is not there is named; a public key on its own is not overwritten."""
    assert run("policy", "keygen", tmp_path / "nowhere" / "key") == 3
    assert capsys.readouterr().err == f"{tmp_path}/nowhere: there is no such folder\n"
    (tmp_path / "key.pub").write_text("of another key")
    assert run("policy", "keygen", tmp_path / "key") == 2
    assert [path.name for path in tmp_path.iterdir()] == ["key.pub"]
    long = "k" * 253  # with .pub behind it, too long a name
    assert run("policy", "keygen", tmp_path / long) == 3
    assert capsys.readouterr().err.endswith(f"{long}.pub: File name too long\n")
    assert [path.name for path in tmp_path.iterdir()] == ["key.pub"]


def test_signing_what_is_no_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A missing key, a policy in place of its folder, a revision below 1: each says what it is."""
    key, policy = tmp_path / "key", load_policies(Path("policies"))[0].path
    assert run("policy", "sign", "--key", key, "policies") == 2
    assert f"--key: {key}: there is no such file" in capsys.readouterr().err
    assert run("policy", "keygen", key) == 0
    assert run("policy", "sign", "--key", key, policy) == 2
    assert "sign the whole folder" in capsys.readouterr().err
    assert run("policy", "sign", "--key", key, "policies", "--revision", "0") == 2
    assert run("policy", "verify", "--key", f"{key}.pub", tmp_path / "nowhere") == 2
    assert "there is no such folder" in capsys.readouterr().err
