"""bs_exp in Python: the presets, options and defaults of the command line, for a model that may be in memory.

Settings are composed from the same option files, so nothing is typed twice; Hydra is left as it was found.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
from hydra import compose as compose_config
from hydra import initialize_config_dir
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from bs_exp import pipeline
from bs_exp.cli.arguments import for_hydra
from bs_exp.cli.conf_root import root_folder
from bs_exp.cli.config import build_cache, build_recipe, check_root, maker
from bs_exp.cli.explain import INTERNAL_KEYS, explain, list_options
from bs_exp.cli.points import plain_settings
from bs_exp.cli.recipe_file import run_recipe
from bs_exp.corpora.fitting import fitted
from bs_exp.corpora.given_texts import GivenTexts
from bs_exp.corpora.text_files import TextFiles
from bs_exp.errors import ConfigError, ModelError
from bs_exp.evaluation.size import measure_size
from bs_exp.models.auto_classes import AUTO_CLASSES, find_auto_class
from bs_exp.models.checkpoint import reading
from bs_exp.models.loading import assemble
from bs_exp.models.processor_files import loaded_from, processor_files
from bs_exp.models.saving import save_model
from bs_exp.models.surgery import is_factorised, twin
from bs_exp.models.upload import upload
from bs_exp.progress import Progress
from bs_exp.protocols import Corpus
from bs_exp.records.record import RunRecord
from bs_exp.records.stages import Stage
from bs_exp.reporting import formats
from bs_exp.runs.data_warnings import data_warnings
from bs_exp.runs.model_card import RunRecipe, write_card
from bs_exp.runs.recorder import new_record
from bs_exp.types import Architecture, LoadedModel, RankPlan, Spectrum, Task
from bs_exp.validation import shown
from bs_exp.workspace import Workspace

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Texts: TypeAlias = str | Path | Sequence[str]
"""Documents in memory, or the path of a text file."""
Metrics: TypeAlias = Mapping[str, Mapping[str, float | str]]
"""What `evaluate` found, of the models `dense` and `compressed`."""

# The option that judges a model of each task by its own loss, and its evaluator that does.
_EVALUATIONS = {
    Task.CAUSAL_LM: ("perplexity", "perplexity"),
    Task.MASKED_LM: ("encoder", "masked_perplexity"),
    Task.SEQ2SEQ_LM: ("seq2seq", "seq2seq_perplexity"),
}
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
# Takes the place of a file; the text itself is handed over.
_IN_MEMORY = "calibration.files=[given]"


class Loaded(NamedTuple):
    """A model and its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


