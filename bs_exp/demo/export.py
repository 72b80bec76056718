"""Turn the trained demo model into the folder that ships: bf16 weights, tokenizer, and a card with measured numbers."""

import math
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional
from transformers import GenerationConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from bs_exp.demo.documentation import read_python_docs
from bs_exp.demo.training_data import END_OF_TEXT, END_OF_TEXT_ID, TrainingData
from bs_exp.files import write_file

PROMPTS = ("Return the", "Parameters\nx : array_like\n    ", "This module provides")
EVALUATION_BATCH = 16


@torch.no_grad()
def heldout_loss(model: LlamaForCausalLM, ids: npt.NDArray[np.uint16], context: int) -> float:
    """Nats per predicted token over non-overlapping windows, fp32; a window's first token is not predicted."""
    model.train(False)
    stream = torch.from_numpy(ids.astype(np.int64))
    full = stream[: len(stream) // context * context].view(-1, context)
    rest = stream[full.numel() :].unsqueeze(0)
    total, predicted = 0.0, 0
    for windows in (*torch.split(full, EVALUATION_BATCH), rest):
        if windows.numel() and windows.shape[1] > 1:
            logits = model(input_ids=windows, use_cache=False).logits[:, :-1]
            targets = windows[:, 1:].flatten()
            total += functional.cross_entropy(logits.float().flatten(0, 1), targets, reduction="sum").item()
            predicted += len(targets)
    return total / predicted


def export(
    model: LlamaForCausalLM,
    data: TrainingData,
    folder: Path,
    *,
    context: int,
    tokens_seen: int,
    recipe: Mapping[str, object],
) -> None:
    """Write the model to `folder`; the card's numbers are measured on what was written, loaded back as fp32."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=data.tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )
    model.generation_config = GenerationConfig(
        bos_token_id=END_OF_TEXT_ID, eos_token_id=END_OF_TEXT_ID, pad_token_id=END_OF_TEXT_ID
    )
    model.bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    shipped = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    loss = heldout_loss(shipped, data.heldout, context)
    samples = {prompt: greedy_sample(shipped, tokenizer, prompt) for prompt in PROMPTS}
    for prompt, sample in samples.items():
        print(f"--- {prompt!r}\n{sample}", flush=True)
    print(f"heldout loss {loss:.4f} perplexity {math.exp(loss):.3f}", flush=True)
    write_file(folder / "README.md", _card(shipped, data, loss, samples[PROMPTS[0]], tokens_seen, recipe))


@torch.no_grad()
def greedy_sample(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompt: str, length: int = 60) -> str:
    """The prompt, after an end-of-text token, with its most likely continuation of `length` tokens at most."""
    ids = torch.tensor([[END_OF_TEXT_ID, *tokenizer.encode(prompt)]])
    generated = model.generate(  # type: ignore[misc]
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=length, do_sample=False
    )
    return str(tokenizer.decode(generated[0], skip_special_tokens=True))


def _card(
    model: LlamaForCausalLM,
    data: TrainingData,
    loss: float,
    sample: str,
    tokens_seen: int,
    recipe: Mapping[str, object],
) -> str:
    heldout, window = read_python_docs("heldout"), model.config.max_position_embeddings
    characters = len(heldout.text) / len(data.heldout)
    sources = "\n".join(f"| {package} | {version} |" for package, version in heldout.sources.items())
    settings = "\n".join(f"| `{name}` | {value} |" for name, value in recipe.items())
    return f"""# Demo model: a {model.num_parameters() / 1e6:.2f} M parameter Llama that speaks documentation

Trained from scratch on *python_docs*, the docstrings of the Python standard library and of the installed numerical
packages, so that compression can be measured on trained weights without a download. It knows nothing else.

Made on {datetime.now(UTC):%Y-%m-%d} by `python -m bs_exp.demo.train --steps {recipe["steps"]}`;
byte-level BPE with {len(data.tokenizer.get_vocab())} tokens, weights in bfloat16.

| Measured on the shipped weights, loaded as fp32 | |
|---|---|
| held-out loss, nats per token | {loss:.4f} |
| held-out perplexity per token | {math.exp(loss):.3f} |
| held-out bits per character | {loss / math.log(2) / characters:.4f} |
| held-out tokens ({characters:.2f} characters each; windows of {window}, not overlapping) | {len(data.heldout):,} |
| tokens seen in training ({tokens_seen / len(data.train):.1f} passes over {len(data.train):,}) | {tokens_seen:,} |

| Recipe | |
|---|---|
{settings}

`muon` stands for Muon (`match_rms_adamw`) on the blocks' matrices and AdamW (0.9, 0.95) on embeddings and norms.
Compute in bf16 autocast over fp32 weights; constant learning rate, then a linear decay to zero over the last steps.

| Source | Version |
|---|---|
{sources}

SHA-256 of the held-out text: `{heldout.fingerprint}`;
of tokenizer and token ids: `{data.fingerprint}`.
Modules keep their split under other versions, but the text changes, and with it the perplexity.

A greedy sample:

```text
{sample}
```
"""
