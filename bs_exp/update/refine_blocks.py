"""Blocks are trained one after the other to give the dense block's outputs, on what the blocks before them give."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from typing import Any

import psutil
import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from bs_exp.cache import content_key
from bs_exp.calibration.anchored_truncation import truncate_anchored
from bs_exp.calibration.block_inputs import without_experts
from bs_exp.calibration.walk import check_block_walk
from bs_exp.errors import ConfigError
from bs_exp.identity import own_code
from bs_exp.models.block_stream import BlockStream, Waiting
from bs_exp.models.blocks import Blocks
from bs_exp.models.divergence import precise
from bs_exp.models.fingerprint import fingerprint
from bs_exp.models.model_inputs import feeder
from bs_exp.models.offload import computes, dtypes_at_home, is_offloaded, keep_changes
from bs_exp.models.surgery import block_parameters, find_factors, own_parameters
from bs_exp.training.optimizers import OptimizerSettings
from bs_exp.training.settings import TrainerSettings, split_windows
from bs_exp.training.trainer import Trainer, trainable
from bs_exp.types import CalibrationData, LoadedModel, RankPlan, WeightGroup
from bs_exp.validation import check_choice, check_number
from bs_exp.workspace import Workspace

KIND = "refinement"
TRAINED = ("block", "factors")
STARTS = ("present", "anchored")


@dataclass(frozen=True, kw_only=True)
class RefineBlocks(TrainerSettings, OptimizerSettings):
    """Trains each block, in order, on the squared error of its output to the dense block's output.

    Its inputs are those of the compressed model, whose blocks before it are refined already; the target is what the
    dense block gives in the dense model, so errors of earlier blocks are corrected. Beside the hidden states of the
    windows in front of a block and the targets behind it, one block with its gradients and the optimiser's state is
    all that is in memory, so memory does not grow with depth. `trained`: all parameters of the block (`block`: norms,
    biases and matrices that stayed dense too, as copies that the dense model does not have), or its `factors` alone.
    What several blocks share, above all a shared basis, stays as it is: no block may change it for the others.

    `start`: `present` trains the factors as they are; `anchored` first truncates the block's matrices anew, site by
    site in the order in which they run, to the least `||X W - X' W'||`, with X the dense model's inputs and X' those of
    the compressed one (AA-SVD's closed form, with this `ridge`; ranks stay).

    Parts of the windows are held out; a block keeps the parameters with the least held-out error, which may be those
    from before. A parameter's step size is `learning_rate` times its root mean square at the start.
    AA-SVD (2604.02119), its block-level refinement, and its objective 4 with `start=anchored`.
    """

    trained: str
    start: str
    ridge: float

    def __post_init__(self) -> None:
        TrainerSettings.__post_init__(self)
        OptimizerSettings.__post_init__(self)
        check_choice("trained", self.trained, TRAINED)
        check_choice("start", self.start, STARTS)
        check_number(0.0, ridge=self.ridge)

    @property
    def reads_windows(self) -> bool:
        """Whether there is anything to do."""
        return self.steps > 0 or self.start == "anchored"

    def check(self, dense: LoadedModel, data: CalibrationData) -> None:
        """Raises an error if blocks cannot be run one at a time, one of them does not fit into memory beside the
        hidden states, or windows are too few to hold some out."""
        if not self.reads_windows:
            return
        if self.steps:
            split_windows(data.windows.ids, self)
        check_block_walk(
            dense,
            data,
            "So its blocks cannot be refined: use update=recover, which trains the model as a whole, or update=none.",
        )
        self._check_memory(dense, data)

    def apply(
        self,
        compressed: PreTrainedModel,
        dense: LoadedModel,
        plan: RankPlan,
        data: CalibrationData,
        workspace: Workspace,
    ) -> Mapping[str, Any]:
        """Refines in place; reports the cost, and each block's held-out error before and after.

        An error is in units of the squared norm of what the dense block adds to its inputs. With a cache folder, an
        interrupted training continues at its block, from its last checkpoint, to the same bits.
        """
        groups = [planned.group for planned in plan.groups if planned.rank is not None]
        if not groups or not self.reads_windows:
            workspace.progress.note(
                "refinement: no steps asked for" if groups else "refinement: there are no factors to refine"
            )
            return {"strategy": KIND, "steps": 0, "tokens": 0, "seconds": 0.0}
        start = time.perf_counter()
        key = None
        if workspace.cache.folder is not None:
            settings = {name: value for name, value in asdict(self).items() if name != "checkpoint_minutes"}
            key = content_key(
                dense=dense.fingerprint,
                compressed=fingerprint(compressed),
                device=dense.device.type,
                windows=data.windows.provenance["sha256"],
                feeding=asdict(data.windows.feeding),
                batch_size=data.batch_size,
                settings=settings,
                **own_code(self),
            )
        if self.start == "anchored":
            groups = without_experts(groups, "refinement", workspace.progress)
        work = _Refinement(self, compressed, dense, data, groups, workspace, key)
        layers = range(len(dense.architecture.blocks))
        for layer in workspace.progress.track(layers, label="refining", total=len(layers)):
            work.refine(layer)
        report = work.report() | {"seconds": round(time.perf_counter() - start, 3)}
        workspace.progress.note(_summary(report))
        return report

    def _check_memory(self, dense: LoadedModel, data: CalibrationData) -> None:
        """ConfigError if one block's training, with hidden states that wait in memory, takes more than is free."""
        paths = dense.architecture.blocks
        largest = max(sum(p.numel() for p in dense.module.get_submodule(path).parameters()) for path in paths)
        # Master, gradient and two moments in fp32, or finer; and the best parameters so far.
        needed = largest * (4 * precise(dense.module.dtype).itemsize + dense.module.dtype.itemsize)
        if is_offloaded(dense.module) and not computes(dense.module.dtype, dense.device):
            # The block is in fp32 meanwhile, and so are its best parameters.
            needed += largest * (2 * torch.float32.itemsize - dense.module.dtype.itemsize)
        width = getattr(dense.module.config.get_text_config(), "hidden_size", 0)
        states = 2 * data.windows.ids.numel() * int(width) * dense.module.dtype.itemsize
        if data.activations == "memory":
            needed += states
        free = psutil.virtual_memory().available
        if dense.device.type == "cuda":
            free = min(free, torch.cuda.mem_get_info(dense.device)[0])
        if needed > free:
            raise ConfigError(
                f"Block refinement needs {needed / 1e9:.3g} GB beside the model ({largest:,} parameters of a block "
                f"with gradients and moments; hidden states of the windows take {states / 1e9:.3g} GB), but "
                f"{free / 1e9:.3g} GB are free. Set calibration.activations=disk, lower calibration.num_sequences, or "
                "use update=none."
            )


@dataclass(eq=False)
class _Refinement:
    """A refinement under way: both models' hidden states in front of the next block."""

    settings: RefineBlocks
    compressed: PreTrainedModel
    dense: LoadedModel
    data: CalibrationData
    groups: Sequence[WeightGroup]
    workspace: Workspace
    key: str | None
    _entries: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        ids, settings = self.data.windows.ids, self.settings
        feed = feeder(self.dense, self.data.windows.feeding)
        self._blocks = Blocks(replace(self.dense, module=self.compressed))
        waiting = Waiting(self.data.activations, self.workspace.cache.folder)

        def batches() -> Any:
            return (feed.inputs(part.to(self.dense.device)) for part in self.data.batches)

        self._current = BlockStream(self._blocks, batches(), waiting)
        self._target = BlockStream(Blocks(self.dense), batches(), waiting)
        # The trainer draws positions of windows; the objective looks their states up.
        self._training, self._held_out = torch.arange(len(ids))[:, None], torch.zeros(0, 1, dtype=torch.long)
        if settings.steps:
            self._training, self._held_out = split_windows(self._training, settings)
            for count in sorted(self._counts()):
                self._blocks.embedded(feed.inputs(ids[:count].to(self.dense.device)))

    def refine(self, layer: int) -> None:
        """Truncates and trains a block, as the settings say, and takes both models' states behind it."""
        settings, path = self.settings, self.dense.architecture.blocks[layer]
        folder = self.workspace.cache.folder
        entry: dict[str, Any] = {"layer": layer}
        if settings.start == "anchored":
            here = [group for group in self.groups if layer in group.layers]
            entry |= truncate_anchored(
                self.compressed, self.dense, layer, here, self._current, self._target, settings.ridge, folder
            )
        added = self._advance_target(layer)
        if settings.steps and self._whole:
            own_parameters(self.compressed, self.dense.module, path, folder)
        with self._current.resident(layer):
            if settings.steps:
                entry |= self._train(layer, path, added / len(self.data.windows.ids))
                keep_changes(self.compressed.get_submodule(path))
            for batch in range(len(self._current)):
                self._current.advance(batch, self._current.run(layer, batch))
        self._entries.append(entry)

    def report(self) -> dict[str, Any]:
        trained = [entry for entry in self._entries if "steps" in entry]
        steps = sum(entry["steps"] for entry in trained)
        report: dict[str, Any] = {
            "strategy": KIND,
            "start": self.settings.start,
            "steps": steps,
            "tokens": steps * self.settings.batch_size * self.data.windows.ids.shape[1],
            "trained_parameters": sum(entry["trained_parameters"] for entry in trained),
            "held_out_windows": len(self._held_out),
        }
        if trained and len(self._held_out):
            for when in ("before", "after"):
                report[f"held_out_error_{when}"] = sum(e[f"held_out_error_{when}"] for e in trained) / len(trained)
        return report | {"blocks": self._entries}

    @property
    def _whole(self) -> bool:
        return self.settings.trained == "block"

    def _counts(self) -> set[int]:
        """Numbers of windows that the objective is given at once."""
        settings = self.settings
        parts = [len(p) for p in torch.arange(settings.batch_size).tensor_split(settings.accumulation)]
        held = [len(p) for p in self._held_out.split(-(-settings.batch_size // settings.accumulation)) if len(p)]
        return {*parts, *held}

    def _advance_target(self, layer: int) -> float:
        """Takes the dense model's states behind its block; the squared norm of what that adds, over all windows."""
        added = 0.0
        with self._target.resident(layer):
            for batch in range(len(self._target)):
                before, behind = self._target.states(batch), self._target.run(layer, batch)
                added += float((behind.double() - before.to(behind.device).double()).square().sum())
                self._target.advance(batch, behind)
        return added

    def _train(self, layer: int, path: str, unit: float) -> dict[str, Any]:
        """Trains the block; the steps, and the held-out errors if windows are held out."""
        settings = self.settings
        parameters = block_parameters(self.compressed, path)
        if not self._whole:
            factors = set(find_factors(self.compressed).values())
            parameters = {name: p for name, p in parameters.items() if p in factors}
        if not parameters:
            return {}
        label = f"block {layer}"
        kept = dtypes_at_home(self.compressed.get_submodule(path))
        with trainable(parameters.values(), chain(self.compressed.parameters(), self.dense.module.parameters())):
            trainer = Trainer(
                name="Block refinement",
                settings=settings,
                optimizer=settings,
                parameters=parameters,
                step_scales=_scales(parameters),
                objective=_OutputError(
                    self._blocks,
                    layer,
                    self._current,
                    self._target,
                    self.data.batch_size,
                    unit or 1.0,
                    settings.autocast == "bfloat16",
                ),
                windows=self._training,
                held_out=self._held_out,
                device=self.dense.device,
                scale_loss=self.dense.module.dtype is torch.float16,
                stored={name: kept[p] for name, p in parameters.items() if p in kept},
            )
            key = None if self.key is None else content_key(refinement=self.key, layer=layer)
            trainer.train(self.workspace, label=label, kind=KIND, key=key)
        found = {key: value for key, value in trainer.report().items() if key in ("steps", "trained_parameters")}
        if trainer.history:
            found |= {
                "best_step": trainer.best_step,
                "held_out_error_before": trainer.history[0][1],
                "held_out_error_after": trainer.best_loss,
            }
        return found


@dataclass(frozen=True, eq=False)
class _OutputError:
    """Squared error of a block's outputs on the windows at these positions, in units of `unit`, a squared norm."""

    blocks: Blocks
    layer: int
    current: BlockStream
    target: BlockStream
    batch_size: int
    unit: float
    autocast: bool

    def __call__(self, ids: Int[Tensor, "windows one"], *, training: bool) -> Tensor:
        positions = ids.flatten().tolist()
        with torch.autocast(ids.device.type, dtype=torch.bfloat16, enabled=self.autocast and training):
            found = self.blocks.run(self.layer, self._states(self.current, positions))
        wanted = self._states(self.target, positions).to(found.device)
        dtype = precise(wanted.dtype)
        return (found.to(dtype) - wanted.to(dtype)).square().sum() / self.unit

    def _states(self, stream: BlockStream, positions: Sequence[int]) -> Tensor:
        return torch.stack([stream.states(i // self.batch_size)[i % self.batch_size] for i in positions])


def _scales(parameters: Mapping[str, nn.Parameter]) -> dict[str, float]:
    """Root mean squares by name; of a parameter of zeros, such as a bias may be, the least of the others."""
    sizes = {name: float(p.detach().double().square().mean().sqrt()) for name, p in parameters.items()}
    least = min((size for size in sizes.values() if size > 0.0), default=1.0)
    return {name: size or least for name, size in sizes.items()}


def _summary(report: Mapping[str, Any]) -> str:
    if "held_out_error_before" not in report:
        return f"refinement: {report['steps']} steps, {len(report['blocks'])} blocks, no windows held out"
    kept = sum(entry.get("best_step") == 0 for entry in report["blocks"])
    return (
        f"refinement: held-out error of a block {report['held_out_error_before']:.4g} -> "
        f"{report['held_out_error_after']:.4g} of what it adds" + (f"; {kept} blocks stay as they were" if kept else "")
    )
