"""Windows that the dense model generates, to train on where calibration text is short."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import GenerationConfig

from bs_exp.cache import content_key
from bs_exp.errors import ConfigError
from bs_exp.types import LoadedModel, Task
from bs_exp.validation import check_at_least, check_seed
from bs_exp.workspace import Workspace

KIND = "generated"


@dataclass(frozen=True, kw_only=True)
class GenerationSettings:
    """How many windows the dense model generates (0: none), from prompts of how many tokens, how many at once.

    A model that does not continue text (an encoder, an encoder-decoder) generates none.
    """

    generated_windows: int
    prompt_length: int
    generation_batch: int
    seed: int

    def __post_init__(self) -> None:
        check_at_least(0, generated_windows=self.generated_windows)
        check_seed(self.seed)
        check_at_least(1, prompt_length=self.prompt_length, generation_batch=self.generation_batch)


def generates(settings: GenerationSettings, dense: LoadedModel) -> bool:
    """Whether windows are asked for, of a model that continues text."""
    return bool(settings.generated_windows) and dense.task is Task.CAUSAL_LM


def check_generation(settings: GenerationSettings, dense: LoadedModel, text: Int[Tensor, "windows length"]) -> None:
    """Raises ConfigError if prompts fill a window."""
    if not generates(settings, dense):
        return
    if settings.prompt_length >= text.shape[1]:
        raise ConfigError(
            f"prompt_length must be below the {text.shape[1]} tokens of a calibration window, got "
            f"{settings.prompt_length}."
        )


def generate_windows(
    settings: GenerationSettings, dense: LoadedModel, text: Int[Tensor, "windows length"], workspace: Workspace
) -> Int[Tensor, "generated length"]:
    """Windows as long as those of `text`, sampled token by token from the dense model, or found in the cache.

    Each begins with `prompt_length` tokens from a random place of `text`. The expected KL divergence over windows that
    the dense model samples is the KL divergence between the two models' distributions of whole texts. Data-free
    distillation of LLM-QAT (Liu et al., 2305.17888, section 2.1), here with prompts.
    """
    if not generates(settings, dense):
        return text[:0]
    length, end = text.shape[1], cast("Any", dense.module.generation_config).eos_token_id
    batches = _prompts(settings, text).split(settings.generation_batch)
    sampled = []
    for number, prompts in enumerate(workspace.progress.track(batches, label="generating", total=len(batches))):
        key = content_key(
            dense=dense.fingerprint,
            device=dense.device.type,
            prompts=prompts.tolist(),
            length=length,
            end=end,
            seed=settings.seed,
            number=number,
        )
        # Batch by batch: what was sampled before an interruption is kept.
        stored = workspace.cache.find(KIND, key)
        if stored is None:
            stored = workspace.cache.store(KIND, key, {"ids": _sample(settings, dense, prompts, length, number)})
        sampled.append(stored.tensor("ids"))
    return torch.cat(sampled)


def _prompts(settings: GenerationSettings, text: Int[Tensor, "windows length"]) -> Int[Tensor, "generated prompt"]:
    generator = torch.Generator().manual_seed(settings.seed)
    rows = torch.randint(len(text), (settings.generated_windows,), generator=generator)
    places = text.unfold(1, settings.prompt_length, 1)
    return places[rows, torch.randint(places.shape[1], (settings.generated_windows,), generator=generator)]


@torch.no_grad()
def _sample(
    settings: GenerationSettings, dense: LoadedModel, prompts: Int[Tensor, "batch prompt"], length: int, number: int
) -> Int[Tensor, "batch length"]:
    # A window is a piece of running text, so it has no end; nothing filters or scales the predictions.
    new, module = length - settings.prompt_length, dense.module
    own: Any = module.generation_config
    sampling = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        repetition_penalty=1.0,
        max_new_tokens=new,
        min_new_tokens=new,
        pad_token_id=0,
        eos_token_id=own.eos_token_id,
    )
    generate: Any = module.generate
    ids = prompts.to(dense.device)
    with torch.random.fork_rng(devices=[dense.device] if dense.device.type == "cuda" else []):
        torch.manual_seed((settings.seed * 1_000_003 + number) % 2**63)
        # Whatever `sampling` leaves open would be taken from here: beams, banned tokens and the like.
        module.generation_config = GenerationConfig()
        try:
            sampled: Tensor = generate(ids, attention_mask=torch.ones_like(ids), generation_config=sampling)
        finally:
            module.generation_config = own
    return sampled.cpu()
