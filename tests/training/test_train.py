"""Training finds planted features, goes on where it was cut off, and saves what SAELens loads."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from saeguard.sae import encode_full, inspect
from saeguard.training.errors import TrainingError
from saeguard.training.saelens import WEIGHTS, save_result
from saeguard.training.settings import Settings, keep_settings
from saeguard.training.train import Progress, train
from tests.training.planted import CHANCE, FEATURES, D, Planted

SETTINGS = Settings(
    model="planted", layer=1, d_in=D, latents=64, tokens=300_000, k=3, batch=512, lr=3e-3,
    buffer=4096,
)  # fmt: skip


def _found(sae: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return, of each planted feature, the cosine with the decoder row that is nearest."""
    rows = sae["W_dec"].float()
    rows = rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-9)
    return (Planted().directions @ rows.T).max(1).values


@pytest.fixture(scope="module")
def batchtopk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved BatchTopK SAE of planted activations."""
    folder = tmp_path_factory.mktemp("planted")
    shown: list[Progress] = []
    done = train(SETTINGS, Planted(), folder / "state", report=shown.append)
    assert shown[-1].step == SETTINGS.steps
    assert shown[-1].loss < shown[0].loss / 10
    assert done.counts.tokens >= SETTINGS.tokens
    save_result(done.trainer, folder / "sae", torch.float32)
    return folder / "sae"


def test_planted_features_are_found(batchtopk: Path) -> None:
    """Almost every planted direction has a decoder row along it."""
    found = _found(load_file(batchtopk / WEIGHTS))
    assert float((found > 0.9).float().mean()) > 0.95, found


def test_jumprelu_finds_them_too(tmp_path: Path) -> None:
    """JumpReLU, whose threshold is learnt, comes to about the L0 that was asked for."""
    settings = replace(SETTINGS, kind="jumprelu")
    done = train(settings, Planted(), tmp_path / "state")
    save_result(done.trainer, tmp_path / "sae", torch.float32)
    tensors = load_file(tmp_path / "sae" / WEIGHTS)
    assert float((_found(tensors) > 0.9).float().mean()) > 0.9
    x = Planted().block(77).x
    l0 = len(encode_full(inspect(tmp_path / "sae"), x)) / len(x)
    assert 0.5 * settings.k < l0 < 2 * settings.k
    assert torch.allclose(tensors["W_dec"].norm(dim=1), torch.ones(64), atol=1e-4)


def test_the_threshold_is_saved(batchtopk: Path) -> None:
    """As many latents fire by the saved threshold as BatchTopK kept: about what was planted."""
    x = Planted().block(99).x
    l0 = len(encode_full(inspect(batchtopk), x)) / len(x)
    assert l0 == pytest.approx(CHANCE * FEATURES, rel=0.5)


def test_saelens_and_we_read_the_same(batchtopk: Path) -> None:
    """SAELens loads the checkpoint, and its activations are ours."""
    import sae_lens

    theirs: Any = sae_lens.SAE.load_from_disk(batchtopk)
    assert theirs.cfg.architecture() == "jumprelu"
    assert theirs.cfg.metadata.hook_name == "blocks.1.hook_resid_post"
    x = Planted().block(5).x[:512]
    ours = torch.zeros(len(x), 64)
    fired = encode_full(inspect(batchtopk), x)
    ours[fired.token, fired.latent] = fired.value
    with torch.no_grad():
        torch.testing.assert_close(ours, theirs.encode(x), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bits(tmp_path: Path, dtype: torch.dtype) -> None:
    """Matrices are stored in 16 bits, thresholds are not; both readers take it."""
    import sae_lens

    done = train(replace(SETTINGS, tokens=20_000), Planted(), tmp_path / "state")
    save_result(done.trainer, tmp_path / "sae", dtype)
    tensors = load_file(tmp_path / "sae" / WEIGHTS)
    assert tensors["W_enc"].dtype == tensors["W_dec"].dtype == dtype
    assert tensors["threshold"].dtype == torch.float32
    theirs: Any = sae_lens.SAE.load_from_disk(tmp_path / "sae")
    x = Planted().block(5).x[:256]
    ours = torch.zeros(len(x), 64)
    fired = encode_full(inspect(tmp_path / "sae"), x)
    ours[fired.token, fired.latent] = fired.value
    with torch.no_grad():
        torch.testing.assert_close(ours, theirs.encode(x), atol=1e-3, rtol=1e-4)


def test_goes_on_where_it_stopped(tmp_path: Path) -> None:
    """A run that is stopped after some steps ends as one that was not, to the last bit."""
    settings = replace(SETTINGS, tokens=20_000)
    whole = train(settings, Planted(), tmp_path / "whole").trainer.sae.state_dict()

    class _CutOff(Exception):  # noqa: N818
        pass

    def stop(now: Progress) -> None:
        if now.step >= 30:
            raise _CutOff

    for _ in range(2):  # the second time from the same checkpoint
        with pytest.raises(_CutOff):
            train(settings, Planted(), tmp_path / "cut", save_every=0, report=stop)
    (state,) = (tmp_path / "cut").glob("state-*")
    assert int(state.name[6:]) >= 29
    cut = train(settings, Planted(), tmp_path / "cut").trainer.sae.state_dict()
    for name, tensor in whole.items():
        assert torch.equal(tensor, cut[name]), name


@pytest.mark.parametrize("coefficient", [1.0, 0.0])
def test_dead_latents_are_revived(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, coefficient: float
) -> None:
    """Latents that start dead come to fire by the auxiliary loss, and only by it."""
    from saeguard.training import train as module

    made = module.make_trainer

    def spoilt(*arguments: Any) -> Any:
        trainer = made(*arguments)
        trainer.sae.cfg.aux_loss_coefficient = coefficient
        with torch.no_grad():
            trainer.sae.b_enc[:32] = -2.0
        return trainer

    monkeypatch.setattr(module, "make_trainer", spoilt)
    done = train(replace(SETTINGS, tokens=100_000), Planted(), tmp_path)
    with torch.no_grad():
        x = Planted().block(9).x * done.trainer.activation_scaler.scaling_factor
        revived = int((done.trainer.sae.encode(x)[:, :32] > 0).any(0).sum())
    assert (revived > 8) is (coefficient > 0), revived


def test_another_run_is_not_continued(tmp_path: Path) -> None:
    """Other settings are named with both values, and a run is continued only if asked to."""
    keep_settings(tmp_path / "training", SETTINGS, resume=False)
    with pytest.raises(TrainingError, match="continue it with --resume"):
        keep_settings(tmp_path / "training", SETTINGS, resume=False)
    keep_settings(tmp_path / "training", SETTINGS, resume=True)
    with pytest.raises(TrainingError, match=r"settings\.k: found 4, expected 3"):
        keep_settings(tmp_path / "training", replace(SETTINGS, k=4), resume=True)


def test_settings_that_cannot_be() -> None:
    """Each is named with what is allowed."""
    for change, says in (
        ({"tokens": 10}, "--tokens: found 10, expected at least one batch of 512"),
        ({"k": 65}, "--k: found 65, expected 1 to 64"),
        ({"buffer": 600}, "--buffer: found 600, expected two batches or more, 1024"),
    ):
        with pytest.raises(TrainingError, match=says):
            replace(SETTINGS, **change).check()
