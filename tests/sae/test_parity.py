"""Rows, norms and reconstructions equal those of the libraries that wrote the checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from saeguard.sae import SaeError, Stated, inspect, read_decoder_rows, read_rows
from saeguard.sae.convert import convert
from tests.sae import canonical

sae_lens = pytest.importorskip("sae_lens")
sparsify = pytest.importorskip("sparsify")
eager_decode = pytest.importorskip("sparsify.utils").eager_decode

D, N, K = 48, 192, 12
TOKENS = 64
CLASSES = {
    "standard": "Standard",
    "jumprelu": "JumpReLU",
    "gated": "Gated",
    "topk": "TopK",
}
NORMS = ["none", "expected_average_only_in", "constant_norm_rescale", "layer_norm"]
FACTOR = 0.37
TOLERANCE = {"rtol": 2e-5, "atol": 2e-5}
"""Of float32 against float32, activations of size 10: products in another order."""


def residuals(seed: int = 1) -> torch.Tensor:
    """Return residuals with an offset and an outlier dimension, as models have."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(TOKENS, D, generator=generator) + 0.5
    x[:, 3] *= 20
    return x


def randomise(module: torch.nn.Module, seed: int = 0) -> None:
    """Give every parameter values that matter; thresholds are positive."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
            if name == "threshold":
                parameter.abs_()


def save_saelens(folder: Path, architecture: str, **options: Any) -> Any:
    """Write a random SAE with SAELens' own code and return it."""
    config = getattr(sae_lens, f"{CLASSES[architecture]}SAEConfig")
    metadata = sae_lens.saes.sae.SAEMetadata(hook_name="blocks.3.hook_resid_post")
    if architecture == "topk":
        options = {"k": K, **options}
    sae = getattr(sae_lens, f"{CLASSES[architecture]}SAE")(
        config(d_in=D, d_sae=N, metadata=metadata, **options)
    )
    randomise(sae)
    sae.save_model(folder)
    return sae


def agree(info: Any, x: torch.Tensor, f: torch.Tensor, y: torch.Tensor) -> None:
    """Compare with a library's activations and reconstruction; some latents must fire."""
    got = canonical.encode(info, x)
    assert 0.01 < (f > 0).float().mean() < 0.99
    torch.testing.assert_close(got, f, **TOLERANCE)
    torch.testing.assert_close(canonical.decode(info, x, got), y, rtol=1e-4, atol=5e-4)
    print(f"encode {float((got - f).abs().max()):.1e}", end=" ")
    print(f"decode {float((canonical.decode(info, x, got) - y).abs().max()):.1e}")


@pytest.mark.parametrize("subtracts", [True, False])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("architecture", list(CLASSES))
@torch.no_grad()
def test_saelens(tmp_path: Path, architecture: str, norm: str, *, subtracts: bool) -> None:
    """Every architecture under every normalisation encodes and reconstructs as SAELens does."""
    sae = save_saelens(
        tmp_path / "sae",
        architecture,
        normalize_activations=norm,
        apply_b_dec_to_input=subtracts,
    )
    stated = Stated()
    if norm == "expected_average_only_in":
        with pytest.raises(SaeError, match="norm_factor"):
            inspect(tmp_path / "sae")
        stated = Stated(norm_factor=FACTOR)
        sae.fold_activation_norm_scaling_factor(FACTOR)
    info = inspect(tmp_path / "sae", stated)
    x = residuals()
    f = sae.encode(x)
    agree(info, x, f, sae.decode(f))


@torch.no_grad()
def test_saelens_topk_in_units_of_the_decoder(tmp_path: Path) -> None:
    """`rescale_acts_by_decoder_norm` ranks and stores by the decoder's norms."""
    sae = save_saelens(tmp_path, "topk", rescale_acts_by_decoder_norm=True)
    x = residuals()
    f = sae.encode(x)
    agree(inspect(tmp_path), x, f, sae.decode(f))


