"""The factors are trained to give the dense model's predictions on the calibration windows, and on its own text."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from itertools import chain
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from bs_exp.cache import content_key
from bs_exp.errors import ConfigError
from bs_exp.models.blocks import block_paths
from bs_exp.models.fingerprint import fingerprint
from bs_exp.models.model_inputs import feeder
from bs_exp.training.course import Course, Run
from bs_exp.training.generation import Generation
from bs_exp.training.objectives import BlockOutputs, LogitDivergence, find_factors
from bs_exp.training.resampling import cut_anew
from bs_exp.training.trainer import OPTIMIZERS, Objective, OptimizerDials, Training, trainable
from bs_exp.types import CalibrationData, LoadedModel, RankPlan, TokenWindows
from bs_exp.validation import check_at_least, check_choice, check_positive
from bs_exp.workspace import Workspace

KIND = "recovery"


@dataclass(frozen=True, kw_only=True)
class Recovery:
    """Trains bases and coefficients, and nothing else, on the KL divergence from the dense model's logits.

    Trained on calibration windows and, beside them, on `generated` ones that the dense model writes itself; where the
    steps see more than these, as many as are missing are cut anew from pieces of them. A part of the calibration
    windows is held out; the factors that do best on it are kept, which may be the ones that were there before. A
    factor's step size is `learning_rate` times its root mean square at the start. Half-precision factors are trained in
    fp32 copies. Distillation: Hinton et al. (1503.02531), section 2.
    """

    blockwise_steps: int
    steps: int
    generated: int
    prompt_length: int
    generation_batch: int
    piece_length: int | None
    batch_size: int
    accumulation: int
    optimizer: str
    renewal: int
    longest: int
    learning_rate: float
    schedule: str
    warmup: float
    weight_decay: float
    clip_norm: float | None
    temperature: float
    autocast: str
    holdout: float
    evaluate_every: int
    patience: int | None
    checkpoint_minutes: float | None
    seed: int

    def __post_init__(self) -> None:
        Course.of(self)
        self._generation()
        check_at_least(0, blockwise_steps=self.blockwise_steps)
        check_positive(temperature=self.temperature)
        check_choice("optimizer", self.optimizer, OPTIMIZERS)
        check_at_least(1, renewal=self.renewal, piece_length=self.piece_length)
        check_at_least(0, longest=self.longest)
        if self.holdout == 0.0:
            raise ConfigError("holdout must be above 0: without held-out windows nobody knows when training does harm.")

    @property
    def reads_windows(self) -> bool:
        """Whether there is anything to train."""
        return bool(self.steps or self.blockwise_steps)

    def check(self, dense: LoadedModel, data: CalibrationData) -> None:
        """Windows enough to hold some out, and a model that predicts something."""
        if self.reads_windows:
            windows = data.windows
            training, _ = Course.of(self).split(windows.ids)
            feeder(dense, windows.feeding).examples(windows.ids[:1])
            self._generation().check(dense, training)

    def apply(
        self,
        compressed: PreTrainedModel,
        dense: LoadedModel,
        plan: RankPlan,
        data: CalibrationData,
        workspace: Workspace,
    ) -> Mapping[str, Any]:
        """Trains in place; reports the cost, and the held-out KL in nats per token at temperature 1.

        With a cache folder, an interrupted training goes on from its last checkpoint, to the same bits, and a finished
        one is not repeated.
        """
        factors = find_factors(compressed)
        if not factors or not self.reads_windows:
            workspace.progress.note(
                "recovery: no steps asked for" if factors else "recovery: there are no factors to train"
            )
            return {"strategy": KIND, "steps": 0, "tokens": 0, "seconds": 0.0}
        windows = data.windows
        text, held_out = Course.of(self).split(windows.ids)
        start = time.perf_counter()
        whole = torch.cat([text, self._generation().windows(dense, text, workspace)])
        generation_seconds = time.perf_counter() - start
        feed = feeder(dense, windows.feeding)
        predictions = LogitDivergence(
            compressed=compressed,
            dense=dense.module,
            feeder=feed,
            temperature=self.temperature,
            autocast=self.autocast == "bfloat16",
        )

        def trained(objective: Objective, steps: int, label: str) -> tuple[Run, dict[str, Any]]:
            course = Course.of(self, steps=steps)
            training = torch.cat([whole, self._cut(whole, steps)])
            run = Run(course, self._training(dense, factors, course, objective), held_out)
            key = "" if workspace.cache.folder is None else self._key(compressed, dense, windows, label)
            run.follow(training, label=label, kind=KIND, key=key, workspace=workspace)
            return run, run.report() | {"training_windows": len(training), "cut_windows": len(training) - len(whole)}

        report: dict[str, Any] = {"strategy": KIND}
        with trainable(factors.values(), chain(compressed.parameters(), dense.module.parameters())):
            before: float | None = None
            original: Mapping[str, Tensor] = {}
            if self.blockwise_steps:
                before = self._training(dense, factors, Course.of(self), predictions).measure(held_out)
                original = {name: f.detach().to("cpu", copy=True) for name, f in factors.items()}
                blocks = BlockOutputs(
                    compressed=compressed,
                    dense=dense.module,
                    feeder=feed,
                    paths=block_paths(dense.module),
                    autocast=self.autocast == "bfloat16",
                )
                first, report["blockwise"] = trained(blocks, self.blockwise_steps, "recovering blocks")
                report["blockwise"] |= {
                    "held_out_error_before": first.history[0][1],
                    "held_out_error_after": first.best_loss,
                }
            run, done = trained(predictions, self.steps, "recovery")
            before = run.history[0][1] if before is None else before
            harmful = run.best_loss > before
            if harmful:
                _restore(factors, original)
        report |= done | {
            "tokens": (run.step + report.get("blockwise", {}).get("steps", 0)) * self.batch_size * whole.shape[1],
            "generated_windows": len(whole) - len(text),
            "generation_seconds": round(generation_seconds, 3),
            "held_out_kl_before": before,
            "held_out_kl_after": min(run.best_loss, before),
            "held_out_kl": [[step, value] for step, value in run.history],
        }
        workspace.progress.note(_summary(report))
        return report

    def _generation(self) -> Generation:
        return Generation(**{f.name: getattr(self, f.name) for f in fields(Generation)})

    def _cut(self, whole: Int[Tensor, "windows length"], steps: int) -> Int[Tensor, "cut length"]:
        """As many windows as the steps see beyond one epoch."""
        more = steps * self.batch_size - len(whole)
        if self.piece_length is None or more <= 0:
            return whole[:0]
        return cut_anew(whole, more, piece_length=self.piece_length, seed=self.seed)

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
        )

    def _training(
        self, dense: LoadedModel, factors: Mapping[str, nn.Parameter], course: Course, objective: Objective
    ) -> Training:
        return Training(
            name="Recovery",
            parameters=factors,
            scales={name: float(f.detach().double().square().mean().sqrt()) for name, f in factors.items()},
            objective=objective,
            device=dense.device,
            half=any(factor.dtype is torch.float16 for factor in factors.values()),
            learning_rate=self.learning_rate,
            weight_decay=self.weight_decay,
            clip_norm=self.clip_norm,
            windows_per_pass=course.windows_per_pass,
            seed=self.seed,
            optimizer=OptimizerDials(kind=self.optimizer, renewal=self.renewal, longest=self.longest),
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
