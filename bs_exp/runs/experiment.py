"""One run, from load to report."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import transformers
from datasets.utils import logging as datasets_logging

from bs_exp import processes
from bs_exp.cache import Cache
from bs_exp.calibration.group_statistics import WITH_GRADIENTS
from bs_exp.calibration.walk import check_room
from bs_exp.contracts import check_members
from bs_exp.errors import BsExpError, ConfigError, EstimateError
from bs_exp.estimate import machine
from bs_exp.estimate.estimate import Place, seconds_of
from bs_exp.estimate.limits import rooms, too_large, warnings
from bs_exp.estimate.shapes import offload_of
from bs_exp.evaluation.cost import measure_cost
from bs_exp.evaluation.sample import TEXT, TextSample
from bs_exp.evaluation.size import measure_size
from bs_exp.files import file_sizes
from bs_exp.models.offload import computes, is_offloaded
from bs_exp.models.processor_files import loaded_from, processor_files
from bs_exp.models.saving import check_replaceable, save_model
from bs_exp.pipeline import Preparation, Recipe, compress, measured_problem, prepare
from bs_exp.progress import Progress
from bs_exp.protocols import Analysis, Evaluator, ModelSource, Selection, Tracker
from bs_exp.records import metrics as names
from bs_exp.records.record import MODEL_FOLDER, SAVED_FILES
from bs_exp.records.stages import Stage
from bs_exp.runs import environment
from bs_exp.runs.data_warnings import data_warnings
from bs_exp.runs.dense_cache import DenseStore
from bs_exp.runs.expected import expected, expected_windows, is_known_early, measured_cost, place_of, shapes_of
from bs_exp.runs.judge import Judge
from bs_exp.runs.model_card import RunRecipe, write_card
from bs_exp.runs.recipe_selection import check_candidates, select
from bs_exp.runs.recorder import Recorder
from bs_exp.runs.stored_values import NOT_OF_COMPRESSION
from bs_exp.selection.none import NoSelection
from bs_exp.tracking.none import NullTracker
from bs_exp.types import CalibrationData, CompressedModel, LoadedModel
from bs_exp.validation import check_objective, check_seed
from bs_exp.workspace import Workspace

# One number, or one per objective, in their order; None where nothing was measured.
Objective = float | tuple[float, ...] | None


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A model, a recipe, and how to judge the result. `run` does all of it once.

    `card` tells in a saved model how it is made again; None leaves its README.md and recipe.yaml out.
    Nothing stays in memory but what `dense` keeps for the next point of a sweep.
    """

    model: ModelSource
    recipe: Recipe
    evaluators: Mapping[str, Evaluator]
    analysis: Analysis
    tracker: Tracker
    cache: Cache
    seed: int
    objective: str | tuple[str, ...] | None
    save_model: bool
    card: RunRecipe | None = None
    selection: Selection = field(default_factory=NoSelection)
    dense: DenseStore = field(default_factory=DenseStore)
    sample: TextSample | None = None
    ignore_estimate: bool = False

    def __post_init__(self) -> None:
        for family in ("model", "selection", "analysis"):
            check_members(family, getattr(self, family))
        check_members("tracking", self.tracker)
        for evaluator in self.evaluators.values():
            check_members("evaluator", evaluator)
        check_seed(self.seed)
        check_objective(self.objective)

    def as_helper(self) -> Experiment:
        """The same for a process that helps the first one of its run: it tracks and saves nothing."""
        return replace(self, tracker=NullTracker(), save_model=False, sample=None)

    def run(self, recorder: Recorder) -> Objective:
        """The objective, for a sweeper; everything else goes into the record."""
        _quiet_libraries()
        transformers.set_seed(self.seed)
        environment.reset_peak_memory()
        recorder.track(self.tracker)
        try:
            return self._compare(recorder)
        finally:
            _tell_of_cache(self.cache, recorder)
            self.cache.release()
            memory = environment.peak_memory()
            measured = measured_cost(self.cache, recorder.record.size, memory)
            recorder.update(
                memory=memory, cache=_counts(self.cache), cost={**recorder.record.cost, "measured": measured}
            )
            _free_memory()

    def _compare(self, recorder: Recorder) -> Objective:
        judge, dense, prepared = self._prepare(recorder)
        objectives = self._objectives(judge.dense(dense), judge.promised(dense))
        recipe, prepared, compressed = self._compress(dense, prepared, recorder)
        self._save(compressed, dense, recorder)
        self._analyse(prepared, recipe, recorder)
        metrics = judge.compressed(replace(dense, module=compressed.module, original=dense))
        self._write_samples(dense, replace(dense, module=compressed.module, original=dense), recorder)
        # What an earlier run left in the cache would make it look cheap.
        if self.cache.folder is None or not self.cache.hits.keys() - NOT_OF_COMPRESSION:
            before, seconds = recorder.record.metrics["dense"], recorder.record.timings[Stage.COMPRESS]
            judge.add(metrics, measure_cost(seconds, before, metrics), names.COST, "compressed")
        self._write_card(recorder)
        return self._report(objectives, metrics, recorder)

    def _prepare(self, recorder: Recorder) -> tuple[Judge, LoadedModel, Preparation]:
        """Who judges, the dense model, the recipe's preparation; an error for settings that do not fit, before work."""
        if self.save_model:
            check_replaceable(recorder.folder / MODEL_FOLDER)
        if processes.count() > 1 and self.cache.folder is None:
            raise ConfigError(
                f"{processes.count()} processes hand each other results through the cache, and cache.dir=null keeps it "
                "in memory. Set cache.dir to a folder."
            )
        self.cache.check()
        if processes.count() > 1:
            recorder.update(provenance={**recorder.record.provenance, "processes": processes.count()})
        for warning in data_warnings(self.model, self.recipe, self.evaluators):
            recorder.progress.warn(warning)
        known = is_known_early(self.model, self.recipe)
        if known:
            self._expect(None, recorder)
        dense = self._load(recorder)
        self.cache.model = str(dense.provenance.get("name", self.cache.model))
        if self.save_model:
            check_replaceable(recorder.folder / MODEL_FOLDER, loaded_from(dense.provenance))
        judge = Judge(self.evaluators, self.dense, recorder, self.cache).fitted(dense)
        judge.check(dense)
        if not known:
            self._expect(dense, recorder)
        # A selection compares its candidates on the windows, whether or not the recipe reads them.
        compares = bool(self.selection.candidates)
        cut = partial(self.dense.windows, cache=self.cache)
        prepared = prepare(dense, self.recipe, recorder.progress, cut=cut, reads_windows=compares)
        _check_shares(prepared.data)
        check_room(dense, prepared.data, self.cache.folder, backward=bool(self.recipe.needs & WITH_GRADIENTS))
        check_candidates(dense, self.recipe, self.selection, prepared, recorder.progress)
        self.analysis.check(prepared.dense.architecture)
        return judge, dense, prepared

    def _expect(self, dense: LoadedModel | None, recorder: Recorder) -> None:
        """Records what the run is expected to take; warns of what is scarce. EstimateError if the run cannot fit."""
        refused: EstimateError | None = None
        with processes.alone(), _ends_no_run(recorder.progress):
            refused = self._estimated(dense, recorder)
        processes.raise_together(refused)

    def _estimated(self, dense: LoadedModel | None, recorder: Recorder) -> EstimateError | None:
        """Records the estimate; the error of a run that cannot fit."""
        with recorder.progress.stage(Stage.ESTIMATE):
            place = place_of(self.model) if dense is None else Place(dense.device, offload_of(dense))
            shapes = shapes_of(self.model) if dense is None else dense
        # Where the text must be read, it is read once for the run as well.
        windows = None
        if self.recipe.reads_windows:
            with recorder.progress.stage(Stage.TOKENISE):
                cut = partial(self.dense.windows, cache=self.cache)
                at_hand = partial(self.dense.has_windows, cache=self.cache)
                windows = expected_windows(shapes, self.recipe.calibration, cut, at_hand)
        with recorder.progress.stage(Stage.ESTIMATE):
            found = expected(
                shapes,
                place,
                self.recipe,
                windows,
                self.evaluators.values(),
                self.cache,
                save_model=self.save_model,
                held=self.dense.held_bytes,
                known=self.dense.traced(self.model, place),
            )
            there = rooms(found, place, self.cache.folder, recorder.folder)
            rates = machine.known(self.cache.folder, place.device, shapes.module.dtype)
            seconds = {} if rates is None else {"seconds": seconds_of(found, rates)}
            recorder.update(cost={"estimated": found.to_dict() | seconds})
            for warning in warnings(found, there, self.cache.max_gb):
                recorder.progress.warn(warning)
            return None if self.ignore_estimate else too_large(there)

    def _compress(
        self, dense: LoadedModel, prepared: Preparation, recorder: Recorder
    ) -> tuple[Recipe, Preparation, CompressedModel]:
        """The recipe that the selection chose, its preparation, and the model that it makes."""
        workspace = Workspace(self.cache, recorder.progress)
        # Global generators start here, whether the work so far was done or taken from an earlier run.
        transformers.set_seed(self.seed)
        with recorder.progress.stage(Stage.COMPRESS):
            selected = select(dense, self.recipe, self.selection, prepared, workspace)
            recorder.update(selection=dict(selected.report))
            compressed = compress(dense, selected.recipe, workspace, selected.preparation)
        recorder.update(
            plan={**compressed.plan.to_dict(), "rounds": list(compressed.rounds)},
            update=dict(compressed.update),
            precision=dict(compressed.precision),
            size=measure_size(selected.preparation.dense, compressed, compressed.plan),
            provenance={**recorder.record.provenance, "calibration": dict(compressed.calibration)},
        )
        return selected.recipe, selected.preparation, compressed

    def _write_samples(self, dense: LoadedModel, compressed: LoadedModel, recorder: Recorder) -> None:
        """Records how both models continue the prompt; the dense model's text is shared by the points of a sweep."""
        sample = self.sample
        if sample is None or not sample.fits(dense):
            return
        with recorder.progress.stage(Stage.SAMPLE):
            known = self.dense.measurement(sample)
            before = sample.evaluate(dense) if known is None else known.metrics
            self.dense.measured(sample, before, recorder.record.run_id)
            after = sample.evaluate(compressed)
        texts = {"prompt": sample.prompt, "dense": before[TEXT], "compressed": after[TEXT]}
        recorder.update(sample=texts)

    def _report(self, objectives: Sequence[str], metrics: Mapping[str, Any], recorder: Recorder) -> Objective:
        """The objectives among metrics and sizes, recorded, as a sweeper takes them."""
        sizes = {names.metric(names.SIZE, name): value for name, value in recorder.record.size.items()}
        found = {**metrics, **sizes}
        values = {name: float(found[name]) for name in objectives}
        if isinstance(self.objective, tuple):
            recorder.update(objective=values)
            return tuple(values.values())
        value = next(iter(values.values()), None)
        recorder.update(objective=value)
        return value

    def _load(self, recorder: Recorder) -> LoadedModel:
        with recorder.progress.stage(Stage.LOAD):
            dense = self.dense.find(self.model)
            if dense is None:
                dense = self.model.load()
                self.dense.keep(self.model, dense, recorder.record.run_id)
        self.cache.model = str(dense.provenance.get("name", ""))
        model = {**dense.provenance, "loaded_by": self.dense.loaded_by}
        recorder.update(provenance={**recorder.record.provenance, "model": model})
        if unused := dense.provenance.get("unused_weights"):
            shown = ", ".join(unused[:3]) + (", ..." if len(unused) > 3 else "")
            recorder.progress.note(f"{len(unused)} weights of the checkpoint are not used by this model: {shown}")
        if odd := dense.provenance.get("odd_files"):
            recorder.progress.warn(f"the shards of the checkpoint: {odd} They are used as they are.")
        if not computes(dense.module.dtype, dense.device):
            recorder.progress.note(_slow(dense))
        return dense

    def _objectives(self, metrics: Mapping[str, Any], promised: Sequence[str]) -> tuple[str, ...]:
        """The metrics to return, checked on the dense model's, and on what is promised, before compression begins."""
        if self.objective is None:
            default = names.default_objective([*metrics, *promised])
            return () if default is None else (default,)
        numbers = [name for name, value in metrics.items() if isinstance(value, int | float)]
        known = [*numbers, *promised, *(names.metric(names.SIZE, name) for name in names.SIZES)]
        asked = (self.objective,) if isinstance(self.objective, str) else self.objective
        for name in asked:
            if name not in known:
                raise ConfigError(f"objective must be one of {', '.join(known)}, or a list of these, got {name!r}.")
        return asked

    def _analyse(self, preparation: Preparation, recipe: Recipe, recorder: Recorder) -> None:
        with recorder.progress.stage(Stage.ANALYSE):
            problem = measured_problem(preparation, recipe, Workspace(self.cache, recorder.progress))
            for path in self.analysis.save(problem, recorder.folder):
                recorder.progress.note(f"analysis: {path.name}")

    def _save(self, compressed: CompressedModel, dense: LoadedModel, recorder: Recorder) -> None:
        if not self.save_model:
            return
        with recorder.progress.stage(Stage.SAVE):
            carried = processor_files(dense.provenance)
            folder = save_model(compressed.module, dense.tokenizer, recorder.folder / MODEL_FOLDER, files=carried)
        files = file_sizes(folder)
        saved = sum(size for name, size in files.items() if name.endswith(".safetensors") and "/" not in name)
        recorder.update(
            size={**recorder.record.size, "saved_bytes": saved},
            model_folder=MODEL_FOLDER,
            provenance={**recorder.record.provenance, SAVED_FILES: files},
        )
        # Now, so that a model whose evaluation fails has a card, too. Whoever edits it does not change the model: its
        # size is not noted.
        self._write_card(recorder)

    def _write_card(self, recorder: Recorder) -> None:
        """README.md and recipe.yaml of the saved model, from what the record holds by now."""
        if self.card is not None and recorder.record.model_folder is not None:
            write_card(recorder.record, self.card, recorder.folder / recorder.record.model_folder)


