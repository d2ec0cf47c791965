"""Searches by prompt: which latents fire, in all of these and in none of those, and how rarely."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from saeguard.errors import InputError
from saeguard.hf.on_prompt import OnPrompt, on_prompt, one_token
from saeguard.hf.residuals import record
from saeguard.hf.texts import make_text
from saeguard.latents.index import Index
from saeguard.latents.prompts import by_position, find, specific
from saeguard.sae import activate, read_block
from tests.latents.made import Made


def read(made: Made, words: str) -> OnPrompt:
    """Return a plain text, read and encoded."""
    return on_prompt(
        made.lm, made.info, made.features, make_text("text", made.lm.tokenizer, "", words)
    )


def plain(made: Made, words: str) -> np.ndarray:
    """Return the activations [tokens, latents] of a text, by the plain formula."""
    ids = made.lm.tokenizer(words)["input_ids"]
    ((_, x),) = record(made.lm, [ids], [made.info.layer])
    f = activate(read_block(made.info, 0, made.info.d_sae), x[made.info.layer]).numpy()
    f[np.isin(ids, made.features.exclude_tokens)] = 0
    return f


def test_a_search_finds_what_fires_on_all_and_on_none(made: Made) -> None:
    """Latents on in both prompts and off in the third, strongest first by the weaker prompt."""
    words = ("abcab#", "#bcd<&", "hh")
    a, b, c = (plain(made, w).max(0) for w in words)
    found = find([read(made, words[0]), read(made, words[1])], [read(made, words[2])])
    expected = np.flatnonzero((a > 0) & (b > 0) & (c == 0))
    assert sorted(f.latent for f in found) == expected.tolist()
    assert len(found) > 3
    values = [f.value for f in found]
    assert values == sorted(values, reverse=True)
    for f in found:
        assert f.value == pytest.approx(min(a[f.latent], b[f.latent]), rel=1e-5)
        (_, at), _ = f.peaks
        assert at == int(plain(made, words[0])[:, f.latent].argmax())


def test_the_background_counts_tokens_at_least_as_strong(made: Made) -> None:
    """Exactly on texts, to a bin of the histogram on an index; the rarest come first."""
    prompt, background = "ab#cd", ["hgfedcba" * 4, "a b c d # <"]
    f = np.concatenate([plain(made, w)[1:] for w in background])
    found = find([read(made, prompt)], background=[read(made, w) for w in background])
    for each in found:
        assert each.background == pytest.approx((f[:, each.latent] >= each.value).mean(), abs=1e-9)
    ranked = specific(found)
    assert ranked[0].background == min(each.background for each in found)
    assert [e.background for e in ranked] == sorted(e.background for e in ranked)

    index = Index(made.index)
    of_index = find([read(made, prompt)], index=index)
    expected = index.above([e.latent for e in of_index], [e.value for e in of_index])
    assert [e.background for e in of_index] == expected.tolist()


def test_positions_have_their_strongest_latents(made: Made) -> None:
    """Token by token; special tokens have none."""
    words = "ab#cd"
    f = plain(made, words)
    found = by_position(read(made, words), 3)
    assert found[0] == []
    for at, entries in enumerate(found):
        order = [i for i in np.argsort(-f[at], kind="stable")[:3] if f[at, i] > 0]
        assert [latent for latent, _ in entries] == order


def test_attention_sinks_are_left_out(made: Made) -> None:
    """A token whose residual is far longer than the others' is not looked at."""
    text = make_text("text", made.lm.tokenizer, "", "abcdefgh")
    handle = made.lm.layers[0].register_forward_pre_hook(
        lambda _m, args: (torch.cat([args[0][:, :3], 1e4 * args[0][:, 3:4], args[0][:, 4:]], 1),)
    )
    try:
        found = on_prompt(made.lm, made.info, None, text)
    finally:
        handle.remove()
    assert not found.looked[3]
    assert 3 not in found.token
    assert found.looked.sum() == len(text.tokens) - 2  # BOS, too
    with pytest.raises(InputError, match="every token is special"):
        on_prompt(
            made.lm, made.info, made.features, make_text("t", made.lm.tokenizer, "", "<|bos|>")
        )


def test_a_target_is_one_token(made: Made) -> None:
    """More or fewer are named."""
    assert one_token(made.lm, "a", "--target") == made.lm.tokenizer("a")["input_ids"][1]
    with pytest.raises(InputError, match=r"--target: expected one token, 'ab' is 2: 'a', 'b'"):
        one_token(made.lm, "ab", "--target")
    with pytest.raises(InputError, match="'' is 0: none"):
        one_token(made.lm, "", "--target")