@dataclass(frozen=True, eq=False, kw_only=True)
class Compression:
    """A compressed model and how it came about.

    `plan` has the groups with their ranks, `spectra` the singular values of every group in its metric and the loss of
    each component, `size` the counts of `measure_size`, `seconds` the time by stage. `record` and `recipe` are what
    the card of the saved model is made of.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    plan: RankPlan
    spectra: tuple[Spectrum, ...]
    size: Mapping[str, float]
    update: Mapping[str, Any] = field(default_factory=dict)
    precision: Mapping[str, Any] = field(default_factory=dict)
    calibration: Mapping[str, Any] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    record: RunRecord | None = None
    recipe: RunRecipe | None = None
    files: Mapping[str, Path] = field(default_factory=dict)

    def __repr__(self) -> str:
        stored, dense = (formats.size(self.size[name]) for name in ("bytes", "dense_bytes"))
        return (
            f"<Compression to {self.plan.requested_ratio:g}: {len(self.plan.groups)} groups, {stored} of {dense}; "
            "report() says more>"
        )

    def save(self, folder: str | Path, *, metrics: Metrics | None = None) -> Path:
        """The folder, which plain `from_pretrained` loads (`bs_exp.save_model`), with README.md and recipe.yaml.

        `metrics`, such as `{"dense": bs_exp.evaluate(..), "compressed": bs_exp.evaluate(..)}`, go into the table of
        README.md, where both models stand beside each other. `files` of the checkpoint that was compressed (of
        processors, and sentence-transformers' modules) are copied there.
        """
        _check_metrics(metrics)
        source = None if self.record is None else loaded_from(self.record.provenance["model"])
        written = save_model(self.model, self.tokenizer, folder, files=self.files, source=source)
        if self.record is not None and self.recipe is not None:
            write_card(replace(self.record, metrics=dict(metrics or {})), self.recipe, written)
        return written

    def push_to_hub(
        self, repo_id: str, *, metrics: Metrics | None = None, private: bool | None = None, token: str | None = None
    ) -> str:
        """Saves the model, with its card, and uploads all of it to ORG/NAME on the hub; returns the commit's address.

        Raises UploadError if the hub refuses.
        """
        with tempfile.TemporaryDirectory() as place:
            folder = self.save(Path(place, "model"), metrics=metrics)
            return upload(folder, repo_id, private=private, token=token)

    def report(self) -> str:
        """What was kept, the ranks by matrix type and layer (of experts the extremes), and the seconds by stage."""
        kept, whole = self.size["retain_ratio"], self.size["model_retain_ratio"]
        lines = [
            f"kept      {kept:.1%} of the targeted parameters (asked: {self.plan.requested_ratio:.1%}), "
            f"{whole:.1%} of the model; {formats.size(self.size['bytes'])} of {formats.size(self.size['dense_bytes'])}",
            f"loss      {self.plan.predicted_loss:.4g} predicted ({self.plan.groups[0].loss_unit.value})",
        ]
        by_type: dict[str, dict[str, list[int | None]]] = {}
        for planned in self.plan.groups:
            blocks = planned.group.blocks
            layers = "-".join(str(layer) for layer in dict.fromkeys((blocks[0], blocks[-1])))
            by_type.setdefault(planned.group.matrix, {}).setdefault(layers, []).append(planned.rank)
        lines += [
            f"{matrix:<9} {', '.join(f'{layers}: {_told(ranks)}' for layers, ranks in found.items())}"
            for matrix, found in by_type.items()
        ]
        lines.append(
            "seconds   " + ", ".join(f"{name} {value:.1f}" for name, value in self.seconds.items() if value >= 0.05)
        )
        return "\n".join([*lines, *(f"note      {note}" for note in self.notes)])

    def plot(self) -> Figure:
        """The share of the loss that is left at every rank, a line per group, beside the ranks of the plan."""
        from bs_exp.reporting.drawing import canvas, colour, house_style

        with house_style():
            figure = canvas(width=9.0)
            left, right = figure.subplots(1, 2)
            first: dict[str, int] = {}
            for spectrum in self.spectra:
                first.setdefault(spectrum.group.matrix, spectrum.group.layers[0])
            types = list(first)
            for spectrum in self.spectra:
                tail = spectrum.energies.flip(0).cumsum(0).flip(0)
                shares = (tail / tail[0].clamp_min(torch.finfo(tail.dtype).tiny)).tolist()
                place = types.index(spectrum.group.matrix)
                ranks = [rank / spectrum.group.full_rank for rank in range(len(shares))]
                label = spectrum.group.matrix if spectrum.group.layers[0] == first[spectrum.group.matrix] else None
                left.plot(ranks, shares, color=colour(place), linewidth=0.8, label=label)
            left.set(
                xlabel="rank, as a share of the full rank", ylabel="loss that is left", yscale="log", ylim=(1e-6, 1.0)
            )
            left.legend(fontsize="small")
            for planned in self.plan.groups:
                rank = planned.group.full_rank if planned.rank is None else planned.rank
                for layer in planned.group.blocks:
                    right.plot(layer, rank, "o", color=colour(types.index(planned.group.matrix)), markersize=4)
            right.set(xlabel="layer", ylabel="rank (dense: full rank)", ylim=(0, None))
            return figure


def compress(
    model: PreTrainedModel | str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    texts: Texts | None = None,
    *,
    data: str | Path | None = None,
    preset: str = "basis_sharing",
    retain_ratio: float = 0.8,
    overrides: Iterable[str] = (),
    cache_dir: str | Path | None = None,
    quiet: bool = False,
) -> Compression:
    """A model compressed by a preset of the command line; the given model stays as it is, untouched weights are shared.

    `model` is a model in memory (then with its `tokenizer`), a folder, or a name on the hub. It is calibrated on
    `texts`, or on the calibration part of `data` (`"wikitext2"`, a file, a folder), or as the preset says; `evaluate`
    judges on the other part of the same `data`. `overrides` are settings as the command line takes them
    (`"sharing.group_size=3"`). Windows longer than the model's context are shortened, which a note says. Statistics
    and decompositions are kept in `cache_dir`; None keeps them in memory for this call.
    Raises ConfigError for settings that do not exist or do not fit, ModelError and DataError for what cannot be read.
    """
    _check_given(model, tokenizer, texts, data)
    overrides = _settings(overrides)
    settings = [f"experiment={preset}", f"retain_ratio={retain_ratio}", "tracking=none", *_model_settings(model)]
    if texts is not None:
        settings += ["calibration=text", _IN_MEMORY, "calibration.num_sequences=all"]
    elif data is not None:
        settings.append(_data_setting(data))
    cfg = _compose([*settings, *overrides])
    check_root(cfg)
    make, progress = maker(cfg), Progress(quiet=quiet)
    recipe = build_recipe(cfg, make)
    if isinstance(model, PreTrainedModel):
        dense = _in_memory(model, tokenizer)
    else:
        with progress.stage(Stage.LOAD):
            dense = make("model").load()
    calibration: Any = recipe.calibration
    if texts is not None:
        calibration = replace(calibration, corpus=_corpus(texts))
    recipe = replace(recipe, calibration=calibration)
    for warning in data_warnings(dense, recipe, {}):
        progress.warn(warning)
    workspace = Workspace(build_cache(cfg, cache_dir, model=str(dense.provenance.get("name", "-"))), progress)
    workspace.cache.check()
    try:
        with torch.random.fork_rng():
            torch.manual_seed(cfg.seed)
            prepared = pipeline.prepare(dense, recipe, progress)
            made = pipeline.compress(dense, recipe, workspace, prepared)
    finally:
        workspace.cache.release()
    size = measure_size(prepared.dense, made, made.plan)
    config = _as_given(cfg, in_memory=isinstance(model, PreTrainedModel), texts=texts)
    record = replace(
        new_record(name=preset, config=plain_settings(config), config_hash="", folder=Path()),
        plan=made.plan.to_dict(),
        size=size,
        provenance={"model": dict(dense.provenance), "calibration": dict(made.calibration)},
    )
    return Compression(
        record=record,
        recipe=run_recipe(config, [*(s for s in settings if s != _IN_MEMORY), *overrides]),
        model=made.module,
        tokenizer=dense.tokenizer,
        plan=made.plan,
        spectra=made.spectra,
        size=size,
        update=made.update,
        precision=made.precision,
        calibration=made.calibration,
        seconds=dict(progress.timings),
        notes=tuple(progress.notes),
        files=processor_files(dense.provenance),
    )


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Mapping[str, Texts] | None = None,
    *,
    data: str | Path | None = None,
    tasks: Sequence[str] = (),
    overrides: Iterable[str] = (),
) -> dict[str, float | str]:
    """Metrics by name: the perplexity on each of the `texts` (`ppl/NAME`; of masked tokens `masked_ppl/NAME`, of an
    encoder-decoder's targets `seq2seq_ppl/NAME`), and the accuracy on `tasks` of lm-eval.

    `data` adds the evaluation part of a data set, a file or a folder (`ppl/wikitext2`, `ppl/text`), which `compress`
    does not calibrate on with the same `data`.

    Windows are as long as the option file says (`overrides=["evaluation.sequence_length=256"]`) or as the model's
    context, if that is shorter. Raises ConfigError if there is nothing to measure, or the model has no loss.
    """
    if texts is not None and not isinstance(texts, Mapping):
        raise ConfigError(f"evaluate takes texts by name, as in {{'val': texts}}, got {shown(texts)}.")
    overrides = _settings(overrides)
    loaded = _in_memory(model, tokenizer)
    if not texts and not tasks and data is None:
        raise ConfigError(
            "evaluate needs texts, as in {'val': texts}, data, as in data='wikitext2', or tasks, as in "
            "tasks=['arc_easy']."
        )
    found: dict[str, float | str] = {}
    if texts or data is not None:
        if loaded.task not in _EVALUATIONS:
            raise ConfigError(f"{type(model).__name__} has no head, and so no perplexity: compare its hidden states.")
        corpora = {name: _corpus(given) for name, given in (texts or {}).items()}
        option, evaluator = _EVALUATIONS[loaded.task]
        chosen = [f"evaluation={option}"]
        if data is not None:
            split = _compose([_data_setting(data)])
            read = maker(split)
            corpora |= {name: read(f"evaluation.corpora.{name}") for name in split.evaluation.corpora}
            # The windows of the option, as on the command line; other kinds of models have their own.
            chosen = [_data_setting(data), *(chosen if loaded.task is not Task.CAUSAL_LM else [])]
        cfg = _compose([*chosen, "tracking=none", *overrides])
        judge = maker(cfg)(f"evaluation.evaluators.{evaluator}")
        judge = fitted(replace(judge, corpora=corpora), loaded)
        judge.check(loaded)
        found |= judge.evaluate(loaded)
    if tasks:
        named = f"evaluation.tasks=[{','.join(tasks)}]"
        judge = maker(_compose(["evaluation=full", "tracking=none", named, *overrides]))(
            "evaluation.evaluators.accuracy"
        )
        judge.check(loaded)
        found |= judge.evaluate(loaded)
    return found


def load(folder: str | Path) -> Loaded:
    """The compressed (or dense) model of a folder, or of a name on the hub, in evaluation mode, and its tokenizer.

    Raises ModelError for a folder that is incomplete or damaged, ConfigError for a model of another kind.
    """
    on_the_hub = _HUB_NAME.fullmatch(str(folder)) and not Path(folder).parent.is_dir()
    if not Path(folder).is_dir() and not on_the_hub:
        raise ModelError(
            f"{folder} is no folder. Name one that bs_exp.save_model or save_pretrained wrote, or a model on the hub, "
            "as in ORG/NAME."
        )
    remedy = "Name a folder that bs_exp.save_model or save_pretrained wrote; copy it again if it is damaged."
    with reading("model", str(folder), lambda error: remedy):
        config = AutoConfig.from_pretrained(folder)
    auto = find_auto_class(config, own_code=False)
    if auto is None:
        raise ConfigError(f"{folder} is of no kind that bs_exp knows: model type {config.model_type!r}.")
    with reading("model", str(folder), lambda error: remedy):
        return Loaded(auto.loader.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder))


def strategy(option: str, **settings: Any) -> Any:
    """The strategy of an option file, such as `strategy("whitening=gram", ridge=1e-9)`: its defaults are the file's.

    Raises ConfigError for an option or a setting that does not exist.
    """
    group, sign, _ = option.partition("=")
    if not sign:
        raise ConfigError(f"strategy takes a group and one of its options, as in whitening=gram, got {option!r}.")
    cfg = _compose([option])
    node = cfg[group]
    for name, value in settings.items():
        if name not in node or name in INTERNAL_KEYS:
            known = [str(key) for key in node if key not in INTERNAL_KEYS]
            raise ConfigError(f"{option} has no setting {name}. {list_options('Settings', name, known)}")
        try:
            node[name] = value
        except OmegaConfBaseException as error:
            raise ConfigError(explain(error, [option])) from error
    return maker(cfg)(group)


def _told(ranks: Sequence[int | None]) -> str:
    """The rank of a group, or of all groups of a layer's experts."""
    numbers = sorted({rank for rank in ranks if rank is not None})
    told = [" to ".join(str(rank) for rank in dict.fromkeys((numbers[0], numbers[-1])))] if numbers else []
    return " or ".join([*told, *(["dense"] if None in ranks else [])])


def _compose(settings: Sequence[str]) -> DictConfig:
    try:
        with initialize_config_dir(str(root_folder() / "conf"), version_base="1.3"):
            return compose_config("config", list(settings))
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(explain(error, settings)) from error


def _as_given(cfg: DictConfig, *, in_memory: bool, texts: Texts | None) -> DictConfig:
    """The configuration for a recipe: what was in memory here has to be given as a folder or a file there."""
    config = cfg.copy()
    if in_memory:
        config.model = OmegaConf.load(root_folder() / "conf" / "model" / "local.yaml")
    if texts is not None:
        config.calibration.files = [str(texts)] if isinstance(texts, str | Path) else "???"
    return config


def _settings(overrides: Iterable[str]) -> list[str]:
    """The overrides, as a list; ConfigError for anything else, such as a single one."""
    if isinstance(overrides, str) or not isinstance(overrides, Iterable):
        raise ConfigError(f"overrides is a list of settings, as in ['sharing.group_size=3'], got {shown(overrides)}.")
    return list(overrides)


def _check_metrics(metrics: object) -> None:
    """ConfigError for metrics that the card would leave out: those of no model, or of another."""
    if metrics is None:
        return
    by_model = isinstance(metrics, Mapping) and all(isinstance(found, Mapping) for found in metrics.values())
    if not isinstance(metrics, Mapping) or not by_model or not set(metrics) <= {"dense", "compressed"}:
        raise ConfigError(
            "metrics holds what evaluate found of each model: {'dense': evaluate(..), 'compressed': evaluate(..)}, "
            f"got {shown(metrics)}."
        )


def _check_given(model: object, tokenizer: object, texts: Texts | None, data: str | Path | None) -> None:
    """ConfigError for what is in the wrong place, or would be ignored."""
    if not isinstance(model, PreTrainedModel | str | Path):
        raise ConfigError(
            "the first argument of compress is a model of Transformers, a folder or a name on the hub, got "
            f"{type(model).__name__}."
        )
    if isinstance(model, PreTrainedModel) and is_factorised(model):
        raise ModelError(
            f"this {type(model).__name__} is compressed already: compress the dense model that it was made from, or "
            "what bs_exp.to_dense makes of it."
        )
    if isinstance(tokenizer, str | Path | list | tuple):
        raise ConfigError(
            f"the second argument of compress is a tokenizer, got {shown(tokenizer)}. Texts are named: texts=..."
        )
    if texts is not None and data is not None:
        raise ConfigError("texts and data both name a text to calibrate on: leave one out.")


def _model_settings(model: PreTrainedModel | str | Path) -> list[str]:
    if isinstance(model, PreTrainedModel):
        return []
    return for_hydra([f"model={model}"])


def _data_setting(data: str | Path) -> str:
    """The setting of the command line; a path with its home folder, in quotes."""
    if not isinstance(data, str | Path):
        raise ConfigError(
            f"data must be the name of an option of conf/data, a file or a folder, got {shown(data)}. Give texts in "
            "memory as texts=[...]."
        )
    [setting] = for_hydra([f"data={data}"])
    return setting


def _in_memory(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> LoadedModel:
    """A twin in evaluation mode that shares all weights: modes, hooks and flags of the given model stay as they are."""
    if tokenizer is None:
        raise ConfigError("A model in memory needs its tokenizer: compress(model, tokenizer, texts).")
    name = type(model).__name__
    auto = next((auto for auto in AUTO_CLASSES if auto.has([name])), None)
    if auto is None:
        raise ConfigError(f"{name} is of no kind that can be compressed (model type {model.config.model_type!r}).")
    if is_factorised(model):  # judged, and not compressed again: no matrices are looked for
        nothing = Architecture(family=str(model.config.model_type), matrices=())
        return LoadedModel(twin(model).eval(), tokenizer, nothing, {"source": "memory", "name": name}, auto.task)
    return assemble(twin(model), tokenizer, None, source="memory", name=name, task=auto.task)


def _corpus(texts: Texts) -> Corpus:
    if texts == "":
        raise ConfigError("texts is an empty string: give the path of a file, or a list of texts.")
    return TextFiles(files=[str(texts)]) if isinstance(texts, str | Path) else GivenTexts(texts=texts)