@contextmanager
def _ends_no_run(progress: Progress) -> Iterator[None]:
    """An estimate that fails ends no run: the checks of the run say what is wrong with its settings, each in its place;
    of anything else, code of others included, a note tells."""
    try:
        yield
    except BsExpError:
        progress.go_on()
    except Exception as error:  # foreign code may look at values where there are none
        progress.go_on()
        reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]:.200}"
        progress.note(f"this run could not be estimated ({reason}); it goes on.")


def _check_shares(data: CalibrationData) -> None:
    """ConfigError if there is no batch of calibration windows for each process."""
    batches, windows = len(data.batches), len(data.windows.ids)
    if windows and batches < processes.count():
        raise ConfigError(
            f"calibration has {windows} windows in {batches} batches (calibration.batch_size={data.batch_size}), and "
            f"{processes.count()} processes were started. Start at most {batches}, or lower calibration.batch_size."
        )


def _quiet_libraries() -> None:
    """Silences the libraries' logs and bars, which would break the lines of the progress."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets_logging.set_verbosity_error()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)


def _tell_of_cache(cache: Cache, recorder: Recorder) -> None:
    if cache.damaged:
        kinds = ", ".join(f"{count} ({kind})" for kind, count in sorted(cache.damaged.items()))
        recorder.progress.note(
            f"damaged cache files were not used: {kinds}. What they held is computed again; is the disk in order?"
        )
    if cache.over:
        recorder.progress.note(
            f"the cache is {cache.over / 2**30:.2f} GiB above cache.max_gb={cache.max_gb:g}, since running processes "
            "use that much. Raise it, or lower the need with cache.dtype=float32."
        )


def _counts(cache: Cache) -> dict[str, dict[str, int]]:
    return {"hits": dict(cache.hits), "misses": dict(cache.misses), "damaged": dict(cache.damaged)}


def _free_memory() -> None:
    # Modules hold reference cycles: without a collection, the next run of a sweep would load beside this one's models.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _slow(dense: LoadedModel) -> str:
    """What a dtype costs on a CPU that has no instructions for it."""
    dtype = str(dense.module.dtype).removeprefix("torch.")
    if is_offloaded(dense.module):
        return f"this CPU has no instructions for {dtype}: blocks compute in float32, and what they give is rounded."
    return (
        f"this CPU has no instructions for {dtype}, so products take many times as long, gradients most of all: "
        "model.dtype=float32 is faster, and model.offload=disk computes in float32 block by block."
    )
