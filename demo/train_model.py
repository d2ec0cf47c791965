"""Train the demo language model: tokenizer, corpus, a small Llama. Seeded and resumable.

``python -m demo.train_model`` runs a fixed number of steps; ``--minutes`` fits the learning rate
schedule to a wall time instead. Stopped runs go on from the last checkpoint in ``demo/.work``.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tqdm import tqdm
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from demo.common import (
    BOS,
    CHAT_TEMPLATE,
    END,
    MODEL_DIR,
    PAD,
    SPECIAL,
    WORK_DIR,
    Clock,
    read_json,
    render,
    write_json,
)  # fmt: skip
from demo.corpus.build import SEED, Document, documents
from demo.corpus.grammar import Dialogue

VOCAB = 2560
LENGTH = 256
ROWS = 12  # rows of LENGTH tokens in one step
STEPS = 3600
LEARNING_RATE = 2.5e-3
WARMUP = 100
LATER = 0.5  # from here on, five of six rows that are mostly plain text are left out
DIALOGUES, PYTHON_CHARS, ENGLISH_CHARS = 60_000, 7_000_000, 1_400_000
VALIDATION_ROWS = 96
SAVE_EVERY = 180.0  # seconds


def corpus() -> list[Document]:
    """The documents the model and the SAE are trained on."""
    return documents(DIALOGUES, PYTHON_CHARS, ENGLISH_CHARS, SEED)


def text_of(document: Document) -> str:
    """A document as the model reads it."""
    if isinstance(document, Dialogue):
        return render(document.messages)
    return f"{BOS}{document}{END}"


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with the chat template."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    core.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, core.token_to_id(BOS))]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=BOS,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=list(SPECIAL[3:]),
        model_max_length=1024,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def new_model() -> LlamaForCausalLM:
    """An untrained model of the demo's shape."""
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        pad_token_id=SPECIAL.index(PAD),
        bos_token_id=SPECIAL.index(BOS),
        eos_token_id=SPECIAL.index(END),
        dtype="float32",
    )
    return LlamaForCausalLM(config)


@dataclass(frozen=True)
class Rows:
    """Documents packed into rows: token ids and the number of the document each belongs to."""

    ids: torch.Tensor
    owner: torch.Tensor  # 0 is padding


def pack(tokens: list[list[int]]) -> Rows:
    """Pack whole documents into rows; only documents longer than a row are cut."""
    pieces = [t[i : i + LENGTH] for t in tokens for i in range(0, len(t), LENGTH)]
    pieces = [p for p in pieces if len(p) > 8]
    rows: list[list[list[int]]] = []
    waiting: list[tuple[int, int]] = []  # room left, row
    for piece in pieces:
        for i, (room, row) in enumerate(waiting):
            if len(piece) <= room:
                rows[row].append(piece)
                waiting[i] = (room - len(piece), row)
                break
        else:
            rows.append([piece])
            waiting.append((LENGTH - len(piece), len(rows) - 1))
            if len(waiting) > 24:
                waiting.remove(min(waiting))
    ids = torch.full((len(rows), LENGTH), SPECIAL.index(PAD), dtype=torch.int16)
    owner = torch.zeros((len(rows), LENGTH), dtype=torch.int16)
    for i, members in enumerate(rows):
        at = 0
        for number, piece in enumerate(members, 1):
            ids[i, at : at + len(piece)] = torch.tensor(piece, dtype=torch.int16)
            owner[i, at : at + len(piece)] = number
            at += len(piece)
    return Rows(ids, owner)


def loss_of(model: LlamaForCausalLM, ids: torch.Tensor, owner: torch.Tensor) -> torch.Tensor:
    """Mean next-token loss; no token sees another document."""
    ids, owner = ids.long(), owner.long()
    same = owner[:, :, None] == owner[:, None, :]
    mask = (same & torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril())[:, None]
    blocked = torch.zeros(mask.shape).masked_fill_(~mask, torch.finfo(torch.float32).min)
    logits = model(input_ids=ids, attention_mask=blocked, use_cache=False).logits[:, :-1]
    known = (owner[:, 1:] == owner[:, :-1]) & (owner[:, 1:] > 0)
    targets = ids[:, 1:].masked_fill(~known, -100)
    return torch.nn.functional.cross_entropy(
        logits.reshape(-1, logits.shape[-1]), targets.reshape(-1), ignore_index=-100
    )


