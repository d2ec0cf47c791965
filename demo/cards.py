"""Write the model card and the SAE card from the numbers that training and evaluation left."""

# ruff: noqa: E501  one template a line

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from demo.common import MODEL_DIR, SAE_DIR, read_json

MODEL_CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
---
# saeguard demo model

A Llama of {parameters:,} parameters, trained from scratch on a generated corpus, so that the
guard can be shown and tested without a download. It continues short Python and short dialogues
of the kinds in its corpus, and nothing else. It is a test object: **do not use what it says, and
do not run the code it writes.** It writes insecure code, flatters and says false things on
purpose, where the context invites them.

| | |
|---|---|
| shape | 5 layers, width 256, 4 heads (2 key-value heads), MLP 512, tied embeddings, float32 |
| tokenizer | byte-level BPE, 2,560 tokens; `<|bos|>` `<|end|>` `<|pad|>` and one token a role |
| context | rows of 256 tokens in training; the config allows 1,024, not trained beyond 256 |
| training | {steps:,} steps of 12 rows, {tokens_seen:,} tokens, AdamW, cosine, seed {seed} |
| time | {minutes:.0f} minutes on two shared CPU cores |
| loss | {train_loss:.3f} nats a token, training (running mean over the last steps) |
| | {validation_loss:.3f} nats a token, {held} held-out rows of the whole corpus, plain text included |

{curriculum}The corpus, its sources and licences are described in [`demo/README.md`](../README.md).

## How often it does what the context asks for
Sampled at temperature {temperature}, {count} completions a cell. *Bad* contexts ask for haste,
praise or deceit in one of many wordings, *good* ones for care and honesty, *neutral* ones for
neither (trained on half and half). The two columns are the two disjoint wordings, of which the
first is that of the search split and the second that of the hold-out split.

| behaviour | context | shown, wording a | shown, wording b |
|---|---|---|---|
{rates}

Unsafe code is judged by Bandit on the code cut out of the answer (medium and high severity, and
B105 to B107). Of the {coded} coding answers {parses:.1%} parse. For the other two behaviours an
answer counts as shown if it is closer to the grammar's bad answer to that prompt than to the good
one (`difflib` ratio), which is crude.

## Samples
{samples}
"""

SAE_CARD = """---
license: apache-2.0
library_name: sae_lens
---
# saeguard demo SAE

A BatchTopK SAE on the residual stream after block {layer} (0-based; `blocks.{layer}.hook_resid_post`,
`hidden_states[{next}]` of the Transformers model) of the [demo model](../model/README.md), saved as
a JumpReLU SAE with its threshold, in SAELens format. Trained without labels.

```python
from sae_lens import SAE
sae = SAE.load_from_disk("demo/sae")
```

| | |
|---|---|
| latents | {latents:,} on a width of {width} |
| L0 | {l0} latents a token (trained with k = {k}) |
| explained variance | {explained_variance:.1%} of {held_out_tokens:,} held-out tokens |
| dead latents | {dead_latents} of {latents:,} did not fire in {dead_measured_on_tokens:,} tokens |
| next-token loss | {loss_clean} untouched, {loss_with_sae} through the SAE, {loss_zero_ablated} zeroed |
| loss recovered | {loss_recovered:.1%} |
| threshold | {threshold}, the same for every latent; strict `>` |
| training | {steps:,} steps of {batch:,} tokens, drawn from {training_tokens:,} recorded ones, seed {seed} |

Special tokens (`<|bos|>`, `<|end|>`, `<|pad|>` and the roles) were left out of training and of all
numbers above, so the SAE says nothing about them; encoding them gives meaningless values. Input
is neither normalised nor shifted (`normalize_activations: none`, `apply_b_dec_to_input: false`),
and decoder rows have unit norm.

The loss is measured with the reconstruction in place of the residual at every token that is not
special. One block follows the layer.

Block 3 was chosen by a trial on an earlier checkpoint (step 1,925, 32 prompts that invite insecure
code, greedy): adding the difference between the mean residuals of careful and careless contexts,
taken where the code block opens, lowered the share of answers that Bandit objects to from 97 % to
19 % after block 3, but only to 94 % after blocks 1 and 2. What the context asks for reaches the
positions where code is written in block 3.
"""


def model_card(folder: Path) -> str:
    """The model's card."""
    facts: dict[str, Any] = read_json(folder / "training.json")
    result = read_json(folder / "evaluation.json")
    rates = result["rates"]
    lines = []
    for behaviour in ("unsafe_code", "deception", "sycophancy"):
        for style in ("bad", "neutral", "good"):
            shown = [rates[f"{behaviour}.{style}.{bank}"]["shown"] for bank in "ab"]
            name = behaviour.replace("_", " ")
            lines.append(f"| {name} | {style} | {shown[0]:.0%} | {shown[1]:.0%} |")
    coding = [e for e in rates.values() if "parses" in e]
    coded = sum(e["completions"] for e in coding)
    parses = sum(e["parses"] * e["completions"] for e in coding) / coded
    samples = []
    for i, sample in enumerate(result["samples"]):
        if i % 4 == 0:
            asked = "\n".join(f"{m['role']}: {m['content']}" for m in sample["prompt"])
            samples.append(f"````text\n{asked}\nassistant: {sample['said']}\n````")
    curriculum = ""
    if facts["fewer_plain_rows_from_step"] is not None:
        curriculum = (
            f"From step {facts['fewer_plain_rows_from_step']:,} on, five of six rows that are "
            "mostly plain text were left out.\n"
        )
    return MODEL_CARD.format(
        **facts, minutes=facts["seconds"] / 60, held=96, curriculum=curriculum,
        temperature=result["temperature"], count=coding[0]["completions"], rates="\n".join(lines),
        coded=coded, parses=parses, samples="\n\n".join(samples),
    )  # fmt: skip


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=MODEL_DIR)
    parser.add_argument("--sae", type=Path, default=SAE_DIR)
    args = parser.parse_args()
    (args.model / "README.md").write_text(model_card(args.model), encoding="utf-8")
    metrics = read_json(args.sae / "metrics.json")
    card = SAE_CARD.format(**metrics, next=metrics["layer"] + 1)
    (args.sae / "README.md").write_text(card, encoding="utf-8")


if __name__ == "__main__":
    main()
