"""An index of the latents holds what a full scan of the corpus finds."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from saeguard.errors import InputError
from saeguard.features.calibrate import shares, values
from saeguard.features.corpus import norms_of, peaks
from saeguard.hf.corpus import make_corpus
from saeguard.hf.texts import read_texts
from saeguard.latents import build, chunk
from saeguard.latents.bands import BANDS, PER_BAND, TOP
from saeguard.latents.build import Progress, build_index
from saeguard.latents.index import Index
from saeguard.sae import activate, read_block, read_decoder_rows
from tests.latents.made import TEXTS, Made


@pytest.fixture(scope="module")
def scan(made: Made) -> tuple[np.ndarray, list[np.ndarray]]:
    """Activations [tokens, latents] of every token that is looked at, and of each text.

    Tokens that are not looked at have zeros in the second.
    """
    texts = read_texts(made.corpus, made.lm.tokenizer)
    corpus = make_corpus(made.lm, texts, [made.info.layer], made.features.exclude_tokens)
    first = int(np.flatnonzero(np.cumsum(corpus.lengths) >= 700)[0]) + 1
    bounds, _ = norms_of(corpus.select(np.arange(len(texts)) < first))
    corpus = corpus.without_massive(bounds)
    f = activate(read_block(made.info, 0, made.info.d_sae), corpus.x).numpy()
    f[corpus.special] = 0
    return f[~corpus.special], np.split(f, np.cumsum(corpus.lengths)[:-1])


@pytest.fixture(scope="module")
def index(made: Made) -> Index:
    """The index, open."""
    return Index(made.index)


def test_statistics_are_those_of_a_full_scan(
    index: Index, scan: tuple[np.ndarray, list[np.ndarray]]
) -> None:
    """Tokens, texts, density, mean, maximum and histogram of every latent."""
    f, texts = scan
    assert index.tokens == len(f)
    for latent in range(index.d_sae):
        fired = f[:, latent][f[:, latent] > 0]
        stats = index.stats(latent)
        assert stats.tokens == len(fired)
        assert stats.texts == sum(bool(text[:, latent].any()) for text in texts)
        assert stats.dead == (len(fired) == 0)
        assert sum(n for *_, n in stats.histogram) == len(fired)
        if len(fired):
            assert stats.density == pytest.approx(len(fired) / len(f))
            assert stats.mean == pytest.approx(fired.mean(), rel=1e-5)
            assert stats.highest == pytest.approx(fired.max(), rel=1e-5)
        for low, high, n in stats.histogram:
            inside = (fired > low * 0.99999) & (fired < high * 1.00001)
            assert n <= inside.sum()


def test_top_examples_are_those_of_a_full_scan(
    index: Index, scan: tuple[np.ndarray, list[np.ndarray]]
) -> None:
    """The strongest texts of every latent, in order, with the strongest token of each."""
    _, texts = scan
    seen = 0
    for latent in range(index.d_sae):
        peak = np.array([text[:, latent].max() for text in texts])
        expected = [i for i in np.argsort(-peak, kind="stable") if peak[i] > 0]
        top = [e for e in index.examples(latent) if not e.band]
        assert [e.text for e in top] == expected[:TOP]
        for example in top:
            column = texts[example.text][:, latent]
            assert example.at == int(column.argmax())
            assert example.value == pytest.approx(column.max(), rel=1e-5)
            assert {at for at, _ in example.fired} == {
                at for at in np.flatnonzero(column) if abs(at - example.at) <= 32
            }
            seen += 1
    assert seen > 200


def test_bands_lie_where_they_say(index: Index, scan: tuple[np.ndarray, list[np.ndarray]]) -> None:
    """A band's texts are evenly spaced among the ranks that its bounds name."""
    _, texts = scan
    shown = defaultdict(int)
    for latent in range(index.d_sae):
        peak = np.array([text[:, latent].max() for text in texts])
        order = [i for i in np.argsort(-peak, kind="stable") if peak[i] > 0]
        for example in index.examples(latent):
            if example.band:
                low, high = BANDS[example.band - 1]
                rank = order.index(example.text)
                assert int(low * len(order)) <= rank < high * len(order)
                assert rank >= TOP
                shown[example.band] += 1
    assert shown[4] > 20
    assert max(shown.values()) <= PER_BAND * index.d_sae


def test_the_logit_lens_is_the_decoder_row_through_norm_and_unembedding(
    made: Made, index: Index
) -> None:
    """The tokens are those that the row itself makes likeliest, by a plain product."""
    row = read_decoder_rows(made.info, [5])[0]
    model = made.lm.model
    with torch.no_grad():
        logits = model.lm_head(model.model.norm(row[None]))[0]
    up, down = index.lens(5)
    assert [token for token, _ in up] == [
        made.lm.tokenizer.decode([i]) for i in logits.topk(10).indices
    ]
    assert [value for _, value in down] == pytest.approx(
        (-(-logits).topk(10).values).tolist(), rel=1e-4
    )


