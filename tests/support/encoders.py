"""Encoders without a head, in memory."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import BertConfig, BertModel

from bs_exp.models.loading import assemble
from bs_exp.models.tiny import byte_tokenizer
from bs_exp.types import LoadedModel, Task


def headless(layers: int = 2, seed: int = 0) -> LoadedModel:
    """A tiny random BertModel, whose outputs are hidden states: 32 channels, byte tokens."""
    config = BertConfig(
        hidden_size=32, num_hidden_layers=layers, num_attention_heads=4, intermediate_size=48, vocab_size=259
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = BertModel(config)
        with torch.no_grad():
            for parameter in module.parameters():
                noise = torch.randn(parameter.shape)
                parameter.copy_(0.2 * noise if parameter.ndim > 1 else parameter + 0.1 * noise)
    tokenizer = byte_tokenizer(Task.MASKED_LM)
    return assemble(module, tokenizer, None, source="memory", name=f"bert-{layers}-{seed}", task=Task.ENCODER)


def sentence_folder(folder: Path, pooling: Mapping[str, Any], *, between: str | None = None) -> Path:
    """`headless` as sentence-transformers saves it, pooled so and then normalised; `between` is a module more."""
    model = headless()
    model.module.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    kinds = ["Transformer", "Pooling", *([between] if between else []), "Normalize"]
    modules = [
        {
            "idx": number,
            "name": str(number),
            "path": f"{number}_{kind}" if number else "",
            "type": f"sentence_transformers.models.{kind}",
        }
        for number, kind in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 64, "do_lower_case": False}))
    configs = {"1_Pooling": {"word_embedding_dimension": 32, **pooling}, **({f"2_{between}": {}} if between else {})}
    for name, config in configs.items():
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(config))
    return folder
