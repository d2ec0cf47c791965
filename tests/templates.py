"""Tokenizers with the chat formats of model families, made on the spot.

The formats are those that the families document; templates and vocabularies are our own. The
templates mark what the assistant says for `return_assistant_tokens_mask`, Transformers' own.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SAY = "{% generation %}{{ c }}{% endgeneration %}"
LOOP = (
    "{% for m in messages %}{% set r = m['role'] %}{% set c = m['content']TRIM %}"
    "HEAD{% if r == 'assistant' %}" + SAY + "{% else %}{{ c }}{% endif %}FOOT{% endfor %}"
)


def _loop(head: str, foot: str, trim: str = "") -> str:
    return LOOP.replace("HEAD", head).replace("FOOT", foot).replace("TRIM", trim)


@dataclass(frozen=True)
class Family:
    """A chat format."""

    template: str
    special: tuple[str, ...]
    roles: frozenset[str]
    """That have turns of their own."""
    pieces: str = "bytes"
    """Or `words`, as SentencePiece makes them."""


CHATML = _loop(
    "{% if r == 'tool' %}{{ '<|im_start|>user\\n<tool_response>\\n' }}"
    "{% else %}{{ '<|im_start|>' + r + '\\n' }}{% endif %}",
    "{% if r == 'tool' %}{{ '\\n</tool_response>' }}{% endif %}{{ '<|im_end|>\\n' }}",
)
OPEN = "{% if add_generation_prompt %}"
DEFAULT = (
    "{% if messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nBe of help.<|im_end|>\\n' }}{% endif %}"
)
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"

FAMILIES = {
    "chatml": Family(
        DEFAULT + CHATML + OPEN + "{{ '<|im_start|>assistant\\n' }}{% endif %}",
        ("<|im_start|>", "<|im_end|>", "<tool_response>", "</tool_response>"),
        frozenset({"system", "user", "assistant", "tool"}),
    ),
    "thinking": Family(  # as a model that is told not to think: more behind the last opening
        CHATML + OPEN + "{{ '<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n' }}{% endif %}",
        (
            "<|im_start|>",
            "<|im_end|>",
            "<tool_response>",
            "</tool_response>",
            "<think>",
            "</think>",
        ),
        frozenset({"system", "user", "assistant", "tool"}),
    ),
    "llama3": Family(
        "{{ bos_token }}"
        "{% if messages[0]['role'] != 'system' %}{{ '<|start_header_id|>system<|end_header_id|>"
        "\\n\\nToday: ' + strftime_now('%d %b %Y') + '\\n\\n<|eot_id|>' }}{% endif %}"
        + _loop(
            "{{ '<|start_header_id|>' + ('ipython' if r == 'tool' else r) + '<|end_header_id|>"
            "\\n\\n' }}{% if r == 'system' %}{{ 'Today: ' + strftime_now('%d %b %Y') + '\\n\\n' }}"
            "{% endif %}",
            "{{ '<|eot_id|>' }}",
            "|trim",
        )
        + OPEN
        + "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}",
        ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        frozenset({"system", "user", "assistant", "tool"}),
    ),
    "gemma": Family(
        "{{ bos_token }}"
        + NO_SYSTEM
        + _loop(
            "{{ '<start_of_turn>' + ('model' if r == 'assistant' else r) + '\\n' }}",
            "{{ '<end_of_turn>\\n' }}",
            "|trim",
        )
        + OPEN
        + "{{ '<start_of_turn>model\\n' }}{% endif %}",
        ("<bos>", "<start_of_turn>", "<end_of_turn>"),
        frozenset({"user", "assistant", "tool"}),
        "words",
    ),
    "zephyr": Family(
        _loop("{{ '<|' + r + '|>\\n' }}", "{{ '</s>\\n' }}")
        + OPEN
        + "{{ '<|assistant|>\\n' }}{% endif %}",
        ("<s>", "</s>"),
        frozenset({"system", "user", "assistant", "tool"}),
        "words",
    ),
    "mistral": Family(
        "{{ bos_token }}"
        "{% set first = messages[0]['content'] if messages[0]['role'] == 'system' else none %}"
        "{% set rest = messages[1:] if first else messages %}"
        "{% for m in rest %}{% set r = m['role'] %}{% set c = m['content'] %}"
        "{% if r not in ['user', 'assistant'] %}{{ raise_exception('roles') }}{% endif %}"
        "{% if r == 'user' %}{{ '[INST] ' + (first + '\\n\\n' if loop.first and first else '') + c"
        " + ' [/INST]' }}{% else %}{{ ' ' }}" + SAY + "{{ '</s>' }}{% endif %}{% endfor %}",
        ("<s>", "</s>", "[INST]", "[/INST]"),
        frozenset({"user", "assistant"}),
        "words",
    ),
    "channels": Family(  # a turn of the assistant in two parts, of which one is not shown again
        _loop(
            "{{ '<|start|>' + r + ('<|channel|>final' if r == 'assistant' else '') + '<|message|>'"
            " }}",
            "{{ '<|end|>' }}",
        )
        + OPEN
        + "{{ '<|start|>assistant' }}{% endif %}",
        ("<|start|>", "<|channel|>", "<|message|>", "<|end|>"),
        frozenset({"system", "user", "assistant", "tool"}),
    ),
}

REFUSED = {
    "no special token before an answer": Family(
        "{% for m in messages %}{{ m['role'].upper() + ': ' + m['content'] + '\\n' }}"
        "{% if m['role'] == 'assistant' %}{{ '</s>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'ASSISTANT: ' }}{% endif %}",
        ("<s>", "</s>"),
        frozenset(),
    ),
    "the same mark for all": Family(
        "{% for m in messages %}{{ '<|turn|>' + m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|turn|>' }}{% endif %}",
        ("<|turn|>",),
        frozenset(),
    ),
    "it changes what is said": Family(
        "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'].replace('[', '(') }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}",
        ("<|system|>", "<|user|>", "<|assistant|>", "<|tool|>"),
        frozenset(),
    ),
    "earlier answers are left out": Family(
        "{% for m in messages %}{% if m['role'] != 'assistant' %}"
        "{{ '<|' + m['role'] + '|>' + m['content'] }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}",
        ("<|system|>", "<|user|>", "<|assistant|>", "<|tool|>"),
        frozenset(),
    ),
}

CORPUS = [
    "the first red word a second green line blue is third here fourth and grey user assistant",
    "system\n\nToday: 01 Jan 2001\n\nassistant\nuser\ntool\nmodel\nfinal\n\n\n",
    "  ## Response: [1, 2]",
]


def make_tokenizer(family: Family) -> PreTrainedTokenizerFast:
    """Return a small tokenizer whose pieces run together as the family's do.

    Line breaks and spaces merge with their like, as in vocabularies made from web text.
    """
    core = Tokenizer(models.BPE(byte_fallback=family.pieces == "words", unk_token=None))
    if family.pieces == "bytes":
        words = Regex(
            r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+"
        )
        core.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(words, "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        core.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=500, special_tokens=list(family.special), initial_alphabet=alphabet
        )
    else:
        core.normalizer = normalizers.Replace(" ", "\u2581")
        core.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n+"), "isolated")
        core.decoder = decoders.Sequence(
            [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
        )
        hexes = [f"<0x{i:02X}>" for i in range(256)]
        trainer = trainers.BpeTrainer(
            vocab_size=500, special_tokens=[*family.special, *hexes], max_token_length=8
        )
    core.train_from_iterator(CORPUS * 20, trainer)
    whole = json.loads(core.to_str())  # the trainer calls bytes special, which they are not
    whole["added_tokens"] = [t for t in whole["added_tokens"] if t["content"] in family.special]
    core = Tokenizer.from_str(json.dumps(whole))
    bos = next((t for t in family.special if t in ("<s>", "<bos>", "<|begin_of_text|>")), None)
    out = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=bos,
        eos_token=family.special[-1],
        extra_special_tokens=list(family.special),
    )
    out.chat_template = family.template
    return out
