"""The factors are trained to give the dense model's predictions or outputs on the calibration windows and its text."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from itertools import chain
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from bs_exp.cache import content_key
from bs_exp.errors import ConfigError
from bs_exp.identity import own_code
from bs_exp.models.fingerprint import fingerprint
from bs_exp.models.model_inputs import Feeder, feeder
from bs_exp.models.offload import check_whole_backward
from bs_exp.models.surgery import find_factors
from bs_exp.training.generation import GenerationSettings, check_generation, generate_windows, generates
from bs_exp.training.objectives import BlockOutputs, LogitDivergence, Objective, OutputDistance
from bs_exp.training.optimizers import OptimizerSettings
from bs_exp.training.resampling import MAX_PIECE_LENGTH, resample
from bs_exp.training.settings import TrainerSettings, split_windows
from bs_exp.training.trainer import Trainer, trainable
from bs_exp.types import CalibrationData, LoadedModel, RankPlan, Task, TokenWindows
from bs_exp.validation import check_at_least, check_choice, check_positive, shown
from bs_exp.workspace import Workspace

KIND = "recovery"
# Tokens per piece of a resampled window, where a model cannot generate the windows that are asked of it.
_PIECE = 64
# What is measured on held-out windows: its name and its unit.
_UNITS = {
    "kl": ("KL", " nats per token"),
    "cosine": ("1 - cosine", " per position"),
    "mse": ("relative squared error", ""),
    "embedding": ("1 - cosine", " per sentence embedding"),
}


@dataclass(frozen=True, kw_only=True)
class Recovery(TrainerSettings, OptimizerSettings, GenerationSettings):
    """Trains bases and coefficients, and nothing else, towards the dense model.

    `objective`: `kl` is the KL divergence from the dense model's logits; `cosine`, `mse` and `embedding` compare its
    outputs (`OutputDistance`). `auto`: `kl`, and `cosine` for a model without logits.

    A part of the calibration windows is held out. Trained on the others, on `generated_windows` that the dense model
    samples, and, where the steps see more windows than these, on windows resampled from pieces of them (`piece_length`
    tokens; None repeats the same windows). A model that does not continue text samples none: where windows are asked
    of it, more are resampled, in pieces of 64 tokens if `piece_length` is None. The factors with the lowest held-out
    loss are kept, which may be those from before training. A factor's step size is `learning_rate` times its root mean
    square at the start. With `back_off`, a held-out loss more than twice that before training, or one that is not
    finite, sends it back to the best factors, and on from there with a quarter of the learning rate. Half-precision
    factors are trained in fp32 copies. `blockwise_steps` come first: each block learns to give the dense block's
    outputs. Distillation: Hinton et al. (1503.02531), section 2.
    """

    blockwise_steps: int
    piece_length: int | None
    temperature: float
    objective: str = "auto"
    back_off: bool = True

    def __post_init__(self) -> None:
        TrainerSettings.__post_init__(self)
        OptimizerSettings.__post_init__(self)
        GenerationSettings.__post_init__(self)
        check_at_least(0, blockwise_steps=self.blockwise_steps)
        check_at_least(1, piece_length=self.piece_length)
        check_positive(temperature=self.temperature)
        if not isinstance(self.back_off, bool):
            raise ConfigError(f"back_off must be true or false, got {shown(self.back_off)}.")
        check_choice("objective", self.objective, ("auto", *_UNITS))
        if self.piece_length is not None and self.piece_length > MAX_PIECE_LENGTH:
            raise ConfigError(
                f"piece_length must be at most {MAX_PIECE_LENGTH} tokens, got {self.piece_length}; null resamples "
                "nothing."
            )
        if self.holdout == 0.0:
            raise ConfigError("holdout must be above 0: only held-out windows show whether training does harm.")

    @property
    def reads_windows(self) -> bool:
        """Whether there is anything to train."""
        return bool(self.steps or self.blockwise_steps)

    def check(self, dense: LoadedModel, data: CalibrationData) -> None:
        """Raises an error if there are too few windows to hold some out, or if the model predicts nothing."""
        if self.reads_windows:
            check_whole_backward(dense.module, dense.device, "update=recover")
            windows = data.windows
            training, _ = split_windows(windows.ids, self)
            feed, objective = feeder(dense, windows.feeding), self._chosen(dense)
            if objective == "kl":
                feed.examples(windows.ids[:1])
            if objective == "embedding" and dense.pooling is None:
                raise ConfigError(
                    "objective=embedding needs a sentence-transformers model, whose modules.json says how it pools; "
                    f"this {type(dense.module).__name__} was loaded without one. Use objective=cosine."
                )
            check_generation(self, dense, training)

    def apply(
        self,
        compressed: PreTrainedModel,
        dense: LoadedModel,
        plan: RankPlan,
        data: CalibrationData,
        workspace: Workspace,
    ) -> Mapping[str, Any]:
        """Trains in place; reports the cost, and the held-out loss: of `kl` in nats per token, at temperature 1.

        With a cache folder, an interrupted training continues from its last checkpoint, to the same bits, and a
        finished one is not repeated.
        """
        factors = find_factors(compressed)
        if not factors or not self.reads_windows:
            workspace.progress.note(
                "recovery: no steps asked for" if factors else "recovery: there are no factors to train"
            )
            return {"strategy": KIND, "steps": 0, "tokens": 0, "seconds": 0.0}
        windows = data.windows
        text, held_out = split_windows(windows.ids, self)
        start = time.perf_counter()
        whole = torch.cat([text, generate_windows(self, dense, text, workspace)])
        generation_seconds = time.perf_counter() - start
        feed, autocast = feeder(dense, windows.feeding), self.autocast == "bfloat16"
        measured = self._chosen(dense)
        predictions = self._objective(compressed, dense, feed)

        def trained(objective: Objective, steps: int, label: str) -> tuple[Trainer, dict[str, Any]]:
            more = self._with_resampled(whole, steps, dense)
            trainer = self._trainer(dense, factors, objective, more, held_out, steps)
            key = None if workspace.cache.folder is None else self._key(compressed, dense, windows, label)
            trainer.train(workspace, label=label, kind=KIND, key=key)
            return trainer, trainer.report() | {
                "last_learning_rate": trainer.learning_rate,
                "resampled_windows": int((trainer.seen >= len(whole)).sum()),
            }

        report: dict[str, Any] = {"strategy": KIND}
        with trainable(factors.values(), chain(compressed.parameters(), dense.module.parameters())):
            before: float | None = None
            original: Mapping[str, Tensor] = {}
            if self.blockwise_steps:
                before = self._trainer(dense, factors, predictions, whole, held_out, self.steps).measure(held_out)
                original = {name: f.detach().to("cpu", copy=True) for name, f in factors.items()}
                blocks = BlockOutputs(
                    compressed=compressed,
                    dense=dense.module,
                    feeder=feed,
                    paths=dense.architecture.blocks,
                    autocast=autocast,
                )
                first, report["blockwise"] = trained(blocks, self.blockwise_steps, "recovering blocks")
                report["blockwise"] |= {
                    "held_out_error_before": first.history[0][1],
                    "held_out_error_after": first.best_loss,
                }
            trainer, done = trained(predictions, self.steps, "recovery")
            before = trainer.history[0][1] if before is None else before
            if trainer.best_loss > before:
                _restore(factors, original)
        report |= done | {
            "tokens": (trainer.done + report.get("blockwise", {}).get("steps", 0)) * self.batch_size * whole.shape[1],
            "generated_windows": len(whole) - len(text),
            "generation_seconds": round(generation_seconds, 3),
            f"held_out_{measured}_before": before,
            f"held_out_{measured}_after": min(trainer.best_loss, before),
            f"held_out_{measured}": [[step, value] for step, value in trainer.history],
        }
        workspace.progress.note(_summary(report, measured))
        return report

    def _chosen(self, dense: LoadedModel) -> str:
        if self.objective != "auto":
            return self.objective
        return "cosine" if dense.task is Task.ENCODER else "kl"

    def _objective(self, compressed: PreTrainedModel, dense: LoadedModel, feed: Feeder) -> Objective:
        measure, autocast = self._chosen(dense), self.autocast == "bfloat16"
        if measure == "kl":
            return LogitDivergence(
                compressed=compressed, dense=dense.module, feeder=feed, temperature=self.temperature, autocast=autocast
            )
        return OutputDistance(
            compressed=compressed,
            dense=dense.module,
            feeder=feed,
            measure=measure,
            pooling=dense.pooling,
            autocast=autocast,
        )

    def _with_resampled(
        self, whole: Int[Tensor, "windows length"], steps: int, dense: LoadedModel
    ) -> Int[Tensor, "all_windows length"]:
        """The windows, and behind them as many resampled ones as the steps see beyond one epoch."""
        more, piece = steps * self.batch_size - len(whole), self.piece_length
        if piece is None and self.generated_windows and not generates(self, dense):
            piece = _PIECE
        if piece is None or more <= 0:
            return whole
        return torch.cat([whole, resample(whole, more, piece_length=piece, seed=self.seed)])

    def _key(self, compressed: PreTrainedModel, dense: LoadedModel, windows: TokenWindows, stage: str) -> str:
        settings = {name: value for name, value in asdict(self).items() if name != "checkpoint_minutes"}
        return content_key(
            dense=dense.fingerprint,
            compressed=fingerprint(compressed),
            device=dense.device.type,
            windows=windows.provenance["sha256"],
            feeding=asdict(windows.feeding),
            settings=settings,
            stage=stage,
            **own_code(self),
        )

    def _trainer(
        self,
        dense: LoadedModel,
        factors: Mapping[str, nn.Parameter],
        objective: Objective,
        windows: Int[Tensor, "windows length"],
        held_out: Int[Tensor, "held_out length"],
        steps: int,
    ) -> Trainer:
        return Trainer(
            name="Recovery",
            settings=replace(self, steps=steps),
            optimizer=self,
            parameters=factors,
            step_scales={name: float(f.detach().double().square().mean().sqrt()) for name, f in factors.items()},
            objective=objective,
            windows=windows,
            held_out=held_out,
            device=dense.device,
            scale_loss=any(factor.dtype is torch.float16 for factor in factors.values()),
            back_off=self.back_off,
        )


@torch.no_grad()
def _restore(factors: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> None:
    for name, value in values.items():
        factors[name].copy_(value)


def _summary(report: Mapping[str, Any], measured: str) -> str:
    (name, unit), steps = _UNITS[measured], report["steps"]
    before, after = report[f"held_out_{measured}_before"], report[f"held_out_{measured}_after"]
    if after >= before:
        return (
            f"recovery: {steps} steps did not lower the held-out {name} of {before:.4g}{unit}, so the factors "
            "stay as they were (try a lower learning_rate)"
        )
    return (
        f"recovery: held-out {name} {before:.4g} -> {after:.4g}{unit}, factors of step {report['best_step']} of {steps}"
    )