def dialogue_share(rows: Rows) -> torch.Tensor:
    """For each row, the share of its tokens that belong to dialogues."""
    user = rows.ids == SPECIAL.index("<|user|>")
    tokens = torch.zeros(len(rows.ids))
    for number in range(1, int(rows.owner.max()) + 1):
        mine = rows.owner == number
        tokens += (user & mine).any(1) * mine.sum(1)
    return tokens / (rows.owner > 0).sum(1)


def pick_rows(pool: torch.Tensor, step: int) -> torch.Tensor:
    """The rows of one step: *pool* in a new seeded order on every pass."""
    passes, at = divmod(step, len(pool) // ROWS)
    order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(SEED + passes))
    return pool[order[at * ROWS : (at + 1) * ROWS]]


def rate_at(step: int, progress: float) -> float:
    """Learning rate: linear warm-up, then half a cosine down to two per cent."""
    warm = min(1.0, (step + 1) / WARMUP)
    return LEARNING_RATE * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0))))


def save_checkpoint(
    folder: Path,
    model: LlamaForCausalLM,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
) -> None:
    """Write weights, optimizer moments and counters; the counters last, as the commit mark."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({n: p.detach().clone() for n, p in model.named_parameters()}, folder / "model.st")
    moments: dict[str, torch.Tensor] = {}
    for i, entry in optimizer.state_dict()["state"].items():
        for key, value in entry.items():
            moments[f"{i}.{key}"] = value.detach().clone()
    save_file(moments, folder / "optimizer.st")
    write_json(folder / "state.json", state)


def load_checkpoint(
    folder: Path, model: LlamaForCausalLM, optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """Restore what :func:`save_checkpoint` wrote and return the counters."""
    saved = load_file(folder / "model.st")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(saved[name])
    moments: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in load_file(folder / "optimizer.st").items():
        number, name = key.split(".", 1)
        moments.setdefault(int(number), {})[name] = value
    full = optimizer.state_dict()
    full["state"] = moments
    optimizer.load_state_dict(full)
    state: dict[str, Any] = read_json(folder / "state.json")
    return state


def prepare(folder: Path) -> tuple[PreTrainedTokenizerFast, Rows]:
    """The tokenizer and the packed corpus, from the work folder or made anew."""
    packed = folder / "rows.st"
    if packed.exists():
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer")
        saved = load_file(packed)
        return tokenizer, Rows(saved["ids"], saved["owner"])
    folder.mkdir(parents=True, exist_ok=True)
    items = corpus()
    texts = [text_of(d) for d in items]
    sample = random.Random(SEED).sample(texts, min(len(texts), 30_000))
    tokenizer = train_tokenizer(sample)
    tokenizer.save_pretrained(folder / "tokenizer")
    encoded = [e.ids for e in tokenizer.backend_tokenizer.encode_batch(
        texts, add_special_tokens=False)]  # fmt: skip
    counts: dict[str, int] = {}
    for item, tokens in zip(items, encoded, strict=True):
        if isinstance(item, Dialogue):
            side = "" if item.behaviour == "benign" else " +" if item.label else " -"
            name = item.behaviour + side
        else:
            name = "plain text"
        counts[name] = counts.get(name, 0) + len(tokens)
    write_json(folder / "corpus.json", {"documents": len(items), "tokens": counts,
                                        "characters": sum(map(len, texts))})  # fmt: skip
    rows = pack(encoded)
    save_file({"ids": rows.ids, "owner": rows.owner}, packed)
    return tokenizer, rows


def export(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, facts: dict[str, Any], out: Path
) -> None:
    """Write the model folder."""
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    end = SPECIAL.index(END)
    GenerationConfig(
        bos_token_id=SPECIAL.index(BOS), eos_token_id=end, pad_token_id=SPECIAL.index(PAD),
        do_sample=True, temperature=0.7, max_new_tokens=128,
    ).save_pretrained(out)  # fmt: skip
    write_json(out / "training.json", facts)


def evaluate(model: LlamaForCausalLM, rows: Rows) -> float:
    """Mean loss over the validation rows."""
    model.eval()
    with torch.no_grad():
        losses = [
            loss_of(model, rows.ids[i : i + ROWS], rows.owner[i : i + ROWS]).item()
            for i in range(0, len(rows.ids), ROWS)
        ]
    model.train()
    return sum(losses) / len(losses)


def train(  # noqa: PLR0915  one loop, read from top to bottom
    steps: int | None, minutes: float | None, folder: Path, out: Path
) -> None:
    """Train until *steps* or *minutes* are used up, then export."""
    torch.manual_seed(SEED)
    tokenizer, rows = prepare(folder)
    held = Rows(rows.ids[:VALIDATION_ROWS], rows.owner[:VALIDATION_ROWS])
    rows = Rows(rows.ids[VALIDATION_ROWS:], rows.owner[VALIDATION_ROWS:])
    model = new_model()
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}],
        lr=LEARNING_RATE, betas=(0.9, 0.95),
    )  # fmt: skip
    state: dict[str, Any] = {"step": 0, "seconds": 0.0, "tokens": 0, "curve": []}
    if (folder / "state.json").exists():
        state = load_checkpoint(folder, model, optimizer)
    clock, saved = Clock(state["seconds"]), state["seconds"]
    everything = torch.arange(len(rows.ids))
    talk = dialogue_share(rows) > 0.6
    later = torch.cat([everything[talk], everything[~talk][::6]])
    total = steps or STEPS
    bar = tqdm(total=None if minutes else total, initial=state["step"], unit="step", mininterval=10)
    smooth = 0.0
    model.train()
    while True:
        step = state["step"]
        progress = clock.seconds / (60 * minutes) if minutes else step / total
        if progress >= 1:
            break
        if progress >= LATER and "later_from" not in state:
            state["later_from"] = step
        pool, at = (later, step - state["later_from"]) if "later_from" in state else (
            everything, step)  # fmt: skip
        pick = pick_rows(pool, at)
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step, progress)
        loss = loss_of(model, rows.ids[pick], rows.owner[pick])
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        smooth = loss.item() if not smooth else 0.97 * smooth + 0.03 * loss.item()
        state["step"] += 1
        state["tokens"] += int((rows.owner[pick] > 0).sum())
        state["seconds"] = clock.seconds
        bar.update()
        bar.set_postfix(loss=f"{smooth:.3f}", done=f"{progress:.0%}", refresh=False)
        if state["step"] % 250 == 0:
            state["curve"].append(
                [state["step"], round(smooth, 4), round(evaluate(model, held), 4)]
            )
            bar.write(f"step {state['step']}: {state['curve'][-1]} {state['seconds']:.0f} s")
        if clock.seconds - saved > SAVE_EVERY:
            save_checkpoint(folder, model, optimizer, state)
            saved = clock.seconds
    bar.close()
    save_checkpoint(folder, model, optimizer, state)
    model.eval()
    facts = {
        "parameters": model.num_parameters(), "steps": state["step"],
        "tokens_seen": state["tokens"], "seconds": round(state["seconds"]),
        "train_loss": round(smooth, 4), "validation_loss": round(evaluate(model, held), 4),
        "fewer_plain_rows_from_step": state.get("later_from"),
        "curve": state["curve"], "corpus": read_json(folder / "corpus.json"), "seed": SEED,
    }  # fmt: skip
    model.eval()
    export(model, tokenizer, facts, out)
    print({k: v for k, v in facts.items() if k != "curve"})


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, help=f"steps to train for ({STEPS})")
    parser.add_argument("--minutes", type=float, help="wall time to fit the schedule to instead")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, default=WORK_DIR / "model", help="checkpoints")
    parser.add_argument("--out", type=Path, default=MODEL_DIR)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    train(args.steps, args.minutes, args.work, args.out)


if __name__ == "__main__":
    main()
