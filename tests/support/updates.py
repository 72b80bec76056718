"""Updates for the tests: a recovery of a few steps, and Ctrl-C in the middle of one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from bs_exp.progress import Progress
from bs_exp.update.recover import Recovery

RECOVERY = Recovery(
    blockwise_steps=0,
    steps=8,
    generated_windows=0,
    prompt_length=4,
    generation_batch=5,
    piece_length=6,
    batch_size=4,
    accumulation=1,
    optimizer="soap",
    precondition_frequency=3,
    max_precond_dim=256,
    learning_rate=0.02,
    schedule="cosine",
    warmup=0.1,
    weight_decay=0.0,
    clip_norm=1.0,
    temperature=1.0,
    autocast="none",
    holdout=0.2,
    evaluate_every=2,
    patience=None,
    checkpoint_minutes=None,
    seed=0,
)


@dataclass
class Interrupting(Progress):
    """Ctrl-C in front of a step of training, or of what has the `label`."""

    quiet: bool = True
    steps: int = 0
    label: str | None = None
    notes: list[str] = field(default_factory=list)

    def track(self, iterable: Any, *, label: str | Callable[[], str], total: int | None = None) -> Iterator[Any]:
        for done, item in enumerate(iterable):
            meant = callable(label) if self.label is None else label == self.label
            if meant and done == self.steps:
                raise KeyboardInterrupt
            yield item
