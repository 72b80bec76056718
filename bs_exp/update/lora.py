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
from bs_exp.models.adapters import AdaptedTwin, adapted_twin, attach
from bs_exp.models.fingerprint import fingerprint
from bs_exp.models.model_inputs import Feeder, feeder
from bs_exp.models.modeling_basis_sharing import FactorisedLinear
from bs_exp.protocols import Calibration
from bs_exp.training.course import Course, Run
from bs_exp.training.objectives import LogitDivergence, find_factors
from bs_exp.training.trainer import Objective, Training, trainable
from bs_exp.types import CalibrationData, LoadedModel, RankPlan, TokenWindows
from bs_exp.validation import check_at_least, check_choice, check_positive, check_share
from bs_exp.workspace import Workspace

KIND = "lora"
FACTORS = {"coefficients": ("weight",), "basis": ("basis",), "both": ("basis", "weight")}
LOSSES = ("cross_entropy", "distillation")


@dataclass(frozen=True, kw_only=True)
class LoRA:
    """Trains a low-rank change of each factor by AdamW, on the text (cross_entropy) or on the dense model's predictions
    of it (distillation), and nothing else. A shared basis has one adapter, so it stays shared.

    A change is scaled by `alpha / rank`. A factor with a side below `rank` has an adapter of that side's rank, which is
    enough for any change of it, with an alpha of its own so that the scale is the same. Where windows are held out, the
    adapters that do best on them are taken, and none if all of them do harm. `merge` adds the changes to the factors;
    else they stay beside them, more parameters than the budget has. Hu et al. (2106.09685), as Basis Sharing
    (2410.03765, section 4.1) and SVD-LLM (2403.07378, section 3.3) recover: rank 8, learning rate 1e-4. Basis Sharing's
    code trains the coefficients of q and v alone, SVD-LLM's both factors of all.
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
    steps: int
    batch_size: int
    accumulation: int
    learning_rate: float
    schedule: str
    warmup: float
    weight_decay: float
    clip_norm: float | None
    autocast: str
    holdout: float
    evaluate_every: int
    patience: int | None
    checkpoint_minutes: float | None
    seed: int

    def __post_init__(self) -> None:
        if isinstance(self.matrices, str):
            raise ConfigError(f"matrices must be a list such as [q, v], or null for all, got {self.matrices!r}.")
        object.__setattr__(self, "matrices", None if self.matrices is None else tuple(self.matrices))
        Course.of(self)
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
        """Matrix types that the model has, text that fits, and a model that predicts something."""
        unknown = sorted(set(self.matrices or ()) - set(dense.architecture.matrix_types))
        if unknown or self.matrices == ():
            raise ConfigError(
                f"update.matrices must name some of {', '.join(dense.architecture.matrix_types)}, or be null for all, "
                f"got {list(self.matrices or ())}."
            )
        if self.steps:
            windows = self._windows(dense, data)
            Course.of(self).split(windows.ids)
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

        With a cache folder, an interrupted training goes on from its last checkpoint, to the same bits, and a finished
        one is not repeated.
        """
        factors = self._factors(compressed, dense)
        if not factors or not self.steps:
            workspace.progress.note("lora: no steps asked for" if factors else "lora: there are no factors to adapt")
            return {"strategy": KIND, "steps": 0, "tokens": 0, "seconds": 0.0}
        windows = self._windows(dense, data)
        training, held_out = Course.of(self).split(windows.ids)
        key = "" if workspace.cache.folder is None else self._key(compressed, dense, windows)
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
            run = Run(Course.of(self), self._training(adapted, dense, windows), held_out)
            run.follow(training, label=KIND, kind=KIND, key=key, workspace=workspace)
            report = {
                "strategy": KIND,
                "merged": self.merge,
                "tokens": run.step * self.batch_size * training.shape[1],
                "training_windows": len(training),
                "windows": dict(windows.provenance),
                "adapters": len(adapted.adapters),
                "clipped_adapters": clipped,
            }
            report |= run.report()
            if run.history:
                report |= {
                    "held_out_loss_before": run.history[0][1],
                    "held_out_loss_after": run.best_loss,
                    "held_out_loss": [[step, value] for step, value in run.history],
                }
            # Adapters of step 0 change nothing.
            if self.merge and run.best_step:
                report |= self._merge(adapted, run, held_out)
            elif run.best_step:
                for parameter in adapted.parameters.values():
                    parameter.requires_grad_(False)
                attach(compressed, adapted, rank=self.rank, alpha=self.alpha)
        workspace.progress.note(_summary(report))
        return report

    def _merge(self, adapted: AdaptedTwin, run: Run, held_out: Tensor) -> dict[str, Any]:
        """Adds the changes to the factors, unless rounding to their dtype takes away all that was gained."""
        before = {name: a.factor.detach().to("cpu", copy=True) for name, a in adapted.adapters.items()}
        for adapter in adapted.adapters.values():
            adapter.merge()
        with torch.no_grad():
            for adapter in adapted.adapters.values():
                adapter.up.zero_()  # it is in the factor now
        if not run.history:
            return {}
        merged = run.training.measure(held_out)
        if undone := merged >= run.history[0][1]:
            with torch.no_grad():
                for name, adapter in adapted.adapters.items():
                    adapter.factor.copy_(before[name])
        return {"held_out_loss_after": run.history[0][1] if undone else merged}

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
        )

    def _training(self, adapted: AdaptedTwin, dense: LoadedModel, windows: TokenWindows) -> Training:
        return Training(
            name="LoRA",
            parameters=adapted.parameters,
            scales=dict.fromkeys(adapted.parameters, 1.0),
            objective=_WithDropout(adapted, self._objective(adapted, dense, feeder(dense, windows.feeding))),
            device=dense.device,
            half=dense.module.dtype is torch.float16,
            learning_rate=self.learning_rate,
            weight_decay=self.weight_decay,
            clip_norm=self.clip_norm,
            windows_per_pass=Course.of(self).windows_per_pass,
            seed=self.seed,
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


@dataclass(frozen=True, eq=False, kw_only=True)
class TokenLoss:
    """The model's own loss on the text (cross entropy), in nats per predicted token."""

    module: PreTrainedModel
    feeder: Feeder
    autocast: bool

    def __call__(self, ids: Int[Tensor, "windows length"], *, training: bool) -> Tensor:
        examples = self.feeder.examples(ids)
        with torch.autocast(ids.device.type, dtype=torch.bfloat16, enabled=self.autocast and training):
            logits = self.module(**examples.inputs).logits
        # All windows have as many predictions, so the mean over tokens is the mean over windows.
        return examples.loss(logits, reduction="mean") * len(ids)


@dataclass(frozen=True, eq=False)
class _WithDropout:
    """An objective that sees the adapters' dropout in training only."""

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
            "as they were (try another update.learning_rate)"
        )
    return f"lora: held-out loss {before:.4g} -> {after:.4g} nats per token, adapters of step {report['best_step']}"
