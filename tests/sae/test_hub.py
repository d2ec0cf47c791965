"""SAEs by name: the table of releases, and the real hub client against a stand-in on loopback."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml

from saeguard.features.load import load_feature_set
from saeguard.sae import SaeError
from saeguard.sae.hub import named
from tests.sae import made
from tests.sae.standin import COMMIT, Hub, hub

ROOT = Path(__file__).parents[2]
REPO = "google/gemma-scope-2b-pt-res"
W = 48_000
ID = "layer_1/width_160/average_l0_30"


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Hub]:
    """Return a stand-in hub with one Gemma Scope SAE and one of Goodfire's."""
    made.gemma_scope(tmp_path / "hub" / REPO)
    made.goodfire(tmp_path / "hub" / "Goodfire" / "Llama-3.1-8B-Instruct-SAE-l19")
    with hub(tmp_path / "hub") as running:
        yield running


def run(tmp_path: Path, hub_: Hub, *arguments: str, offline: bool = False) -> tuple[int, str]:
    """Run `saeguard` in a process of its own, for the client reads its settings when imported."""
    environment = os.environ | {
        "HF_ENDPOINT": hub_.url,
        "PYTHONPATH": str(ROOT),
        "HF_HOME": str(tmp_path / "hf"),
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "1" if offline else "0",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", "from saeguard.cli import main; main()", *arguments],
        env=environment, capture_output=True, text=True, check=False, cwd=Path.cwd(),
    )  # fmt: skip
    return done.returncode, done.stderr + done.stdout


def _pin(output: str) -> dict[str, object]:
    part: dict[str, object] = yaml.safe_load(output[output.index("sae:\n") :])["sae"]
    return part


def test_fetch_pins_and_offline_serves_it(tmp_path: Path, served: Hub) -> None:
    """What is fetched is told with commit and digest, and is found again without a network."""
    code, output = run(tmp_path, served, "sae", "fetch", "gemma-scope-2b-pt-res", ID)
    assert code == 0, output
    part = _pin(output)
    assert (part["revision"], part["layer"], part["d_sae"]) == (COMMIT, 1, made.N)
    asked = len(served.requests)
    code, again = run(
        tmp_path, served, "sae", "fetch", "gemma-scope-2b-pt-res", ID, "--revision", COMMIT,
        offline=True,
    )  # fmt: skip
    assert code == 0, again
    assert _pin(again) == part
    assert len(served.requests) == asked
    code, none = run(
        tmp_path, served, "sae", "fetch", "gemma-scope-2b-pt-res",
        "layer_2/width_16k/average_l0_71", offline=True,
    )  # fmt: skip
    assert code == 3
    assert "not in the cache" in none


def test_a_cut_download_is_resumed(tmp_path: Path, served: Hub) -> None:
    """A download that breaks off goes on behind the last whole piece, 10 MiB in this client."""
    wide = "layer_1/width_48k/average_l0_30"
    folder = served.root / REPO / wide
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    shapes = {"W_enc": (made.D, W), "W_dec": (W, made.D), "b_enc": (W,), "b_dec": (made.D,)}
    arrays = {name: rng.random(s, np.float32) for name, s in {**shapes, "threshold": (W,)}.items()}
    np.savez(folder / "params.npz", **arrays)
    served.cut_after = 11 << 20
    code, output = run(tmp_path, served, "sae", "fetch", "gemma-scope-2b-pt-res", wide)
    assert code == 0, output
    assert served.cut_after is None
    assert served.ranges == [f"bytes={10 << 20}-"]
    digest = hashlib.sha256((folder / "params.npz").read_bytes()).hexdigest()
    assert _pin(output)["sha256"] == digest


