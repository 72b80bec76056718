"""README.md and recipe.yaml of a saved model: what it is, how good and how large, how it was made and is made again."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from bs_exp.errors import SaveError
from bs_exp.files import write_file
from bs_exp.models.licence import licence_files, licence_lines
from bs_exp.models.upload import PLACE
from bs_exp.printable import printable
from bs_exp.records.inputs import CODE
from bs_exp.records.record import RunRecord
from bs_exp.reporting import formats
from bs_exp.runs.terminal import MetricRow, metric_rows
from bs_exp.types import PlannedGroup, Task

CARD_FILE, RECIPE_FILE = "README.md", "recipe.yaml"
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_SIZES = (
    ("parameters", "dense_parameters", "parameters"),
    ("in the compressed matrices", "dense_targeted_parameters", "targeted_parameters"),
    ("bytes", "dense_bytes", "bytes"),
)


@dataclass(frozen=True, kw_only=True)
class RunRecipe:
    """What repeats a run.

    `render` gives the text of recipe.yaml, with the commit of the hub model that was used (None: as it was set).
    `settings` are what was set besides the defaults, `given` what whoever repeats it has to give, such as
    `model.path=PATH/TO/llama`. Neither holds a path of this machine.
    """

    render: Callable[[str | None], str]
    settings: tuple[str, ...] = ()
    given: tuple[str, ...] = ()

    def command(self, folder: str = PLACE) -> str:
        """The command that repeats the run, with the recipe that lies in a folder."""
        words = ["bs-exp", "--config-dir", folder, "--config-name", RECIPE_FILE.removesuffix(".yaml")]
        return shlex.join([*words, *self.given, "hydra.run.dir=OUT"])


@dataclass(frozen=True)
class _Use:
    """How a model of a task is called: its Auto class, its tag on the hub, and a few lines of code."""

    auto: str
    tag: str
    what: str
    code: str


_USES = {
    Task.CAUSAL_LM: _Use(
        "AutoModelForCausalLM",
        "text-generation",
        "writes text",
        'inputs = tokenizer("A text begins", return_tensors="pt")\n'
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=40)[0]))",
    ),
    Task.MASKED_LM: _Use(
        "AutoModelForMaskedLM",
        "fill-mask",
        "fills in masked words",
        'inputs = tokenizer(f"A word is {tokenizer.mask_token} here.", return_tensors="pt")\n'
        "best = model(**inputs).logits.argmax(-1)\n"
        "print(tokenizer.decode(best[inputs.input_ids == tokenizer.mask_token_id]))",
    ),
    Task.SEQ2SEQ_LM: _Use(
        "AutoModelForSeq2SeqLM",
        "text2text-generation",
        "reads a text and writes another",
        'inputs = tokenizer("A text to read", return_tensors="pt")\n'
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=40)[0], skip_special_tokens=True))",
    ),
    Task.ENCODER: _Use(
        "AutoModel",
        "feature-extraction",
        "gives hidden states",
        'inputs = tokenizer("A text to encode", return_tensors="pt")\n'
        "print(model(**inputs).last_hidden_state.mean(dim=1))",
    ),
}


def write_card(record: RunRecord, recipe: RunRecipe, folder: Path) -> None:
    """Writes README.md, recipe.yaml and the base model's licence texts into a saved model; SaveError if it cannot."""
    model = _model(record)
    revision = model.get("revision") if model.get("source") == "hub" else None
    try:
        write_file(folder / RECIPE_FILE, recipe.render(revision))
        write_file(folder / CARD_FILE, str(model_card(record, recipe)))
        for name, path in licence_files(model).items():
            shutil.copyfile(path, folder / name)
    except OSError as error:
        raise SaveError(f"Cannot write the card of the model in {folder}: {error}. Free some space.") from error


