"""Tiny random models of several families, with a byte-level tokenizer and a chat template."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

BOS, PAD, END = "<|bos|>", "<|pad|>", "<|end|>"
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] + ':' + m['content'] + '<|end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
D, LAYERS = 16, 3

Chat = tuple[list[int], list[str]]
"""Token ids of a prompt, and whose turn each is in."""


def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of one token per byte, which puts BOS in front."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([PAD, BOS, END, *alphabet])}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, 1)]
    )
    out = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=BOS, pad_token=PAD, eos_token=END, model_max_length=256
    )
    out.chat_template = TEMPLATE
    return out


def chat_by_hand(messages: Sequence[tuple[str, str]], continued: str = "") -> Chat:
    """Return a chat's prompt as `TEMPLATE` has it, put together piece by piece.

    Args:
        messages: role and content of each.
        continued: what the request has the model continue.
    """
    read = tokenizer()
    ids, roles = [read.bos_token_id], ["template"]
    for role, content in [*messages, ("assistant", None)]:
        for place, text in (("template", f"{role}:"), (role, content), ("template", END)):
            if content is not None or text == "assistant:":
                piece = read(text, add_special_tokens=False)["input_ids"]
                ids += piece
                roles += [place] * len(piece)
    piece = read(continued, add_special_tokens=False)["input_ids"]
    return ids + piece, roles + ["continued"] * len(piece)


def _model(family: str) -> Any:
    from transformers import (
        GPT2Config,
        GPT2LMHeadModel,
        GPTNeoXConfig,
        GPTNeoXForCausalLM,
        LlamaConfig,
        LlamaForCausalLM,
        OPTConfig,
        OPTForCausalLM,
    )  # fmt: skip

    heads = {"num_attention_heads": 2, "hidden_size": D, "num_hidden_layers": LAYERS}
    common = {"vocab_size": 259, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    sizes = {"intermediate_size": 32, "max_position_embeddings": 256}
    if family == "llama":
        return LlamaForCausalLM(LlamaConfig(**heads, **common, **sizes))
    if family == "gpt_neox":
        return GPTNeoXForCausalLM(GPTNeoXConfig(**heads, **common, **sizes))
    if family == "opt":
        return OPTForCausalLM(OPTConfig(**heads, **common, ffn_dim=32, word_embed_proj_dim=D))
    return GPT2LMHeadModel(GPT2Config(n_embd=D, n_layer=LAYERS, n_head=2, **common))


def save_model(folder: Path, family: str = "llama") -> Path:
    """Write a seeded random model of `family` with the tokenizer."""
    torch.manual_seed(3)
    model = _model(family)
    with torch.no_grad():  # at their small initial scale the layers would hardly differ
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder
