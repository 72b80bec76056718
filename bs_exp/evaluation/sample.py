"""What a model writes: a greedy continuation of a prompt, to be read beside another model's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from bs_exp.corpora.windows import max_positions
from bs_exp.errors import ConfigError
from bs_exp.types import LoadedModel, Task
from bs_exp.validation import check_at_least

TEXT = "text"


@dataclass(frozen=True, kw_only=True)
class TextSample:
    """The most likely next token, `tokens` times, after `prompt`. It is no measurement: one prompt says little."""

    prompt: str
    tokens: int

    def __post_init__(self) -> None:
        check_at_least(1, tokens=self.tokens)

    def fits(self, model: LoadedModel) -> bool:
        """Whether the model writes from left to right, and has positions enough."""
        if model.task is not Task.CAUSAL_LM:
            return False
        limit, length = max_positions(model), len(model.tokenizer(self.prompt)["input_ids"])
        return length > 0 and (limit is None or length + self.tokens <= limit)

    def check(self, model: LoadedModel) -> None:
        """ConfigError for a model that does not fit."""
        if not self.fits(model):
            raise ConfigError(
                f"sample.prompt={self.prompt!r} cannot be continued by {self.tokens} tokens by this "
                f"{type(model.module).__name__}: it writes no text, or has too few positions. "
                "sample.prompt=null leaves it out."
            )

    def evaluate(self, model: LoadedModel) -> Mapping[str, str]:
        """The continuation under the name `text`, without the prompt."""
        self.check(model)
        inputs = model.tokenizer(self.prompt, return_tensors="pt").to(model.device)
        ids = inputs["input_ids"]
        with torch.inference_mode():
            for _ in range(self.tokens):
                # Without a cache of keys and values: some models have none, and a few tokens cost little.
                logits = model.module(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
                ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
        written = model.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return {TEXT: str(written)}
