"""Low-rank adapters on the factors are trained, then merged into them or kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from bs_exp.cache import content_key
from bs_exp.corpora.windows import check_fits
from bs_exp.errors import BsExpError, ConfigError
from bs_exp.identity import own_code
from bs_exp.models.adapters import AdaptedTwin, adapted_twin, attach
from bs_exp.models.fingerprint import fingerprint
from bs_exp.models.model_inputs import Feeder, feeder
from bs_exp.models.modeling_basis_sharing import FactorisedLinear
from bs_exp.models.offload import check_whole_backward
from bs_exp.models.surgery import find_factors
from bs_exp.protocols import Calibration
from bs_exp.training.objectives import LogitDivergence, Objective, TokenLoss
from bs_exp.training.settings import TrainerSettings, split_windows
from bs_exp.training.trainer import Trainer, trainable
from bs_exp.types import CalibrationData, LoadedModel, RankPlan, TokenWindows
from bs_exp.validation import check_at_least, check_choice, check_positive, check_share, shown
from bs_exp.workspace import Workspace

KIND = "lora"
FACTORS = {"coefficients": ("weight",), "basis": ("basis",), "both": ("basis", "weight")}
LOSSES = ("cross_entropy", "distillation")


@dataclass(frozen=True, kw_only=True)
class LoRA(TrainerSettings):
    """Trains a low-rank change of each factor by AdamW, and nothing else.

    A shared basis has one adapter, so it stays shared. `loss` is cross_entropy on the text, or distillation from the
    dense model's predictions of it. A change is scaled by `alpha / rank`. A factor with a side below `rank` has an
    adapter of that side's rank, which is enough for any change of it, with an alpha of its own so that the scale is the
    same. Where windows are held out, the adapters with the lowest held-out loss are taken, and none if all of them
    raise it. `merge` adds the changes to the factors; otherwise they stay beside them, as more parameters than the
    budget has. `data` is the text to train on (None: the calibration windows).

    Hu et al. (2106.09685), used as in Basis Sharing (2410.03765, section 4.1) and SVD-LLM (2403.07378, section 3.3):
    rank 8, learning rate 1e-4. Basis Sharing's code trains the coefficients of q and v alone, SVD-LLM's both factors of
    all matrices.
    """

    factors: str
    matrices: tuple[str, ...] | None
    rank: int
    alpha: float
    dropout: float
    loss: str
    temperature: float
    merge: bool
    data: Calibration | None

    def __post_init__(self) -> None:
        if isinstance(self.matrices, str):
            raise ConfigError(f"matrices must be a list such as [q, v], or null for all, got {shown(self.matrices)}.")
        object.__setattr__(self, "matrices", None if self.matrices is None else tuple(self.matrices))
        TrainerSettings.__post_init__(self)
        check_choice("factors", self.factors, tuple(FACTORS))
        check_choice("loss", self.loss, LOSSES)
        check_at_least(1, rank=self.rank)
        check_positive(alpha=self.alpha, temperature=self.temperature)
        check_share(dropout=self.dropout)

    @property
    def reads_windows(self) -> bool:
        """Whether adapters are trained on the calibration windows, and not on data of their own."""
        return self.data is None and self.steps > 0

    def check(self, dense: LoadedModel, data: CalibrationData) -> None:
        """Raises an error for matrix types that the model lacks, text that does not fit, or a model without logits."""
        unknown = sorted(set(self.matrices or ()) - set(dense.architecture.matrix_types))
        if unknown or self.matrices == ():
            raise ConfigError(
                f"update.matrices must name some of {', '.join(dense.architecture.matrix_types)}, or be null for all, "
                f"got {list(self.matrices or ())}."
            )
        if self.steps:
            check_whole_backward(dense.module, dense.device, "update=lora")
            windows = self._windows(dense, data)
            split_windows(windows.ids, self)
            feeder(dense, windows.feeding).examples(windows.ids[:1])

    def apply(
        self,
        compressed: PreTrainedModel,
        dense: LoadedModel,
        plan: RankPlan,
        data: CalibrationData,
        workspace: Workspace,
    ) -> Mapping[str, Any]:
        """Trains, then changes the factors in place or puts the adapters on the model; reports cost and losses.

        With a cache folder, an interrupted training continues from its last checkpoint, to the same bits, and a
        finished one is not repeated.
        """
        factors = self._factors(compressed, dense)
        if not factors or not self.steps:
            workspace.progress.note("lora: no steps asked for" if factors else "lora: there are no factors to adapt")
            return {"strategy": KIND, "steps": 0, "tokens": 0, "seconds": 0.0}
        windows = self._windows(dense, data)
        training, held_out = split_windows(windows.ids, self)
        key = None if workspace.cache.folder is None else self._key(compressed, dense, windows)
        with trainable((), chain(compressed.parameters(), dense.module.parameters())):
            adapted = adapted_twin(
                compressed, factors, rank=self.rank, alpha=self.alpha, dropout=self.dropout, seed=self.seed
            )
            for parameter in adapted.parameters.values():
                parameter.requires_grad_(True)
            clipped = sum(adapter.rank < self.rank for adapter in adapted.adapters.values())
            if clipped:
                workspace.progress.note(
                    f"lora: {clipped} of {len(adapted.adapters)} factors have a side below update.rank={self.rank}, "
                    "and adapters of its rank"
                )
            trainer = self._trainer(adapted, dense, windows, training, held_out)
            trainer.train(workspace, label=KIND, kind=KIND, key=key)
            report = {
                "strategy": KIND,
                "merged": self.merge,
                "tokens": trainer.done * self.batch_size * training.shape[1],
                "windows": dict(windows.provenance),
                "adapters": len(adapted.adapters),
                "clipped_adapters": clipped,
            }
            report |= trainer.report()
            if trainer.history:
                report |= {
                    "held_out_loss_before": trainer.history[0][1],
                    "held_out_loss_after": trainer.best_loss,
                    "held_out_loss": [[step, value] for step, value in trainer.history],
                }
            # Adapters of step 0 change nothing.
            if self.merge and trainer.best_step:
                report |= self._merge(adapted, trainer, held_out)
            elif trainer.best_step:
                for parameter in adapted.parameters.values():
                    parameter.requires_grad_(False)
                attach(compressed, adapted, rank=self.rank, alpha=self.alpha)
        workspace.progress.note(_summary(report))
        return report

    def _merge(self, adapted: AdaptedTwin, trainer: Trainer, held_out: Tensor) -> dict[str, Any]:
        """Adds the changes to the factors, unless rounding to their dtype takes away all that was gained."""
        before = {name: a.factor.detach().to("cpu", copy=True) for name, a in adapted.adapters.items()}
        for adapter in adapted.adapters.values():
            adapter.merge()
        with torch.no_grad():
            for adapter in adapted.adapters.values():
                adapter.up.zero_()  # it is in the factor now
        if not trainer.history:
            return {}
        merged = trainer.measure(held_out)
        if undone := merged >= trainer.history[0][1]:
            with torch.no_grad():
                for name, adapter in adapted.adapters.items():
                    adapter.factor.copy_(before[name])
        return {"held_out_loss_after": trainer.history[0][1] if undone else merged}

    def _factors(self, compressed: PreTrainedModel, dense: LoadedModel) -> list[str]:
        """Names of the factors to adapt: of the kinds and matrix types asked for, a shared basis once.

        A layer's own correction of low rank stays as it is.
        """
        wanted = {m.module for m in dense.architecture.matrices if self.matrices is None or m.matrix in self.matrices}
        found = []
        for name in find_factors(compressed):
            module, _, kind = name.rpartition(".")
            is_factor = isinstance(compressed.get_submodule(module), FactorisedLinear)
            if is_factor and kind in FACTORS[self.factors] and module.removesuffix(".shared") in wanted:
                found.append(name)
        return found

    def _windows(self, dense: LoadedModel, data: CalibrationData) -> TokenWindows:
        """The windows to train on, those of calibration unless other data is named."""
        if self.data is None:
            return data.windows
        try:
            windows = self.data.windows(dense.tokenizer)
            check_fits(windows, dense)
        except BsExpError as error:
            error.add_note("This is about the text on which adapters are trained (update.data...).")
            raise
        return windows

    def _key(self, compressed: PreTrainedModel, dense: LoadedModel, windows: TokenWindows) -> str:
        # What happens after the training, and how often it is saved, does not change it; data counts by its tokens.
        left_out = ("checkpoint_minutes", "merge", "data")
        return content_key(
            dense=dense.fingerprint,
            compressed=fingerprint(compressed),
            device=dense.device.type,
            windows=windows.provenance["sha256"],
            feeding=asdict(windows.feeding),
            settings={name: value for name, value in asdict(self).items() if name not in left_out},
            **own_code(self),
        )

    def _trainer(
        self, adapted: AdaptedTwin, dense: LoadedModel, windows: TokenWindows, training: Tensor, held_out: Tensor
    ) -> Trainer:
        return Trainer(
            name="LoRA",
            settings=self,
            parameters=adapted.parameters,
            step_scales=dict.fromkeys(adapted.parameters, 1.0),
            objective=_WithDropout(adapted, self._objective(adapted, dense, feeder(dense, windows.feeding))),
            windows=training,
            held_out=held_out,
            device=dense.device,
            scale_loss=dense.module.dtype is torch.float16,
        )

    def _objective(self, adapted: AdaptedTwin, dense: LoadedModel, feed: Feeder) -> Objective:
        autocast = self.autocast == "bfloat16"
        if self.loss == "cross_entropy":
            return TokenLoss(module=adapted.module, feeder=feed, autocast=autocast)
        return LogitDivergence(
            compressed=adapted.module,
            dense=dense.module,
            feeder=feed,
            temperature=self.temperature,
            autocast=autocast,
        )


@dataclass(frozen=True, eq=False)
class _WithDropout:
    """An objective with the adapters' dropout in training, and without it where the loss is measured."""

    adapted: AdaptedTwin
    objective: Objective

    def __call__(self, ids: Int[Tensor, "windows length"], *, training: bool) -> Tensor:
        self.adapted.set_dropout(training)
        loss: Tensor = self.objective(ids, training=training)
        return loss


def _summary(report: Mapping[str, Any]) -> str:
    steps = report["steps"]
    if "held_out_loss_before" not in report:
        return f"lora: {steps} steps on {report['training_windows']} windows, none held out"
    before, after = report["held_out_loss_before"], report["held_out_loss_after"]
    if after >= before:
        return (
            f"lora: {steps} steps did not lower the held-out loss of {before:.4g} nats per token, so the factors stay "
            "as they were (try another learning_rate)"
        )
    return f"lora: held-out loss {before:.4g} -> {after:.4g} nats per token, adapters of step {report['best_step']}"