@pytest.mark.parametrize("name", ["batchtopk", "matryoshka_batchtopk"])
@torch.no_grad()
def test_saelens_batchtopk(tmp_path: Path, name: str) -> None:
    """BatchTopK SAEs are saved for inference as JumpReLU, and read as such."""
    module = getattr(sae_lens.saes, f"{name}_sae")
    class_ = {"batchtopk": "BatchTopK", "matryoshka_batchtopk": "MatryoshkaBatchTopK"}[name]
    options: dict[str, Any] = {"d_in": D, "d_sae": N, "k": K}
    if name != "batchtopk":
        options["matryoshka_widths"] = [N // 2, N]
    sae = getattr(module, f"{class_}TrainingSAE")(
        getattr(module, f"{class_}TrainingSAEConfig")(**options)
    )
    sae.cfg.metadata.hook_name = "blocks.3.hook_resid_post"
    randomise(sae)
    sae.topk_threshold.fill_(0.8)
    sae.save_inference_model(tmp_path)
    loaded = sae_lens.SAE.load_from_disk(tmp_path)
    x = residuals()
    f = loaded.encode(x)
    info = inspect(tmp_path)
    assert (info.architecture, info.activation) == ("jumprelu", "jumprelu")
    agree(info, x, f, loaded.decode(f))


@torch.no_grad()
def test_saelens_transcoder(tmp_path: Path) -> None:
    """A transcoder that reads the residual can be watched, and is not decoded."""
    config = sae_lens.TranscoderConfig(d_in=D, d_sae=N, d_out=D, apply_b_dec_to_input=False)
    config.metadata.hook_name = "blocks.3.hook_resid_post"
    sae = sae_lens.Transcoder(config)
    randomise(sae)
    sae.save_model(tmp_path)
    x = residuals()
    info = inspect(tmp_path)
    torch.testing.assert_close(canonical.encode(info, x), sae.encode(x), **TOLERANCE)
    with pytest.raises(SaeError, match="watched but not clamped"):
        read_decoder_rows(info, [0])


@pytest.mark.parametrize("activation", ["topk", "groupmax"])
@pytest.mark.parametrize("transcode", [False, True])
@torch.no_grad()
def test_sparsify(tmp_path: Path, activation: str, *, transcode: bool) -> None:
    """A checkpoint of sparsify's encodes and reconstructs as sparsify does."""
    config = sparsify.SparseCoderConfig(
        activation=activation, expansion_factor=N // D, k=K, transcode=transcode
    )
    coder = sparsify.SparseCoder(D, config)
    randomise(coder)
    coder.save_to_disk(tmp_path / "layers.4")
    x = residuals()
    encoded = coder.encode(x)
    f = torch.zeros(TOKENS, N).scatter(-1, encoded.top_indices, encoded.top_acts)
    info = inspect(tmp_path / "layers.4")
    assert (info.layer, info.k, info.transcoder) == (3 if transcode else 4, K, transcode)
    if transcode:
        torch.testing.assert_close(canonical.encode(info, x), f, **TOLERANCE)
    else:
        # Its `decode` asks for a GPU where Triton is installed; this is what it calls without.
        W = coder.W_dec.mT
        y = eager_decode(encoded.top_indices, encoded.top_acts, W) + coder.b_dec
        agree(info, x, f, y)


@pytest.mark.parametrize("architecture", list(CLASSES))
@torch.no_grad()
def test_converted_equals_its_source(tmp_path: Path, architecture: str) -> None:
    """Conversion to rows changes no bit of any row."""
    save_saelens(tmp_path / "sae", architecture, normalize_activations="layer_norm")
    source = inspect(tmp_path / "sae")
    info = convert(tmp_path / "sae", tmp_path / "rows")
    assert (info.format, info.activation, info.k, info.norm) == (
        source.format, source.activation, source.k, source.norm,
    )  # fmt: skip
    latents = [5, 0, N - 1, 5]
    for name in ("W", "b", "theta"):
        before = getattr(read_rows(source, latents), name)
        assert torch.equal(getattr(read_rows(info, latents), name), before)
    assert torch.equal(read_decoder_rows(info, latents), read_decoder_rows(source, latents))


CENTRED = {"center_writing_weights": True, "fold_ln": False}


@pytest.mark.parametrize("norm", ["none", "expected_average_only_in", "layer_norm"])
@pytest.mark.parametrize("architecture", list(CLASSES))
@torch.no_grad()
def test_centred_writing_weights(tmp_path: Path, architecture: str, norm: str) -> None:
    """What SAELens computes from the residual without its mean, the folded rows do from it whole.

    So it is with gpt2-small-res-jb and its family.
    """
    sae = save_saelens(tmp_path / "sae", architecture, normalize_activations=norm)
    stated = Stated(norm_factor=FACTOR) if norm == "expected_average_only_in" else None
    if stated is not None:
        sae.cfg.normalize_activations = "none"
        sae.fold_activation_norm_scaling_factor(FACTOR)
    retold(tmp_path / "sae", "gpt2-small", CENTRED)
    info = inspect(tmp_path / "sae", stated)
    assert "each token's mean is subtracted from the input" in info.folded
    rows = read_rows(info, range(N))
    x = residuals() + 3.0
    centred = x - x.mean(1, keepdim=True)
    torch.testing.assert_close(rows.W @ x.T, rows.W @ centred.T, rtol=1e-3, atol=1e-3)
    agree_on_codes(info, x, sae.encode(centred))
    converted = convert(tmp_path / "sae", tmp_path / "converted", stated=stated)
    assert converted.layout.centred
    torch.testing.assert_close(read_rows(converted, range(N)).W, rows.W)


def agree_on_codes(info: Any, x: torch.Tensor, f: torch.Tensor) -> None:
    """Compare activations with a library's."""
    assert 0.01 < (f > 0).float().mean() < 0.99
    torch.testing.assert_close(canonical.encode(info, x), f, rtol=1e-4, atol=2e-4)


def retold(folder: Path, model: str, given: object) -> None:
    """State in a checkpoint's configuration how its model was changed before training."""
    file = folder / "cfg.json"
    config = json.loads(file.read_text())
    config["metadata"] |= {"model_name": model, "model_from_pretrained_kwargs": given}
    file.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("model", "norm", "given", "said"),
    [
        ("my/model", "none", CENTRED, "whether the norms of 'my/model' subtract the mean"),
        ("gpt2", "constant_norm_rescale", CENTRED, "the norm of a token without its mean"),
        ("gpt2", "none", {"checkpoint_value": 3000}, "has checkpoint_value: 3000"),
        ("gpt2", "none", ["fold_ln"], "an object is needed"),
    ],
)
def test_other_changes_of_the_model_are_refused(
    tmp_path: Path, model: str, norm: str, given: object, said: str
) -> None:
    """An SAE of a model that is served otherwise than it was trained on is not watched wrongly."""
    save_saelens(tmp_path / "sae", "standard", normalize_activations=norm)
    retold(tmp_path / "sae", model, given)
    with pytest.raises(SaeError, match=said):
        inspect(tmp_path / "sae")


