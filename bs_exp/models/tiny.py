"""Tiny models with random weights, one per architecture family, built from real Hugging Face configs, no download.

The whole pipeline runs on them in seconds on any machine; results on them say nothing about quality.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerFast

from bs_exp.errors import ConfigError
from bs_exp.models.architecture import Roles, find_architecture
from bs_exp.models.auto_classes import AUTO_CLASSES
from bs_exp.models.loading import assemble, check_settings, resolve_device, resolve_dtype
from bs_exp.types import LoadedModel, Task
from bs_exp.validation import check_choice, check_seed, shown

_BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
_EOS, _BOS = "<|endoftext|>", "<|begin|>"
_EOS_ID, _BOS_ID = len(_BYTES), len(_BYTES) + 1
# Additional token -> the tokenizer's attribute for it, None if it has none.
_MORE_TOKENS: Mapping[Task, Mapping[str, str | None]] = {
    Task.MASKED_LM: {"<mask>": "mask_token"},
    Task.SEQ2SEQ_LM: dict.fromkeys(f"<extra_id_{number}>" for number in range(32)),
}

_BASE = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "intermediate_size": 48,
    "max_position_embeddings": 512,
}
_GROUPED = {**_BASE, "num_key_value_heads": 2}
_HEAD_DIM = {**_GROUPED, "head_dim": 8}
_GPT = {"n_embd": 32, "n_head": 4, "n_layer": 3, "n_inner": 48, "n_positions": 512}

_SPARSE = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
_MIXTURES: Mapping[str, Mapping[str, Any]] = {
    "mixtral": {**_GROUPED, "num_local_experts": 4},
    "qwen2_moe": {**_GROUPED, **_SPARSE, "shared_expert_intermediate_size": 40},
    "qwen3_moe": {**_HEAD_DIM, **_SPARSE},
}
# Task -> Hugging Face model type -> settings of its config class. A new family for the tests is a row here.
_FAMILIES: Mapping[Task, Mapping[str, Mapping[str, Any]]] = {
    Task.CAUSAL_LM: {
        "llama": _GROUPED,
        "mistral": _HEAD_DIM,
        "qwen2": _GROUPED,
        "qwen3": _HEAD_DIM,
        "gemma": _HEAD_DIM,
        "gemma2": _HEAD_DIM,
        "gemma3_text": _HEAD_DIM,
        "opt": {
            "hidden_size": 32,
            "word_embed_proj_dim": 32,
            "num_attention_heads": 4,
            "num_hidden_layers": 3,
            "ffn_dim": 48,
            "max_position_embeddings": 512,
        },
        "gpt2": _GPT,
        "gpt_neox": _BASE,
        "phi3": _GROUPED,
        "phi": _GROUPED,
        "bloom": {"hidden_size": 32, "n_head": 4, "n_layer": 3},
        "falcon": {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 3, "ffn_hidden_size": 48},
        "gptj": {**_GPT, "rotary_dim": 8},
        "starcoder2": _GROUPED,
        "stablelm": _GROUPED,
        "olmo2": _GROUPED,
        **_MIXTURES,
    },
    Task.MASKED_LM: {
        "bert": _BASE,
        # RoBERTa's positions begin after the id of its padding token, so the table must be longer.
        "roberta": {**_BASE, "max_position_embeddings": 1024},
        "distilbert": {"dim": 32, "n_heads": 4, "n_layers": 3, "hidden_dim": 48, "max_position_embeddings": 512},
    },
    Task.SEQ2SEQ_LM: {
        "t5": {
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 48,
            "num_heads": 4,
            "num_layers": 3,
            "num_decoder_layers": 3,
            "decoder_start_token_id": _EOS_ID,
        },
        "bart": {
            "d_model": 32,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_layers": 3,
            "decoder_layers": 3,
            "encoder_ffn_dim": 48,
            "decoder_ffn_dim": 48,
            "max_position_embeddings": 512,
            "decoder_start_token_id": _EOS_ID,
            "forced_eos_token_id": _EOS_ID,
        },
    },
}
MIXTURES = tuple(_MIXTURES)
"""Families with routed experts."""
FAMILIES = tuple(family for family in _FAMILIES[Task.CAUSAL_LM] if family not in MIXTURES[1:])
"""Families that predict the next token, with one of those with routed experts."""
ENCODERS = tuple(_FAMILIES[Task.MASKED_LM])
ENCODER_DECODERS = tuple(_FAMILIES[Task.SEQ2SEQ_LM])
_TASKS = {family: task for task, families in _FAMILIES.items() for family in families}
# Names of the number of blocks in the config classes.
_DEPTHS = {
    *("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    *("num_decoder_layers", "encoder_layers", "decoder_layers"),
}


@dataclass(frozen=True, kw_only=True)
class TinyRandom:
    """A random model of a family: hidden size 32, 4 heads (2 of keys and values where the family can), byte tokens.

    It has `layers` blocks; an encoder-decoder has as many in its encoder and in its decoder. Encoders have a
    masked-token head.
    """

    family: str = "llama"
    layers: int = 3
    seed: int = 0
    dtype: str = "float32"
    device: str = "cpu"
    roles: Roles | None = None

    def __post_init__(self) -> None:
        check_choice("family", self.family, tuple(_TASKS))
        if not isinstance(self.layers, int) or self.layers < 1:
            raise ConfigError(f"layers must be a whole number of at least 1, got {shown(self.layers)}.")
        if not isinstance(self.seed, int):
            raise ConfigError(f"seed must be a whole number, got {shown(self.seed)}.")
        check_seed(self.seed)
        check_settings(self.dtype, self.device, self.roles)

    def load(self) -> LoadedModel:
        """The model of this seed; the global random state is left as it was."""
        device = resolve_device(self.device)
        task = _TASKS[self.family]
        module = _random_model(self.family, self.layers, self.seed, resolve_dtype(self.dtype))
        module.to(device)  # type: ignore[arg-type]
        return assemble(module, byte_tokenizer(task), self.roles, source="tiny_random", name=self._name, task=task)

    def shapes(self) -> LoadedModel:
        """The model on the meta device."""
        task = _TASKS[self.family]
        with torch.device("meta"):
            module = _random_model(self.family, self.layers, self.seed, resolve_dtype(self.dtype)).eval()
        provenance = {"name": self._name, "dtype": str(module.dtype).removeprefix("torch.")}
        return LoadedModel(module, byte_tokenizer(task), find_architecture(module, self.roles), provenance, task)

    @property
    def _name(self) -> str:
        return f"{self.family}-{self.layers}-{self.seed}"


def tiny_random(family: str = "llama", *, seed: int = 0, layers: int = 3) -> LoadedModel:
    """A tiny random model in fp32 on the CPU."""
    return TinyRandom(family=family, seed=seed, layers=layers).load()


def byte_tokenizer(task: Task = Task.CAUSAL_LM) -> PreTrainedTokenizerFast:
    """A tokenizer with one token per byte, an end-of-text token (also padding) and a begin token; it adds none itself.

    It also has a mask token for masked language models, and 32 sentinels for encoder-decoders.
    """
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(_BYTES)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    more = _MORE_TOKENS.get(task, {})
    tokenizer.add_special_tokens([_EOS, _BOS, *more])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=_EOS,
        bos_token=_BOS,
        pad_token=_EOS,
        **{name: token for token, name in more.items() if name},
    )


def _random_model(family: str, layers: int, seed: int, dtype: torch.dtype | str) -> PreTrainedModel:
    task = _TASKS[family]
    settings = dict(_FAMILIES[task][family])
    config = AutoConfig.for_model(
        family,
        **{**settings, **dict.fromkeys(_DEPTHS & settings.keys(), layers)},
        vocab_size=len(_BYTES) + 2 + len(_MORE_TOKENS.get(task, {})),
        bos_token_id=_BOS_ID,
        eos_token_id=_EOS_ID,
        pad_token_id=_EOS_ID,
    )
    auto = next(auto for auto in AUTO_CLASSES if auto.task is task)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # Built in its dtype, not converted: `.to(bfloat16)` would also round the rotary frequencies.
        module: PreTrainedModel = auto.loader.from_config(
            config, dtype=torch.float32 if isinstance(dtype, str) else dtype
        )
        # The usual initialisation sets biases to 0, norms to 1 and gives tiny outputs, which would hide mistakes.
        with torch.no_grad():
            for parameter in module.parameters():
                noise = torch.randn(parameter.shape)
                parameter.copy_(0.2 * noise if parameter.ndim > 1 else parameter + 0.1 * noise)
    return module
