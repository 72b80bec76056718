"""Windows that the dense model writes itself, to train on where calibration text is short."""

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
from bs_exp.validation import check_at_least
from bs_exp.workspace import Workspace

KIND = "generated"


@dataclass(frozen=True, kw_only=True)
class Generation:
    """Continuations of calibration text, drawn token by token from the dense model's own predictions.

    Each window begins with `prompt_length` tokens from a random place of the given windows. The expected KL divergence
    over such windows is the one between the two models' distributions of whole texts, with as many samples as one
    likes. Data-free distillation of LLM-QAT (Liu et al., 2305.17888, section 2.1), with prompts.
    """

    generated: int
    prompt_length: int
    generation_batch: int
    seed: int

    def __post_init__(self) -> None:
        check_at_least(0, generated=self.generated, seed=self.seed)
        check_at_least(1, prompt_length=self.prompt_length, generation_batch=self.generation_batch)

    def check(self, dense: LoadedModel, windows: Int[Tensor, "windows length"]) -> None:
        """ConfigError for a model that does not continue text, and for prompts that fill a window."""
        if not self.generated:
            return
        if dense.task is not Task.CAUSAL_LM:
            raise ConfigError(
                f"generated must be 0 for a {type(dense.module).__name__}, which does not continue text, got "
                f"{self.generated}."
            )
        if self.prompt_length >= windows.shape[1]:
            raise ConfigError(
                f"prompt_length must be below the {windows.shape[1]} tokens of a calibration window, got "
                f"{self.prompt_length}."
            )

    def windows(
        self, dense: LoadedModel, text: Int[Tensor, "windows length"], workspace: Workspace
    ) -> Int[Tensor, "generated length"]:
        """The windows, as long as those of `text`; from the cache if they were drawn before."""
        if not self.generated:
            return text[:0]
        length, end = text.shape[1], cast("Any", dense.module.generation_config).eos_token_id
        batches = self._prompts(text).split(self.generation_batch)
        drawn = []
        for number, prompts in enumerate(workspace.progress.track(batches, label="generating", total=len(batches))):
            key = content_key(
                dense=dense.fingerprint,
                device=dense.device.type,
                prompts=prompts.tolist(),
                length=length,
                end=end,
                seed=self.seed,
                number=number,
            )
            # Batch by batch: what was drawn before an interruption is kept.
            stored = workspace.cache.find(KIND, key)
            if stored is None:
                stored = workspace.cache.store(KIND, key, {"ids": self._draw(dense, prompts, length, number)})
            drawn.append(stored.tensor("ids"))
        return torch.cat(drawn)

    def _prompts(self, text: Int[Tensor, "windows length"]) -> Int[Tensor, "generated prompt"]:
        generator = torch.Generator().manual_seed(self.seed)
        rows = torch.randint(len(text), (self.generated,), generator=generator)
        places = text.unfold(1, self.prompt_length, 1)
        return places[rows, torch.randint(places.shape[1], (self.generated,), generator=generator)]

    @torch.no_grad()
    def _draw(
        self, dense: LoadedModel, prompts: Int[Tensor, "batch prompt"], length: int, number: int
    ) -> Int[Tensor, "batch length"]:
        # A window is a piece of running text: no end, no filter, nothing of the model's own generation settings.
        new, module = length - self.prompt_length, dense.module
        own: Any = module.generation_config
        settings = GenerationConfig(
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
            torch.manual_seed(self.seed * 1_000_003 + number)
            # Whatever `settings` leave open would be taken from here: beams, banned tokens and the like.
            module.generation_config = GenerationConfig()
            try:
                drawn: Tensor = generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)
            finally:
                module.generation_config = own
        return drawn.cpu()
