"""The reader agrees with SAELens and refuses what it cannot read rightly."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from saeguard.sae import (
    SaeError,
    activate,
    encode,
    encode_full,
    inspect,
    max_per_text,
    read_decoder_rows,
    read_rows,
)

sae_lens = pytest.importorskip("sae_lens")

D, N = 24, 96


def _save(folder: Path, architecture: str = "jumprelu", **options: Any) -> Any:
    """Save a random SAELens SAE and return it."""
    torch.manual_seed(7)
    names = {"jumprelu": "JumpReLU", "standard": "Standard", "gated": "Gated", "topk": "TopK"}
    config = getattr(sae_lens, f"{names[architecture]}SAEConfig")
    metadata = sae_lens.saes.sae.SAEMetadata(hook_name="blocks.3.hook_resid_post")
    sae = getattr(sae_lens, f"{names[architecture]}SAE")(
        config(d_in=D, d_sae=N, metadata=metadata, **options)
    )
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            parameter.copy_(torch.randn_like(parameter))
            if name == "threshold":
                parameter.abs_()
    sae.save_model(folder)
    return sae


def _edit_cfg(folder: Path, **changes: Any) -> None:
    cfg = json.loads((folder / "cfg.json").read_text())
    (folder / "cfg.json").write_text(json.dumps(cfg | changes))


def _edit_weights(folder: Path, **changes: torch.Tensor | None) -> None:
    file = folder / "sae_weights.safetensors"
    tensors = load_file(file) | changes
    save_file({k: v.contiguous() for k, v in tensors.items() if v is not None}, file)


@pytest.mark.parametrize("architecture", ["standard", "jumprelu"])
@pytest.mark.parametrize("subtracts", [True, False])
class TestAgreesWithSaeLens:
    """Rows, full width and maxima equal SAELens' own `encode`."""

    def test_rows(self, tmp_path: Path, architecture: str, *, subtracts: bool) -> None:
        """Watched latents are those of SAELens, in the order asked for."""
        sae = _save(tmp_path, architecture, apply_b_dec_to_input=subtracts)
        x = torch.randn(50, D)
        latents = [5, 0, 95, 5]
        info = inspect(tmp_path)
        assert (info.architecture, info.layer, info.d_in, info.d_sae) == (architecture, 3, D, N)
        f = activate(read_rows(info, latents), x)
        torch.testing.assert_close(f, sae.encode(x)[:, latents], rtol=1e-4, atol=1e-4)
        assert torch.equal(read_decoder_rows(info, latents), sae.W_dec[latents])

    def test_all_latents(self, tmp_path: Path, architecture: str, *, subtracts: bool) -> None:
        """The compact full encode scatters back to SAELens' dense one."""
        sae = _save(tmp_path, architecture, apply_b_dec_to_input=subtracts)
        x = torch.randn(50, D)
        found = encode_full(inspect(tmp_path), x)
        dense = torch.zeros(50, N)
        dense[found.token, found.latent] = found.value
        torch.testing.assert_close(dense, sae.encode(x), rtol=1e-4, atol=1e-4)
        assert (found.value > 0).all()

    def test_max_per_text(
        self, tmp_path: Path, architecture: str, *, subtracts: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Texts that cross blocks of tokens keep their maximum; an empty text has zeros."""
        monkeypatch.setattr(encode.encode_blocks, "__kwdefaults__", {"block": 40, "rows": 16})
        sae = _save(tmp_path, architecture, apply_b_dec_to_input=subtracts)
        x = torch.randn(50, D)
        lengths = [7, 30, 0, 13]
        dense = sae.encode(x).split(lengths)
        expected = np.stack([f.amax(0).detach().numpy() if len(f) else np.zeros(N) for f in dense])
        got = max_per_text(inspect(tmp_path), x, lengths)
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


def test_flat_cfg_from_before_version_6(tmp_path: Path) -> None:
    """A flat configuration with `hook_point` and defaults is understood."""
    sae = _save(tmp_path, "standard")
    (tmp_path / "cfg.json").write_text(
        json.dumps({"d_in": D, "d_sae": N, "hook_point": "blocks.4.hook_resid_pre"})
    )
    info = inspect(tmp_path)
    assert (info.layer, info.architecture) == (3, "standard")
    assert info.folded == ("b_dec is subtracted from the input",)
    x = torch.randn(9, D)
    f = activate(read_rows(info, range(N)), x)
    torch.testing.assert_close(f, sae.encode(x), rtol=1e-4, atol=1e-4)


def test_bf16_weights_become_float32(tmp_path: Path) -> None:
    """Rows of a bfloat16 checkpoint are float32 with the stored values."""
    _save(tmp_path)
    file = tmp_path / "sae_weights.safetensors"
    save_file({k: v.bfloat16() for k, v in load_file(file).items()}, file)
    info = inspect(tmp_path)
    rows = read_rows(info, [4])
    assert (info.dtype, rows.W.dtype, rows.b.dtype) == ("BF16", torch.float32, torch.float32)
    assert torch.equal(rows.W[0], load_file(file)["W_enc"][:, 4].float())


def test_digest_follows_the_file(tmp_path: Path) -> None:
    """The digest is that of the weight file and changes with it."""
    _save(tmp_path)
    file = tmp_path / "sae_weights.safetensors"
    info = inspect(tmp_path)
    assert info.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    _edit_weights(tmp_path, b_dec=torch.ones(D))
    assert info.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()


class TestRefuses:
    """Every damaged or unsupported checkpoint is refused, with the file named."""

    def test_topk_as_activation_function(self, tmp_path: Path) -> None:
        """TopK of old configurations is not taken for a standard SAE."""
        _save(tmp_path, "standard")
        _edit_cfg(tmp_path, activation_fn_str="topk", activation_fn_kwargs={"k": 3})
        info = inspect(tmp_path)
        assert (info.architecture, info.activation, info.k) == ("topk", "topk", 3)
        _edit_cfg(tmp_path, activation_fn_kwargs={})
        with pytest.raises(SaeError, match="k is None"):
            inspect(tmp_path)

    @pytest.mark.parametrize("mode", ["expected_average_only_in", True, "covariance_whitening"])
    def test_input_scaling(self, tmp_path: Path, mode: str | bool) -> None:
        """Scaling that the checkpoint does not hold is refused."""
        _save(tmp_path)
        _edit_cfg(tmp_path, normalize_activations=mode)
        with pytest.raises(SaeError, match=r"not part of the checkpoint; .*`sae.fold_activation"):
            inspect(tmp_path)

    @pytest.mark.parametrize(
        ("changes", "says"),
        [
            ({"architecture": "temporal"}, "'temporal' cannot be watched"),
            ({"normalize_activations": "odd"}, "'odd' is not recognised"),
            ({"apply_b_dec_to_input": "no"}, "true or false"),
            ({"d_sae": N + 1}, f"encoder says d_sae {N}"),
            ({"metadata": {"hook_name": "blocks.0.hook_resid_pre"}}, "hook_resid_post"),
            ({"metadata": {"hook_name": "blocks.1.attn.hook_z"}}, "hook_resid_post"),
            ({"metadata": {"hook_name": "../blocks.1.hook_resid_post"}}, "hook_resid_post"),
        ],
    )
    def test_configuration(self, tmp_path: Path, changes: dict[str, Any], says: str) -> None:
        """A configuration that is not understood is never guessed at."""
        _save(tmp_path)
        _edit_cfg(tmp_path, **changes)
        with pytest.raises(SaeError, match=says) as caught:
            inspect(tmp_path)
        assert str(tmp_path) in str(caught.value)

    @pytest.mark.parametrize(
        ("changes", "says"),
        [
            ({"threshold": None}, "threshold is missing"),
            ({"threshold": torch.ones(N - 1)}, r"threshold has shape \[95\]"),
            ({"W_dec": torch.ones(D, N)}, r"W_dec has shape \[24, 96\]"),
            ({"W_enc": torch.ones(N)}, "must be"),
            ({"b_enc": torch.ones(N, dtype=torch.int32)}, "dtype I32"),
            ({"scaling_factor": torch.full((N,), 2.0)}, "scaling_factor"),
        ],
    )
    def test_tensors(
        self, tmp_path: Path, changes: dict[str, torch.Tensor | None], says: str
    ) -> None:
        """Missing tensors, wrong shapes and dtypes show in the headers already."""
        _save(tmp_path)
        _edit_weights(tmp_path, **changes)
        with pytest.raises(SaeError, match=says):
            inspect(tmp_path)

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    @pytest.mark.parametrize("name", ["W_enc", "b_enc", "threshold", "b_dec"])
    def test_not_finite(self, tmp_path: Path, name: str, value: float) -> None:
        """NaN and infinity in a watched row are refused."""
        _save(tmp_path)
        tensor = load_file(tmp_path / "sae_weights.safetensors")[name]
        tensor[..., 2] = value
        _edit_weights(tmp_path, **{name: tensor})
        with pytest.raises(SaeError, match=f"{name}.* is not finite"):
            read_rows(inspect(tmp_path), [2])

    def test_negative_threshold(self, tmp_path: Path) -> None:
        """A negative threshold is refused only where the latent is watched."""
        _save(tmp_path)
        threshold = torch.ones(N)
        threshold[3] = -1.0
        _edit_weights(tmp_path, threshold=threshold)
        read_rows(inspect(tmp_path), [2])
        with pytest.raises(SaeError, match="threshold of latent 3 is -1"):
            read_rows(inspect(tmp_path), [2, 3])

    @pytest.mark.parametrize("latent", [-1, N])
    def test_latent_out_of_range(self, tmp_path: Path, latent: int) -> None:
        """A latent that does not exist is refused by name."""
        _save(tmp_path)
        with pytest.raises(SaeError, match=f"no latent {latent}"):
            read_rows(inspect(tmp_path), [latent])
        with pytest.raises(SaeError, match=f"no latent {latent}"):
            read_decoder_rows(inspect(tmp_path), [latent])

    @pytest.mark.parametrize("keep", [0, 4, 1000, -1])
    def test_truncated(self, tmp_path: Path, keep: int) -> None:
        """A file cut anywhere is refused."""
        _save(tmp_path)
        file = tmp_path / "sae_weights.safetensors"
        file.write_bytes(file.read_bytes()[:keep])
        with pytest.raises(SaeError, match="not a complete safetensors file"):
            inspect(tmp_path)

    def test_pickle(self, tmp_path: Path) -> None:
        """A pickle is not read, under its own name or in disguise."""
        sae = _save(tmp_path)
        file = tmp_path / "sae_weights.safetensors"
        torch.save(sae.state_dict(), file)
        with pytest.raises(SaeError, match="not a complete safetensors file"):
            inspect(tmp_path)
        file.rename(tmp_path / "sae.pt")
        for path in (tmp_path, tmp_path / "sae.pt"):
            with pytest.raises(SaeError, match=r"never read .*`saeguard sae convert \S+sae\.pt "):
                inspect(path)

    def test_not_a_checkpoint(self, tmp_path: Path) -> None:
        """Missing folders, folders in place of files, and text that is not JSON are refused."""
        with pytest.raises(SaeError, match="not a directory"):
            inspect(tmp_path / "none")
        _save(tmp_path)
        for text in ("{", "[]", '{"a":' * 5000):
            (tmp_path / "cfg.json").write_text(text)
            with pytest.raises(SaeError, match=r"cfg\.json"):
                inspect(tmp_path)
        (tmp_path / "cfg.json").unlink()
        (tmp_path / "cfg.json").mkdir()
        with pytest.raises(SaeError, match=r"no file cfg\.json"):
            inspect(tmp_path)
