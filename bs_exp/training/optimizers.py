"""The optimisers of a training: AdamW and SOAP."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from bs_exp.training.soap import Soap
from bs_exp.validation import check_at_least, check_choice

OPTIMIZERS = ("adamw", "soap")
# The usual 0.999 averages squared gradients over more steps than a short training has.
BETAS = (0.9, 0.99)


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """Which optimiser. The other two settings are those of SOAP (see `Soap`); AdamW does not read them."""

    optimizer: str
    precondition_frequency: int
    max_precond_dim: int

    def __post_init__(self) -> None:
        check_choice("optimizer", self.optimizer, OPTIMIZERS)
        check_at_least(1, precondition_frequency=self.precondition_frequency)
        check_at_least(0, max_precond_dim=self.max_precond_dim)


ADAMW = OptimizerSettings(optimizer="adamw", precondition_frequency=1, max_precond_dim=0)


def make_optimizer(
    settings: OptimizerSettings, groups: Iterable[dict[str, Any]], *, weight_decay: float
) -> torch.optim.Optimizer:
    """The optimiser of parameter groups, with decoupled weight decay; the caller sets each group's `lr`."""
    if settings.optimizer == "soap":
        return Soap(
            groups,
            betas=BETAS,
            weight_decay=weight_decay,
            precondition_frequency=settings.precondition_frequency,
            max_precond_dim=settings.max_precond_dim,
        )
    return torch.optim.AdamW(groups, betas=BETAS, weight_decay=weight_decay)


def state_names(settings: OptimizerSettings) -> tuple[str, ...]:
    """Names of the tensors that the optimiser keeps of each parameter."""
    return Soap.STATE if settings.optimizer == "soap" else ("step", "exp_avg", "exp_avg_sq")