@pytest.mark.parametrize(
    ("model", "given"),
    [
        ("gemma-2b", CENTRED),  # whose norms keep the mean: TransformerLens does not centre it
        ("gpt2", {"center_writing_weights": False, "device": "cuda"}),
        ("gpt2", {}),
        ("gpt2", None),
    ],
)
def test_a_model_that_is_served_as_it_was(tmp_path: Path, model: str, given: object) -> None:
    """Nothing is folded."""
    save_saelens(tmp_path / "sae", "standard")
    before = read_rows(inspect(tmp_path / "sae"), range(N)).W
    retold(tmp_path / "sae", model, given)
    torch.testing.assert_close(read_rows(inspect(tmp_path / "sae"), range(N)).W, before)


@torch.no_grad()
def test_what_centring_does_to_a_residual() -> None:
    """TransformerLens' own: the stream loses each token's mean and nothing else."""
    lens = pytest.importorskip("transformer_lens")
    config = lens.HookedTransformerConfig(
        n_layers=2, d_model=32, n_ctx=16, d_head=8, n_heads=4, d_vocab=50, act_fn="gelu",
        normalization_type="LN", seed=0,
    )  # fmt: skip
    model, centred = lens.HookedTransformer(config), lens.HookedTransformer(config)
    randomise(model)
    centred.load_and_process_state_dict(
        model.state_dict(), fold_ln=False, center_writing_weights=True, center_unembed=False,
        fold_value_biases=False,
    )  # fmt: skip
    tokens = torch.arange(12)[None]
    name = "blocks.1.hook_resid_post"
    (x, y) = (m.run_with_cache(tokens)[1][name] for m in (model, centred))
    torch.testing.assert_close(y, x - x.mean(-1, keepdim=True), rtol=1e-3, atol=1e-3)
    assert float(x.mean(-1).abs().max()) > 0.01
