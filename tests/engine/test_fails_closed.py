"""A guard that cannot work stops the server, and says why."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests import models
from tests.engine import engines
from tests.templates import REFUSED

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> models.Guarded:
    """A set-up with nothing wrong."""
    return models.make_guarded(tmp_path_factory.mktemp("sound"))


def start(
    folder: Path,
    guarded: models.Guarded,
    *,
    prelude: str = "",
    engine: dict[str, Any] | None = None,
    **settings: Any,
) -> subprocess.CompletedProcess[str]:
    """Start an engine and serve one request; `prelude` runs in the child before it."""
    job = folder / "job"
    if prelude:
        hooks = folder / "prelude"
        hooks.mkdir()
        (hooks / "sitecustomize.py").write_text(prelude + engines.mutation())
    engine = {
        "model": str(guarded.model),
        "max_num_seqs": 4,
        "enforce_eager": True,
        "additional_config": {"saeguard": guarded.settings(**settings)},
        **(engine or {}),
    }
    environment = engines.environment

    def with_prelude(**how: bool) -> dict[str, str]:
        env = environment(**how)
        env["PYTHONPATH"] = f"{folder / 'prelude'}:{env['PYTHONPATH']}"
        return env

    engines.environment = with_prelude  # type: ignore[assignment]
    try:
        return engines.run(job, engine, [engines.requests([[1, 5, 6]], max_tokens=2)])
    finally:
        engines.environment = environment


def edited(
    sound: models.Guarded, folder: Path, edit: Callable[[dict[str, Any]], None]
) -> models.Guarded:
    """Copy the sound set-up with an edited feature set."""
    sets = folder / "feature_sets"
    shutil.copytree(sound.feature_sets, sets)
    path = sets / "tiny.yaml"
    content = yaml.safe_load(path.read_text())
    edit(content)
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return models.Guarded(sound.model, sound.sae, sound.policies, sets, sound.latents)


def refused(done: subprocess.CompletedProcess[str], *expected: str) -> None:
    """Assert that nothing was served and that the message names what is expected."""
    log = done.stdout + done.stderr
    assert done.returncode != 0, log[-2000:]
    for text in expected:
        assert text in log, (text, log[-3000:])


class TestFailsClosed:
    """Each fault stops the start."""

    def test_wrong_policy(self, sound: models.Guarded, tmp_path: Path) -> None:
        """A mistake in a policy is named with file, line and column."""
        policies = tmp_path / "policies"
        shutil.copytree(sound.policies, policies)
        path = policies / "p0.yaml"
        path.write_text(path.read_text().replace("severity: low", "severity: lwo"))
        bad = models.Guarded(sound.model, sound.sae, policies, sound.feature_sets, sound.latents)
        refused(start(tmp_path, bad), f"{path}:", "lwo", "severity")

    def test_no_policy_at_all(self, sound: models.Guarded, tmp_path: Path) -> None:
        """A directory without policies is a mistake, not a quiet guard."""
        (tmp_path / "none").mkdir()
        none = models.Guarded(
            sound.model, sound.sae, tmp_path / "none", sound.feature_sets, sound.latents
        )
        refused(start(tmp_path, none), str(tmp_path / "none"), "found none; write NAME.yaml files")

    def test_wrong_sae_digest(self, sound: models.Guarded, tmp_path: Path) -> None:
        """Another checkpoint than the feature set pins: both digests are told."""

        def edit(content: dict[str, Any]) -> None:
            content["sae"]["sha256"] = "0" * 64

        refused(start(tmp_path, edited(sound, tmp_path, edit)), "0" * 64, "sha256")

    def test_wrong_model(self, sound: models.Guarded, tmp_path: Path) -> None:
        """A feature set made for a model of another depth."""

        def edit(content: dict[str, Any]) -> None:
            content["model"]["num_layers"] = 7

        refused(
            start(tmp_path, edited(sound, tmp_path, edit)), "7 layers", f"{models.LAYERS} layers"
        )

    def test_wrong_width(self, sound: models.Guarded, tmp_path: Path) -> None:
        """An SAE of another width than the model's residual stream."""
        sae = models.make_sae(tmp_path / "sae", d_in=32)
        sets = tmp_path / "feature_sets"
        models.write_feature_set(sets / "tiny.yaml", sae, latents=sound.latents)
        bad = models.Guarded(sound.model, sae, sound.policies, sets, sound.latents)
        refused(start(tmp_path, bad), "width 32", f"width {models.HIDDEN}")

    def test_unknown_setting(self, sound: models.Guarded, tmp_path: Path) -> None:
        """A misspelt key of the configuration."""
        refused(start(tmp_path, sound, polices="x"), "polices", "allowed keys")

    def test_tap_not_in_the_graph(self, sound: models.Guarded, tmp_path: Path) -> None:
        """A graph without the tap, as a stale compile cache would give: the self-test says so."""
        prelude = (
            "import saeguard.vllm.worker.attach as w\n"
            "w.hook_layer = lambda layers, index: None  # the hook gets lost\n"
        )
        refused(start(tmp_path, sound, prelude=prelude), "self-test", "ran 0 times")

    def test_tap_reads_half_the_residual(self, sound: models.Guarded, tmp_path: Path) -> None:
        """A tap that forgets the residual half, as four others shipped it: the self-test knows."""
        prelude = (
            "import torch, saeguard.guard.tap as tap\n"
            "def half(output, layer):\n"
            "    torch.ops.saeguard.tap(output[0], None, layer)\n"
            "    return output\n"
            "tap.tap_output = half\n"
        )
        refused(start(tmp_path, sound, prelude=prelude), "self-test", "does not read the residual")

    def test_plugin_does_not_import(self, sound: models.Guarded, tmp_path: Path) -> None:
        """A missing dependency stops the server, although vLLM swallows broken entry points."""
        prelude = (
            "import sys\n"
            "class Block:\n"
            "    def find_spec(self, name, path=None, target=None):\n"
            "        if name == 'wrapt':\n"
            "            raise ImportError('wrapt is broken here')\n"
            "sys.meta_path.insert(0, Block())\n"
        )
        refused(start(tmp_path, sound, prelude=prelude), "wrapt is broken here")

    def test_missing_internal(self, sound: models.Guarded, tmp_path: Path) -> None:
        """A vLLM without something the guard relies on: version and missing piece are named."""
        import vllm

        prelude = (
            "from saeguard.vllm.patches import reads\n"
            "reads('vllm.v1.request:Request.no_such_thing', why='a test')\n"
        )
        done = start(tmp_path, sound, prelude=prelude)
        refused(done, f"does not fit vLLM {vllm.__version__}", "Request.no_such_thing")

    def test_pooling_model(self, sound: models.Guarded, tmp_path: Path) -> None:
        """A model that embeds: there is nothing generated that the self-test could look at."""
        refused(
            start(tmp_path, sound, engine={"runner": "pooling", "convert": "embed"}),
            "pooling and embedding models are not supported",
        )

    def test_roles_that_the_template_does_not_tell(
        self, sound: models.Guarded, tmp_path: Path
    ) -> None:
        """A policy on a role, and a model whose template leaves some out: policy and reason."""
        model = shutil.copytree(sound.model, tmp_path / "model")
        template = model / "chat_template.jinja"
        assert template.exists()
        template.write_text(REFUSED["earlier answers are left out"].template)
        policy = tmp_path / "policies" / "p.yaml"
        models.write_policy(
            policy, scope="user", detect={"a": {"feature": "f4", "above": 1.0}}, condition="a"
        )
        bad = models.Guarded(model, sound.sae, policy.parent, sound.feature_sets, sound.latents)
        refused(
            start(tmp_path, bad, engine={"skip_tokenizer_init": False}),
            f"{policy}: scope: user, but the model's chat template does not identify that role "
            "exactly: it omits messages of user, assistant; allowed here: prompt, output, both",
        )

    def test_the_sound_one_serves(self, sound: models.Guarded, tmp_path: Path) -> None:
        """The same set-up without a fault serves, so that the refusals above mean something."""
        done = start(tmp_path, sound)
        assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
        assert json.loads((tmp_path / "job" / "out.json").read_text())["results"]
