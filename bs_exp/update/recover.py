"""The factors are trained to give the dense model's predictions on the calibration windows, and on its own text."""

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
from bs_exp.models.model_inputs import feeder
from bs_exp.models.offload import check_whole_backward
from bs_exp.models.surgery import find_factors
from bs_exp.training.generation import GenerationSettings, check_generation, generate_windows
from bs_exp.training.objectives import BlockOutputs, LogitDivergence, Objective
from bs_exp.training.optimizers import OptimizerSettings
from bs_exp.training.resampling import MAX_PIECE_LENGTH, resample
from bs_exp.training.settings import TrainerSettings, split_windows
from bs_exp.training.trainer import Trainer, trainable
from bs_exp.types import CalibrationData, LoadedModel, RankPlan, TokenWindows
from bs_exp.validation import check_at_least, check_positive
from bs_exp.workspace import Workspace

KIND = "recovery"


@dataclass(frozen=True, kw_only=True)
class Recovery(TrainerSettings, OptimizerSettings, GenerationSettings):
    """Trains bases and coefficients, and nothing else, on the KL divergence from the dense model's logits.

    A part of the calibration windows is held out. Trained on the others, on `generated_windows` that the dense model
    samples, and, where the steps see more windows than these, on windows resampled from pieces of them (`piece_length`
    tokens; None repeats the same windows). The factors with the lowest held-out KL are kept, which may be those from
    before training. A factor's step size is `learning_rate` times its root mean square at the start. Half-precision
    factors are trained in fp32 copies. `blockwise_steps` come first: each block learns to give the dense block's
    outputs. Distillation: Hinton et al. (1503.02531), section 2.
    """

    blockwise_steps: int
    piece_length: int | None
    temperature: float

    def __post_init__(self) -> None:
        TrainerSettings.__post_init__(self)
        OptimizerSettings.__post_init__(self)
        GenerationSettings.__post_init__(self)
        check_at_least(0, blockwise_steps=self.blockwise_steps)
        check_at_least(1, piece_length=self.piece_length)
        check_positive(temperature=self.temperature)
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
            feeder(dense, windows.feeding).examples(windows.ids[:1])
            check_generation(self, dense, training)

    def apply(
        self,
        compressed: PreTrainedModel,
        dense: LoadedModel,
        plan: RankPlan,
        data: CalibrationData,
        workspace: Workspace,
    ) -> Mapping[str, Any]:
        """Trains in place; reports the cost, and the held-out KL in nats per token at temperature 1.

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
        predictions = LogitDivergence(
            compressed=compressed, dense=dense.module, feeder=feed, temperature=self.temperature, autocast=autocast
        )

        def trained(objective: Objective, steps: int, label: str) -> tuple[Trainer, dict[str, Any]]:
            trainer = self._trainer(dense, factors, objective, self._with_resampled(whole, steps), held_out, steps)
            key = None if workspace.cache.folder is None else self._key(compressed, dense, windows, label)
            trainer.train(workspace, label=label, kind=KIND, key=key)
            return trainer, trainer.report() | {"resampled_windows": int((trainer.seen >= len(whole)).sum())}

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
            "held_out_kl_before": before,
            "held_out_kl_after": min(trainer.best_loss, before),
            "held_out_kl": [[step, value] for step, value in trainer.history],
        }
        workspace.progress.note(_summary(report))
        return report

    def _with_resampled(self, whole: Int[Tensor, "windows length"], steps: int) -> Int[Tensor, "all_windows length"]:
        """The windows, and behind them as many resampled ones as the steps see beyond one epoch."""
        more = steps * self.batch_size - len(whole)
        if self.piece_length is None or more <= 0:
            return whole
        return torch.cat([whole, resample(whole, more, piece_length=self.piece_length, seed=self.seed)])

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
        )


@torch.no_grad()
def _restore(factors: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> None:
    for name, value in values.items():
        factors[name].copy_(value)


def _summary(report: Mapping[str, Any]) -> str:
    steps, before, after = report["steps"], report["held_out_kl_before"], report["held_out_kl_after"]
    if after >= before:
        return (
            f"recovery: {steps} steps did not lower the held-out KL of {before:.4g} nats per token, so the factors "
            "stay as they were (try a lower update.learning_rate)"
        )
    return (
        f"recovery: held-out KL {before:.4g} -> {after:.4g} nats per token, factors of step {report['best_step']} of "
        f"{steps}"
    )