def model_card(record: RunRecord, recipe: RunRecipe) -> ModelCard:
    """The card of the model that a run made, from its record: metadata of the hub, and what people read."""
    model = _model(record)
    use = _USES[Task(model.get("task", Task.CAUSAL_LM))]
    preset = record.choices.get("experiment", record.name)
    licence: Any = licence_lines(model)
    data = ModelCardData(
        base_model=model["name"] if model.get("source") == "hub" else None,
        library_name="transformers",
        pipeline_tag=use.tag,
        tags=list(dict.fromkeys(["basis-sharing", "low-rank", "compression", preset])),
        datasets=_datasets(record) or None,
        **licence,
    )
    parts = (
        _title(record, preset, use),
        _loading(use),
        _table(record),
        _making(record, recipe, preset),
        _environment(record),
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n")


def _model(record: RunRecord) -> Mapping[str, Any]:
    found = record.provenance.get("model", {})
    return found if isinstance(found, Mapping) else {}


def _base(record: RunRecord) -> str:
    """The model that was compressed, without the place where it lay."""
    model = _model(record)
    name, source = printable(str(model.get("name", "a model"))), model.get("source")
    match source:
        case "hub":
            at = f" (commit `{model['revision']}`)" if model.get("revision") else ""
            return f"[{name}](https://huggingface.co/{name}){at}"
        case "local":
            return f"the model in the folder `{Path(name).name}`"
        case "memory":
            return f"a {name} in memory"
        case _:
            return f"the {source} model of bs_exp" if source else name


def _title(record: RunRecord, preset: str, use: _Use) -> str:
    size = record.size
    kept = f"{formats.percent(size['retain_ratio'])} of the parameters in its compressed matrices are kept"
    whole = f"{formats.percent(size['model_retain_ratio'])} of all"
    return (
        f"# {printable(preset)} at {record.config.get('retain_ratio', size['retain_ratio']):g} of "
        f"{_base(record).partition(' (commit')[0]}\n\n"
        f"A model that {use.what}: {_base(record)}, whose linear layers are stored as products of low-rank factors; "
        f"{kept}, {whole}. Made with [Basis Sharing](https://arxiv.org/abs/2410.03765) and what follows from it, by "
        f"the preset `{printable(preset)}` of bs_exp."
    )


def _loading(use: _Use) -> str:
    return (
        "## Load it\n\nWith transformers 5 alone; the folder brings the one file of code that it needs:\n\n"
        f"```python\nfrom transformers import AutoTokenizer, {use.auto}\n\n"
        f'tokenizer = AutoTokenizer.from_pretrained("{PLACE}")\n'
        f'model = {use.auto}.from_pretrained("{PLACE}", trust_remote_code=True)\n{use.code}\n```\n\n'
        "Where bs_exp is installed, `trust_remote_code` is not needed:\n\n"
        f"```python\nfrom transformers import AutoTokenizer, {use.auto}\n\n"
        f'tokenizer = AutoTokenizer.from_pretrained("{PLACE}")\n'
        f'model = {use.auto}.from_pretrained("{PLACE}")\n```\n\n'
        "`bs_exp.to_dense(model)` gives ordinary linear layers."
    )


def _table(record: RunRecord) -> str:
    rows = [*metric_rows(record)] if record.metrics.get("compressed") else []
    rows += [MetricRow(title, record.size.get(a), record.size[b]) for title, a, b in _SIZES if b in record.size]
    lines = ["## Dense and compressed", "", "| | dense | compressed | change |", "|---|---|---|---|"]
    lines += [f"| {' | '.join(cell.replace('|', '/') for cell in row.cells)} |" for row in rows]
    stderr = "± is one standard error. " if any(any(row.error) for row in rows) else ""
    measured = "" if record.metrics.get("compressed") else "Its quality was not measured. "
    return "\n".join([*lines, "", f"{stderr}{measured}Bytes are those of the tensors, each stored once."])


def _making(record: RunRecord, recipe: RunRecipe, preset: str) -> str:
    dials = " ".join(f"`{printable(setting)}`" for setting in recipe.settings)
    lines = ["## How it was made", "", f"Preset `{printable(preset)}`" + (f"; set besides: {dials}." if dials else ".")]
    plan = record.rank_plan
    if plan is not None:
        bits = record.precision.get("bits")
        stored = f" The matrices of all groups are stored in {bits} bits." if isinstance(bits, int) else ""
        lines += ["", f"Layout {plan.layout}. {_ranks(plan.groups)}{stored}"]
    lines += ["", f"`{RECIPE_FILE}` holds every setting. The same again, with the same versions to the bit:", ""]
    lines += ["```sh", recipe.command(), "```"]
    if recipe.given:
        lines += ["", "What stands as `PATH/TO/...` has to be given: it lay on the machine where this was made."]
    if code := record.provenance.get(CODE):
        names = ", ".join(f"`{printable(str(name))}`" for name in code)
        lines += ["", f"It takes code that is not part of bs_exp, to be found on PYTHONPATH: {names}."]
    return "\n".join(lines)


def _ranks(groups: Sequence[PlannedGroup]) -> str:
    by_type: dict[str, list[int]] = {}
    dense = sum(planned.rank is None for planned in groups)
    for planned in groups:
        if planned.rank is not None:
            by_type.setdefault(planned.group.matrix, []).append(planned.rank)
    ranks = (
        f"{matrix} {min(found)}" + (f" to {max(found)}" if min(found) < max(found) else "")
        for matrix, found in by_type.items()
    )
    shared = sum(planned.group.size > 1 and planned.rank is not None for planned in groups)
    return (
        f"Ranks: {', '.join(ranks) or 'none'}. {len(groups)} groups, {shared} of them with a basis that layers share, "
        f"{dense} left dense."
    )


def _environment(record: RunRecord) -> str:
    hardware, versions = record.hardware, {k: v for k, v in record.versions.items() if v}
    machine = [f"{hardware['cpu']}, {hardware.get('cpu_cores')} cores"] if hardware.get("cpu") else []
    machine += [f"{gpu['name']} ({formats.size(gpu['memory_bytes'])})" for gpu in hardware.get("gpus", ())]
    seeds = ", ".join(f"{name} {value}" for name, value in _seeds(record))
    commit = (record.source or {}).get("commit")
    lines = ["## Where", "", f"- hardware: {printable('; '.join(machine)) or 'not known'}"]
    lines += [f"- versions: {printable(', '.join(f'{name} {value}' for name, value in versions.items()))}"]
    lines += [f"- bs_exp at commit `{commit}`"] if commit else []
    return "\n".join([*lines, f"- seeds: {seeds}"])


def _seeds(record: RunRecord) -> Iterator[tuple[str, Any]]:
    yield "run", record.config.get("seed")
    for group in ("calibration", "allocation", "update", "evaluation"):
        node = record.config.get(group)
        if isinstance(node, Mapping) and "seed" in node:
            yield group, node["seed"]


def _datasets(record: RunRecord) -> list[str]:
    """Names on the hub of the data sets that the model was calibrated on."""
    corpus = record.provenance.get("calibration", {}).get("corpus", {})
    path = corpus.get("path") if isinstance(corpus, Mapping) and corpus.get("corpus") == "hub" else None
    return [path] if isinstance(path, str) and _HUB_NAME.fullmatch(path) and not Path(path).exists() else []