def test_what_fires_together_is_counted_on_every_token(
    index: Index, scan: tuple[np.ndarray, list[np.ndarray]]
) -> None:
    """Lift is how often both fire over how often they would by chance."""
    f, _ = scan
    on = f > 0
    found = index.coactive(1, least=3, most=100)
    assert found
    for company in found:
        both = int((on[:, 1] & on[:, company.latent]).sum())
        assert company.together == both
        assert company.tokens == int(on[:, company.latent].sum())
        assert company.lift == pytest.approx(
            both * len(f) / (on[:, 1].sum() * on[:, company.latent].sum())
        )
    assert [c.lift for c in found] == sorted((c.lift for c in found), reverse=True)


def test_the_share_of_stronger_tokens_is_that_of_a_scan_to_a_bin(
    index: Index, scan: tuple[np.ndarray, list[np.ndarray]]
) -> None:
    """A quarter of an octave is the histogram's precision."""
    f, _ = scan
    latent = int((f > 0).sum(0).argmax())
    value = float(np.median(f[:, latent][f[:, latent] > 0]))
    (share,) = index.above([latent], [value])
    at_most = (f[:, latent] >= value * 2**-0.25 * 0.9999).mean()
    assert (f[:, latent] >= value).mean() <= share <= at_most


def test_scores_are_those_of_calibration(made: Made, index: Index) -> None:
    """Each text has the share by which a policy judges it."""
    texts = read_texts(made.corpus, made.lm.tokenizer)
    feature = made.features.features["loud"]
    corpus = make_corpus(made.lm, texts, [made.info.layer], made.features.exclude_tokens)
    bounds, _ = norms_of(corpus)
    corpus = corpus.without_massive(bounds)
    expected = shares(feature, peaks(corpus, values(made.features, feature, corpus)))
    found = index.rows("SELECT share FROM score WHERE feature = 0 ORDER BY text")
    assert [share for (share,) in found] == pytest.approx(expected.tolist(), rel=1e-4)


def test_a_run_that_was_cut_off_goes_on(made: Made, tmp_path: Path) -> None:
    """Whole chunks are not read again, and the result is that of one run."""
    out = tmp_path / "i.duckdb"
    read: list[int] = []
    thirds = 1 + sum(
        len(texts) for number, _, texts in build._chunks(made.files, 700) if number < 2
    )

    def stop(count: int) -> None:
        read.append(count)
        if len(read) == thirds:
            raise KeyboardInterrupt

    options = {"features": made.features, "chunk_tokens": 700}
    with pytest.raises(KeyboardInterrupt):
        build_index(made.lm, made.info, made.files, out, progress=Progress(stop), **options)
    folder = tmp_path / "i.duckdb.part"
    assert chunk.whole_chunks(folder) == 2
    chunk.file_of(folder, "text", 1).unlink()  # killed before the chunk's last file
    (folder / ".peak").write_bytes(b"half a file")

    with pytest.raises(InputError, match="an earlier run was cut off; go on with --resume"):
        build_index(made.lm, made.info, made.files, out, **options)
    with pytest.raises(InputError, match="unfinished: go on with"):
        Index(out)
    other = {**options, "chunk_tokens": 701}
    with pytest.raises(InputError, match="made with another chunk_tokens: found 700, expected 701"):
        build_index(made.lm, made.info, made.files, out, resume=True, **other)

    recorded: list[int] = []
    original = build.make_corpus

    def counted(*arguments: object, **more: object) -> object:
        recorded.append(1)
        return original(*arguments, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "make_corpus", counted)
        build_index(made.lm, made.info, made.files, out, resume=True, **options)
    again, whole = Index(out), Index(made.index)
    ((texts,),) = again.rows("SELECT count(*) FROM text")
    assert texts == TEXTS
    assert len(recorded) == chunk_count(made) - 1
    for table in ("latent", "example", "text", "sample", "score"):
        query = f"SELECT * FROM {table} ORDER BY ALL"  # noqa: S608 - our own names
        assert again.rows(query) == whole.rows(query)
    assert not folder.exists()


def chunk_count(made: Made) -> int:
    """Return how many chunks of 700 tokens the corpus gives."""
    return sum(1 for _ in build._chunks(made.files, 700))


def test_wrong_indexes_are_refused(made: Made, tmp_path: Path) -> None:
    """No file, another file, another SAE, a latent that is not there: each is named."""
    with pytest.raises(InputError, match="the index is not there"):
        Index(tmp_path / "none")
    (tmp_path / "text").write_text("no database")
    with pytest.raises(InputError, match="not an index of latents"):
        Index(tmp_path / "text")
    index = Index(made.index)
    with pytest.raises(InputError, match="there is no latent 64; the SAE has 0 to 63"):
        index.stats(64)
    other = made.info.weights.with_name("other.safetensors")
    other.write_bytes(made.info.weights.read_bytes() + b"\0")
    with pytest.raises(InputError, match="the index is of the SAE with sha256"):
        index.check_sae(replace(made.info, weights=other))