def test_a_feature_set_by_name(tmp_path: Path, served: Hub) -> None:
    """A feature set names release, id, commit and digest; other bytes are refused."""
    _, output = run(tmp_path, served, "sae", "fetch", "gemma-scope-2b-pt-res", ID)
    part = _pin(output)
    content = {
        "schema": "saeguard.features/v1", "id": "named", "title": "by name",
        "model": {"name": "tiny", "hidden_size": made.D, "num_layers": 3},
        "sae": part,
        "features": {
            "f3": {
                "title": "latent 3", "behaviour": "none", "detect": {3: 1.0}, "low": 0.0,
                "high": 1.0, "threshold": 0.5,
            },
        },
    }  # fmt: skip
    file = tmp_path / "named.yaml"
    file.write_text(yaml.safe_dump(content))
    check = f"from saeguard.features.load import load_feature_set as l; print(l({str(file)!r}).sae)"
    environment = os.environ | {
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        [sys.executable, "-c", check], env=environment, capture_output=True, text=True, check=True
    )
    assert COMMIT in done.stdout
    content["sae"] = part | {"sha256": "0" * 64}
    file.write_text(yaml.safe_dump(content))
    done = subprocess.run(
        [sys.executable, "-c", check], env=environment, capture_output=True, text=True, check=False
    )
    assert f"sae.sha256 is {'0' * 64}, but" in done.stderr
    # Without the checkpoint, the names are kept: policies are checked on laptops.
    unreached = load_feature_set(file, verify=False)
    assert unreached.sae.name == {
        "release": "gemma-scope-2b-pt-res", "id": ID, "revision": COMMIT,
    }  # fmt: skip


def test_a_pickled_release_is_fetched_and_converted(tmp_path: Path, served: Hub) -> None:
    """`fetch` converts a pickle; before that, serving says so and reads nothing."""
    arguments = ("sae", "fetch", "goodfire-llama-3.1-8b-instruct", "layer_19")
    code, output = run(tmp_path, served, *arguments)
    assert code == 0, output
    part = _pin(output)
    assert part["layer"] == 19
    folders = list((tmp_path / "cache" / "saeguard" / "sae").rglob("saeguard_sae.json"))
    assert [COMMIT in str(folder) for folder in folders] == [True]


def test_what_the_hub_does_not_have(tmp_path: Path, served: Hub) -> None:
    """A missing file is told with its names."""
    code, output = run(
        tmp_path, served, "sae", "fetch", "gemma-scope-2b-pt-res",
        "layer_2/width_16k/average_l0_71",
    )  # fmt: skip
    assert code == 3
    assert "layer_2/width_16k/average_l0_71/params.npz" in output
    assert "Traceback" not in output


class TestTable:
    """Releases and ids mean what they mean in SAELens."""

    def test_as_in_saelens(self) -> None:
        """Every SAE of ours that SAELens lists lies where SAELens says."""
        directory = pytest.importorskip("sae_lens.loading.pretrained_saes_directory")
        compared = 0
        for release, entry in directory.get_pretrained_saes_directory().items():
            for id_, path in entry.saes_map.items():
                try:
                    ref = named(release, id_, None)
                except SaeError:
                    continue
                compared += 1
                assert ref.repo == entry.repo_id
                file = f"{ref.folder}/{ref.files[0]}".strip("/")
                assert file == path or file.startswith(f"{path}/"), (release, id_)
        print(compared, "compared")
        assert compared > 2000

    @pytest.mark.parametrize(
        ("release", "id_", "says"),
        [
            ("gemma-scope-3b", "x", "release 'gemma-scope-3b' is not known; known: gemma-scope-2b"),
            (
                "gemma-scope-2b-pt-res",
                "layer_x",
                "has no SAE 'layer_x'; its ids are 'layer_{layer}",
            ),
            ("gemma-scope-2b-pt-res", "layer_1/width_16k/canonical", "give the average_l0"),
            ("llama_scope_lxr_8x", "l8r_32x", "has no SAE"),
            ("gemma-scope-2b-pt-res", "layer_1/width_16k/average_l0_..", "has no SAE"),
        ],
    )
    def test_unknown(self, release: str, id_: str, says: str) -> None:
        """An unknown name is refused, and the known ones are told."""
        with pytest.raises(SaeError, match=says):
            named(release, id_, None)
