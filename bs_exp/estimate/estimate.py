"""What a run will take: memory by stage, disk by kind, passes over the windows, decompositions and operations."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import psutil
import torch

from bs_exp.cache import Cache
from bs_exp.calibration.group_statistics import OF_MATRICES
from bs_exp.calibration.walk import is_large, states_on_disk
from bs_exp.errors import BsExpError
from bs_exp.estimate.ledger import Decomposition, Ledger, Work
from bs_exp.estimate.machine import Machine
from bs_exp.estimate.rounds import Rounds, rounds_of
from bs_exp.estimate.shapes import first_blocks, nbytes, repeated, share_out_tokens, without_values
from bs_exp.estimate.traced import Pass, Traced, Tracer, file_bytes, one_batch
from bs_exp.factorization.factors import KIND as FACTORS
from bs_exp.models.block_stream import Waiting
from bs_exp.models.model_inputs import feeder
from bs_exp.models.outputs import logits_of
from bs_exp.pipeline import Recipe, adapted, probes_of, seen_by
from bs_exp.protocols import MeasuredAllocation, SharingProblem, Update, UpdatesInSteps
from bs_exp.records.stages import Stage
from bs_exp.sharing.none import singles
from bs_exp.types import Activations, LoadedModel, Task
from bs_exp.update.chain import UpdateChain

WINDOWS, STATES, WAITING_FACTORS, SAVED = "tokenisation", "hidden_states", "factors without a name", "saved model"
# Bytes of a tensor's entry in the header of a saved model.
_TENSOR = 120
# Workspaces of BLAS and of threads, and modules that are imported late: measured on runs of small models.
_LIBRARIES = 10**8
EVALUATE = "evaluate"
# What the cache holds of an update that gathers statistics in every step.
STEPS = "steps of the update"
# Bytes that a tokenizer takes for each character of a text that it reads as a whole: measured on 2.1 million of them.
_TOKENISING = 180
# Of what is saved from files, one shard of at most so many bytes is in memory.
_SHARD = 512 * 10**6


@dataclass(frozen=True)
class Windows:
    """The calibration windows: their number, their length in tokens, and how many are read at once.

    `characters` are those of the text that they are cut from, 0 if that is not known.
    """

    count: int
    length: int
    batch_size: int
    activations: Activations = "auto"
    characters: int = 0

    @property
    def batches(self) -> int:
        return -(-self.count // self.batch_size)


@dataclass(frozen=True)
class Place:
    """Where a model runs, and where the weights of its blocks wait meanwhile (`model.offload`)."""

    device: torch.device
    offload: str = "none"


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a run will take. Bytes; `stages` holds the work of each stage, whose memory is that of the whole process.

    `disk` are bytes by kind: what the cache holds at most at once, and the saved model. `forward` and `backward` count
    how often all windows go through all blocks. `unknown` says what is not counted.
    """

    stages: Mapping[str, Work]
    disk: Mapping[str, int]
    forward: int
    backward: int
    rounds: Rounds
    unknown: tuple[str, ...] = ()

    @property
    def host(self) -> tuple[str, int]:
        """The stage with the peak of host memory, and the peak."""
        return _peak({name: work.host_bytes for name, work in self.stages.items()})

    @property
    def device(self) -> tuple[str, int]:
        """The stage with the peak of device memory, and the peak; 0 bytes without a device."""
        return _peak({name: work.device_bytes for name, work in self.stages.items()})

    @property
    def cache_bytes(self) -> int:
        """What lies in the cache's folder at most at once."""
        return sum(size for kind, size in self.disk.items() if kind != SAVED)

    @property
    def decompositions(self) -> Counter[Decomposition]:
        """Factorisations by kind and shape."""
        found: Counter[Decomposition] = Counter()
        for work in self.stages.values():
            for (_, decomposition), count in work.decompositions.items():
                found[decomposition] += count
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain data for the record."""
        return {
            "host_bytes": self.host[1],
            "host_peak_in": self.host[0],
            "device_bytes": self.device[1],
            "disk_bytes": dict(self.disk),
            "forward_passes": self.forward,
            "backward_passes": self.backward,
            "rounds": list(self.rounds.ratios),
            "decompositions": [[*found, count] for found, count in sorted(self.decompositions.items())],
            "unknown": list(self.unknown),
        }


def _peak(sizes: Mapping[str, int]) -> tuple[str, int]:
    name = max(sizes, key=lambda name: sizes[name])
    return name, sizes[name]


def estimate(
    model: LoadedModel,
    recipe: Recipe,
    windows: Windows | None,
    cache: Cache,
    place: Place,
    *,
    save_model: bool = False,
    evaluation_tokens: tuple[int, int] | None = None,
    held: int = 0,
    known: Traced | None = None,
) -> Estimate:
    """What compressing a model by a recipe takes. The model may be on the meta device: no value is read.

    `windows` is None for a recipe that reads none; `evaluation_tokens` are the windows of a batch in evaluation and
    their length; `held` are bytes of this process that the run will not need; `known` is what earlier estimates of the
    same model in the same place have traced. Raises what strategies raise for settings that do not fit the model.
    """
    return _Estimator(
        model, adapted(recipe, model), windows, cache, place, save_model, evaluation_tokens, held, known or Traced()
    ).estimate()


def seconds_of(found: Estimate, machine: Machine) -> dict[str, float]:
    """Seconds by stage, on a machine whose rates are known; writing of what a stage leaves on disk is in `write`."""
    seconds = {str(name): machine.seconds(work) for name, work in found.stages.items() if name != EVALUATE}
    return seconds | {"write": sum(found.disk.values()) / machine.disk}


@dataclass
class _Estimator:
    model: LoadedModel
    recipe: Recipe
    windows: Windows | None
    cache: Cache
    place: Place
    save_model: bool
    evaluation_tokens: tuple[int, int] | None
    held: int
    known: Traced
    stages: dict[str, Work] = field(default_factory=dict)
    disk: Counter[str] = field(default_factory=Counter)
    forward: int = 0
    backward: int = 0

    def estimate(self) -> Estimate:
        recipe = self.recipe
        ledger = Ledger()
        bare = without_values(self.model, ledger, device=self.place.device, offload=self.place.offload)
        with ledger.fake:
            dense = seen_by(recipe.sharing, bare)
            share_out_tokens(dense.module)
        unknown: list[str] = []
        if recipe.sharing.measured:
            groups = singles(dense.architecture)
            unknown.append(
                f"{type(recipe.sharing).__name__}: groups depend on statistics; counted is every matrix alone, without "
                "the comparison of candidates"
            )
        else:
            groups = recipe.sharing.groups(SharingProblem(dense.architecture, recipe.retain_ratio, recipe.layout, None))
        if isinstance(recipe.allocation, MeasuredAllocation):
            unknown.append(f"{type(recipe.allocation).__name__}: the plans that it measures are not counted")
        windows = self.windows or Windows(1, 2, 1)
        self.tracer = Tracer(
            ledger=ledger,
            dense=dense,
            recipe=recipe,
            groups=groups,
            data=replace(one_batch(windows.count, windows.length, windows.batch_size), probes=probes_of(recipe)),
            cache=self.cache,
            known=self.known,
            unknown=unknown,
        )
        rounds = rounds_of(recipe)
        if rounds.least != len(rounds.ratios):
            unknown.append(f"{type(recipe.schedule).__name__}: {rounds.told}, as losses will have it; counted are most")
        self._load(dense)
        self._rounds(dense, rounds.ratios)
        self._update(recipe.update, rounds.ratios[-1])
        self._save(dense)
        self._evaluate(dense)
        return Estimate(
            stages=self.stages,
            disk={kind: size for kind, size in self.disk.items() if size},
            forward=self.forward,
            backward=self.backward,
            rounds=rounds,
            unknown=tuple(unknown),
        )

    # Memory that is there whatever stage runs.

    def _base(self) -> int:
        """Python and its libraries as they are now, and what these take when they are first used."""
        return max(int(psutil.Process().memory_info().rss) - self.held, 0) + _LIBRARIES

    @cached_property
    def _weights(self) -> tuple[int, int]:
        """Bytes of the dense model's weights on the host and on the device."""
        module, blocks = self.model.module, self.model.architecture.blocks
        total = nbytes(module)
        inside = [nbytes(module.get_submodule(path)) for path in blocks]
        outside, one = total - sum(inside), max(inside)
        on_cpu = self.place.device.type == "cpu"
        match self.place.offload:
            case "none":
                return (total, 0) if on_cpu else (0, total)
            case "cpu":
                return sum(inside), outside + one
            case _:
                # Pages of files count while they are in memory; of the embeddings, hardly any are.
                return (one, 0) if on_cpu else (one, outside + one)

    def _compressed(self, ratio: float) -> int:
        """Bytes of the factors of the compressed model, on the device or in files."""
        return self.tracer.plan(ratio).parameters * self.model.module.dtype.itemsize

    def _stage(self, name: str, work: Work, *, factors: int = 0, host: int = 0) -> None:
        """Notes the work of a stage beside the weights, bytes of factors, and further bytes on the host."""
        host_weights, device_weights = self._weights
        on_cpu, in_files = self.place.device.type == "cpu", self.place.offload == "disk"
        held = 0 if in_files else factors
        found = replace(
            work,
            host_bytes=work.host_bytes + self._base_bytes + host_weights + host + (held if on_cpu else 0),
            device_bytes=work.device_bytes + device_weights + (0 if on_cpu else held),
        )
        self.stages[name] = found if name not in self.stages else self.stages[name].then(found)

    # Stages.

    def _load(self, dense: LoadedModel) -> None:
        self._base_bytes = self._base()
        largest = max(weight.nbytes for weight in dense.module.parameters())
        # On its way to a device, all is on the host.
        extra = nbytes(dense.module) if self.place.offload == "none" and self.place.device.type != "cpu" else 0
        work = Work(moved=Counter({"cpu": 2 * nbytes(dense.module)}))
        self._stage(Stage.LOAD, work, host=extra + (largest if self.place.offload == "disk" else 0))

    def _rounds(self, dense: LoadedModel, ratios: Sequence[float]) -> None:
        """Profile once; statistics, decompositions and factors in every round."""
        recipe, windows = self.recipe, self.windows
        if windows is not None:
            self._stage(Stage.TOKENISE, Work(), host=_TOKENISING * windows.characters)
            self.disk[WINDOWS] = windows.count * windows.length * 8 + file_bytes(2)
        of_blocks = recipe.allocation.needs - OF_MATRICES
        for statistic in sorted(of_blocks):
            self._pass(Stage.PROFILE, frozenset({statistic}), factors=0)
        first = list(self._gathered(recipe.round_needs | recipe.sharing.needs & OF_MATRICES))
        later = list(self._gathered(recipe.round_needs)) if recipe.sharing.needs and len(ratios) > 1 else first
        decomposed = list(self.tracer.decomposing())
        factors = sum(self.tracer.stored_factors(group) for group, _ in decomposed)
        by_round: list[Counter[str]] = []
        before = 0
        for number, ratio in enumerate(ratios):
            stored: Counter[str] = Counter({FACTORS: factors})
            for gathered in later if number else first:
                self._note_pass(Stage.CALIBRATE, gathered, factors=before)
                stored += gathered.stored
            by_round.append(stored)
            in_memory = sum(stored.values()) if self.cache.folder is None else 0
            for _, work in decomposed:
                self._stage(Stage.DECOMPOSE, work, factors=before, host=in_memory)
            new = self._compressed(ratio)
            for _, work in self.tracer.replacing(ratio):
                self._stage(Stage.REPLACE, work, factors=before + new, host=in_memory)
            before = new
        if self.cache.folder is not None:
            self._note_rounds(by_round)
            if self.place.offload == "disk":
                self.disk[WAITING_FACTORS] = before

    def _note_rounds(self, rounds: Sequence[Counter[str]]) -> None:
        """What the cache holds of rounds: all that are kept, or the largest."""
        kept = [stored for stored in rounds[:-1] if self.cache.keeps(sum(stored.values()))]
        self.disk += sum([*kept, rounds[-1]], Counter[str]())

    def _gathered(self, statistics: frozenset[Any]) -> Iterator[Pass]:
        yield from self.tracer.gathering(statistics & OF_MATRICES)

    def _pass(self, stage: Stage, statistics: frozenset[Any], *, factors: int) -> None:
        for gathered in self.tracer.gathering(statistics):
            self._note_pass(stage, gathered, factors=factors)
            self.disk += gathered.stored

    def _note_pass(self, stage: Stage, found: Pass, *, factors: int) -> None:
        """All batches of a pass, and the hidden states of those that the one traced batch does not stand for."""
        windows = self.windows
        assert windows is not None
        self._stage(stage, found.work.times(windows.batches), factors=factors, host=self._waiting(found))
        self.forward += found.forward
        self.backward += found.backward

    def _waiting(self, found: Pass) -> int:
        """Bytes of hidden states in memory beyond those of one batch; what waits on disk is noted there."""
        windows = self.windows
        assert windows is not None
        dense = self.tracer.dense
        backward = found.backward > 0
        tokens = windows.count * windows.length
        if not is_large(dense) or (backward and self.place.offload == "none"):
            return 0
        total = states_on_disk(dense, tokens, backward=backward)
        once = states_on_disk(dense, tokens, backward=False) // 2
        one_batch = 1 - 1 / windows.batches
        if Waiting(windows.activations, self.cache.folder).takes_disk(total):
            self.disk[STATES] = max(self.disk[STATES], total)
            return round(once * one_batch) if backward else 0
        # Backward, the gradients of all batches are there as well.
        return round((total + once if backward else once) * one_batch)

    def _update(self, update: Update, ratio: float) -> None:
        if isinstance(update, UpdateChain) and not update.is_traceable:
            for each in update.kept.values():
                self._update(each, ratio)
            return
        if isinstance(update, UpdatesInSteps):
            if update.serves(self.tracer.dense):
                self._steps(update, ratio)
            elif update.otherwise is not None:
                self._update(update.otherwise, ratio)
            return
        batches = self.windows.batches if self.windows is not None else 1
        found = self.tracer.updating(update, ratio, batches)
        factors = self._compressed(ratio)
        if found is None or self.windows is None:
            self._stage(Stage.UPDATE, Work(), factors=factors)
            return
        self._stage(Stage.UPDATE, found.work, factors=factors, host=self._waiting_in_streams(found))
        if found.forward:  # it was traced with plain factors; changed ones are brought into their layout anew
            for _, work in self.tracer.replacing(ratio):
                self._stage(Stage.UPDATE, work, factors=factors)
        self.forward += found.forward
        self.backward += found.backward

    def _steps(self, update: UpdatesInSteps, ratio: float) -> None:
        """An update that gathers statistics in every step: its passes, what it makes of them, its trials, and what it
        keeps from one step to the next."""
        windows = self.windows
        assert windows is not None
        share = min(1.0, (update.windows or windows.count) / windows.count)
        found = list(self._gathered(update.gathers))
        # Beside the statistics, in fp32: a direction, the line along it, and direction and gradient of the step before.
        kept = sum(sum(each.stored.values()) for each in found)
        kept += 5 * 4 * sum(group.parameters for group in self.tracer.groups)
        for each in found:
            self._stage(
                Stage.UPDATE,
                each.work.times(max(1.0, windows.batches * share) * update.steps),
                factors=self._compressed(ratio),
                host=round(share * self._waiting(each)) + (kept if self.cache.folder is None else 0),
            )
            # Passes are those over all windows.
            self.forward += math.ceil(share * update.steps * each.forward)
            self.backward += math.ceil(share * update.steps * each.backward)
        for _, work in self.tracer.stepping(update, ratio):
            self._stage(Stage.UPDATE, work.times(update.steps), factors=self._compressed(ratio))
        # The model's own predictions are kept, or made anew each time; the loss is measured once more at the beginning.
        measured = update.holdout * (1 + update.trials * update.steps)
        trial = self.tracer.reading()
        self._stage(Stage.UPDATE, trial.work.times(windows.batches * measured), factors=self._compressed(ratio))
        self.forward += math.ceil(measured * trial.forward)
        if self.cache.folder is not None:
            self.disk[STEPS] = kept
        told = (
            f"counted are all {update.steps} steps, with {update.trials} lengths tried in each; both depend on losses"
        )
        self.tracer.unknown.append(f"{type(update).__name__}: {told}")

    def _waiting_in_streams(self, found: Pass) -> int:
        """Hidden states of the batches that were not traced, in an update that walks through the blocks itself."""
        windows, width = self.windows, getattr(self.model.module.config, "hidden_size", 0)
        assert windows is not None
        once = windows.count * windows.length * width * self.model.module.dtype.itemsize
        if not found.forward or Waiting(windows.activations, self.cache.folder).takes_disk(once):
            return 0
        return round(2 * once * max(0.0, 1 - 2 / windows.batches))

    def _save(self, dense: LoadedModel) -> None:
        targeted = self.model.architecture.parameters * self.model.module.dtype.itemsize
        stored = sum(weight.nbytes for weight in _stored_tensors(self.model))
        tensors = len(_stored_tensors(self.model)) + len(self.model.architecture.matrices)
        saved = stored - targeted + self._compressed(self.recipe.retain_ratio) + _TENSOR * tensors
        self.saved_bytes = saved
        if self.save_model:
            self.disk[SAVED] = saved
            shard = min(saved, _SHARD) if self.place.offload == "disk" else 0
            work = Work(moved=Counter({"cpu": saved}))
            self._stage(Stage.SAVE, work, factors=self._compressed(self.recipe.retain_ratio), host=shard)

    def _evaluate(self, dense: LoadedModel) -> None:
        """Logits of a batch; how many there are depends on the text."""
        if self.evaluation_tokens is None or dense.task is not Task.CAUSAL_LM:
            return
        count, length = self.evaluation_tokens
        # Without gradients, more blocks take no more memory.
        few = first_blocks(dense, 2 * step) if (step := repeated(dense, self.tracer.groups)) else dense
        with self.tracer.ledger.counting() as work:
            ids = torch.zeros(count, length, dtype=torch.long)
            reader = feeder(few)
            try:
                for logits in logits_of(few, [reader.inputs(ids.to(few.device))]):
                    _ = logits[:1].float()
                    del logits
            except BsExpError:
                return
        head = self.model.module.get_output_embeddings()
        pages = nbytes(head) if head is not None and self.place.offload == "disk" else 0
        memory_only = Work(work.host_bytes, work.device_bytes)
        self._stage(EVALUATE, memory_only, factors=self._compressed(self.recipe.retain_ratio), host=pages)


def _stored_tensors(model: LoadedModel) -> list[torch.Tensor]:
    """Parameters and saved buffers of a model, each once."""
    state = model.module.state_dict(keep_vars=True)
    return list({id(tensor): tensor for tensor in state.values()}.values())
