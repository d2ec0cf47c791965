"""Families without an installable library, against the formula their authors document."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from saeguard.sae import SaeError, SaeInfo, Stated, inspect, read_decoder_rows, read_rows
from saeguard.sae.convert import convert
from tests.sae import canonical, made
from tests.sae.made import D, K, Made, N

TOLERANCE = {"rtol": 2e-5, "atol": 2e-5}
CLASSES = [
    "AutoEncoder", "AutoEncoderNew", "GatedAutoEncoder", "JumpReluAutoEncoder", "AutoEncoderTopK",
    "BatchTopKSAE", "MatryoshkaBatchTopKSAE",
]  # fmt: skip


def _residuals() -> torch.Tensor:
    x = torch.randn(50, D, generator=torch.Generator().manual_seed(3)) + 0.3
    x[:, 2] *= 10
    return x


def _agrees(info: SaeInfo, made_: Made) -> None:
    x = _residuals()
    f = made_.encode(x)
    assert 0.01 < (f != 0).float().mean() < 0.99
    got = canonical.encode(info, x)
    torch.testing.assert_close(got, f, **TOLERANCE)
    y = made_.decode(x, f)
    torch.testing.assert_close(canonical.decode(info, x, got), y, rtol=1e-4, atol=2e-4)


READ: dict[str, tuple[Callable[[Path], Made], Stated]] = {
    "gemma_scope": (made.gemma_scope, Stated()),
    "gemma_scope compressed": (partial(made.gemma_scope, compressed=True), Stated()),
    "gemma_scope column-major": (partial(made.gemma_scope, fortran=True), Stated()),
    "gemma_scope_2": (made.gemma_scope_2, Stated()),
    "llama_scope": (partial(made.llama_scope, convention="openmoss"), Stated()),
    "llama_scope saelens": (
        partial(made.llama_scope, convention="saelens"), Stated(convention="saelens"),
    ),
    "llama_scope_r1": (partial(made.llama_scope_r1, factor=0.6), Stated(norm_factor=0.6)),
}  # fmt: skip


@pytest.mark.parametrize("name", list(READ))
def test_read_as_published(tmp_path: Path, name: str) -> None:
    """Encode and reconstruction are the documented ones, before and after conversion to rows."""
    make, stated = READ[name]
    made_ = make(tmp_path / "published")
    info = inspect(made_.path, stated)
    assert info.format == name.split(maxsplit=1)[0]
    assert (info.d_in, info.d_sae) == (D, N)
    _agrees(info, made_)
    rows = convert(made_.path, tmp_path / "rows", stated=stated)
    assert (rows.format, rows.layer) == (info.format, info.layer)
    assert torch.equal(read_rows(rows, [3, 0]).W, read_rows(info, [3, 0]).W)
    _agrees(rows, made_)


PICKLED: dict[str, tuple[Callable[[Path], Made], Stated, int]] = {
    "goodfire": (made.goodfire, Stated(), 19),
    "openai": (made.openai, Stated(layer=5), 5),
    "qwen_scope": (made.qwen_scope, Stated(), 7),
    **{
        f"dictionary_learning {name}": (
            partial(made.dictionary_learning, class_=name), Stated(), 2,
        )
        for name in CLASSES
    },
}  # fmt: skip


@pytest.mark.parametrize("name", list(PICKLED))
def test_converted_from_a_pickle(tmp_path: Path, name: str) -> None:
    """What comes out of a pickle computes what its authors document, and tells its origin."""
    make, stated, layer = PICKLED[name]
    made_ = make(tmp_path / "published")
    with pytest.raises(SaeError, match="saeguard sae convert"):
        inspect(made_.path)
    info = convert(made_.path, tmp_path / "rows", stated=stated, revision="abc123")
    assert (info.format, info.layer) == (name.split(maxsplit=1)[0], layer)
    _agrees(info, made_)
    record = json.loads((tmp_path / "rows" / "saeguard_sae.json").read_text())["provenance"]
    assert record["source"] == made_.path.name
    assert len(record["sha256"]) == 64
    assert record["revision"] == "abc123"
    assert record["operations"][0] == "tensors taken out of the pickle"


class TestLlamaScopeConventions:
    """The two readings differ, and which one was chosen is told."""

    def test_they_differ(self, tmp_path: Path) -> None:
        """With decoder norms other than 1, other latents fire."""
        path = made.llama_scope(tmp_path, "openmoss").path
        x = _residuals()
        ours = canonical.encode(inspect(path), x)
        theirs = canonical.encode(inspect(path, Stated(convention="saelens")), x)
        assert ((ours > 0) != (theirs > 0)).float().mean() > 0.01
        both = (ours > 0) & (theirs > 0)
        # f_a = f_b * n / s wherever both fire, as SAE_FORMATS has it.
        ratio = ours[both] / theirs[both]
        assert ratio.max() > 1.5 * ratio.min()

    def test_the_choice_is_told(self, tmp_path: Path) -> None:
        """`folded` names the convention, and whether anybody asked for it."""
        path = made.llama_scope(tmp_path, "openmoss").path
        assert "convention 'openmoss', since none is stated" in inspect(path).folded
        stated = inspect(path, Stated(convention="saelens"))
        assert "convention 'saelens', as stated" in stated.folded


class TestRefusals:
    """What cannot be right is refused, with the reason."""

    def test_hook_points(self, tmp_path: Path) -> None:
        """Only the residual stream after a block is read."""
        path = made.gemma_scope_2(tmp_path / "a").path
        config = json.loads((path / "config.json").read_text())
        hook = "model.layers.2.post_feedforward_layernorm.output"
        (path / "config.json").write_text(json.dumps(config | {"hf_hook_point_in": hook}))
        with pytest.raises(SaeError, match=r"config\.json: hf_hook_point_in is .*resid_post"):
            inspect(path)
        att = made.gemma_scope(tmp_path / "models--google--gemma-scope-2b-pt-att").path
        with pytest.raises(SaeError, match="'att' SAEs do not read the residual stream"):
            inspect(att)

    def test_a_layer_that_nobody_says(self, tmp_path: Path) -> None:
        """The layer comes from the published folders or from the user, and never both ways."""
        path = made.gemma_scope(tmp_path).path
        assert inspect(path).layer == 1
        with pytest.raises(SaeError, match="reads layer 1, but layer 2 was stated"):
            inspect(path, Stated(layer=2))
        moved = path.rename(tmp_path / "mine")
        with pytest.raises(SaeError, match="layer is not in the files"):
            inspect(moved)
        assert inspect(moved, Stated(layer=2)).layer == 2

    @pytest.mark.parametrize(
        ("stated", "says"),
        [
            (
                Stated(k=9),
                r"k was stated as 9, but this SAE does not rank its latents \(jumprelu\)",
            ),
            (Stated(norm_factor=0.5), "norm_factor was stated as 0.5, but its files leave no"),
            (Stated(convention="saelens"), "convention was stated as saelens, but this is gemma"),
        ],
    )
    def test_stated_for_another_sae(self, tmp_path: Path, stated: Stated, says: str) -> None:
        """What an SAE has no use for is said of another one, and not passed over."""
        path = made.gemma_scope(tmp_path).path
        with pytest.raises(SaeError, match=says):
            inspect(path, stated)

    def test_stated_against_the_files(self, tmp_path: Path) -> None:
        """Files win, and say so: of a pickle that holds k, and of what converting settled."""
        pickle = made.openai(tmp_path / "p").path
        with pytest.raises(SaeError, match=f"k was stated as {K + 1}, but its files say {K}"):
            convert(pickle, tmp_path / "rows", stated=Stated(layer=5, k=K + 1))
        assert not (tmp_path / "rows").exists()
        assert convert(pickle, tmp_path / "rows", stated=Stated(layer=5, k=K)).k == K
        convert(made.llama_scope(tmp_path / "l", "openmoss").path, tmp_path / "llama")
        assert inspect(tmp_path / "llama", Stated(convention="openmoss")).d_sae == N
        with pytest.raises(SaeError, match="it was converted under the other one"):
            inspect(tmp_path / "llama", Stated(convention="saelens"))
        convert(
            made.llama_scope_r1(tmp_path / "r", 0.6).path,
            tmp_path / "r1",
            stated=Stated(norm_factor=0.6),
        )
        with pytest.raises(SaeError, match=r"the input is multiplied by 0\.6"):
            inspect(tmp_path / "r1", Stated(norm_factor=0.7))

    def test_threshold_never_calibrated(self, tmp_path: Path) -> None:
        """A BatchTopK threshold of -1 means that a verdict would depend on the batch."""
        path = made.dictionary_learning(tmp_path / "p", "BatchTopKSAE").path
        state = torch.load(path, weights_only=True)
        torch.save(state | {"threshold": torch.tensor(-1.0)}, path)
        with pytest.raises(SaeError, match=r"threshold is -1\.0: never calibrated"):
            convert(path, tmp_path / "rows")
        assert not (tmp_path / "rows").exists()

    def test_goodfire_r1(self, tmp_path: Path) -> None:
        """A TopK over the batch without a saved threshold is refused."""
        path = tmp_path / "math.pt"
        torch.save({"W": torch.ones(D, N), "b_enc": torch.ones(N), "b_dec": torch.ones(D)}, path)
        with pytest.raises(SaeError, match="whole batch"):
            convert(path, tmp_path / "rows")

    def test_ambiguous_pickle(self, tmp_path: Path) -> None:
        """Names of tensors that several classes share are not guessed at."""
        path = made.dictionary_learning(tmp_path / "p", "AutoEncoderNew").path
        (path.parent / "config.json").rename(tmp_path / "kept.json")
        with pytest.raises(SaeError, match="--config"):
            convert(path, tmp_path / "rows")
        info = convert(path, tmp_path / "rows", config=tmp_path / "kept.json")
        assert info.architecture == "AutoEncoderNew"

    def test_other_submodules(self, tmp_path: Path) -> None:
        """dictionary_learning's SAEs of other places than the residual are refused."""
        path = made.dictionary_learning(
            tmp_path / "p", "BatchTopKSAE", submodule_name="mlp_out_layer_2"
        ).path
        with pytest.raises(SaeError, match="mlp_out_layer_2"):
            convert(path, tmp_path / "rows")

    def test_k_must_be_known(self, tmp_path: Path) -> None:
        """Qwen-Scope's k is in the repository's name; without it, it is asked for."""
        path = made.qwen_scope(tmp_path / "p").path
        moved = path.rename(tmp_path / path.name)
        with pytest.raises(SaeError, match="--k"):
            convert(moved, tmp_path / "rows")
        assert convert(moved, tmp_path / "rows", stated=Stated(k=K)).k == K

    def test_existing_folder(self, tmp_path: Path) -> None:
        """Nothing is overwritten."""
        path = made.goodfire(tmp_path / "p").path
        (tmp_path / "rows").mkdir()
        with pytest.raises(SaeError, match="exists already"):
            convert(path, tmp_path / "rows")

    def test_sparsify_modules(self, tmp_path: Path) -> None:
        """A folder named after a module of a block does not hold a residual SAE."""
        from safetensors.torch import save_file

        folder = tmp_path / "layers.3.mlp"
        folder.mkdir()
        weights = {
            "encoder.weight": torch.ones(N, D), "encoder.bias": torch.ones(N),
            "W_dec": torch.ones(N, D), "b_dec": torch.ones(D),
        }  # fmt: skip
        save_file(weights, folder / "sae.safetensors")
        config = {"k": K, "d_in": D, "expansion_factor": N // D}
        (folder / "cfg.json").write_text(json.dumps(config))
        with pytest.raises(SaeError, match="not a block"):
            inspect(folder)
        assert inspect(folder.rename(tmp_path / "layers.3")).layer == 3

    def test_decoder_rows_of_zero(self, tmp_path: Path) -> None:
        """A dead latent whose activations are in units of a norm of 0 is refused where watched."""
        from safetensors.torch import load_file, save_file

        path = made.llama_scope(tmp_path, "openmoss").path
        file = path / "checkpoints" / "final.safetensors"
        tensors = load_file(file)
        tensors["decoder.weight"][:, 4] = 0
        save_file(tensors, file)
        read_rows(inspect(path), [3, 5])
        for read in (read_rows, read_decoder_rows):
            with pytest.raises(SaeError, match="latent 4 is zero"):
                read(inspect(path), [3, 4])
