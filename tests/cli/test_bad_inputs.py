"""A catalogue of bad inputs to the command line: each ends with one message that says what, the value, and what to do.

A row is `ARGUMENTS => FRAGMENT | FRAGMENT`; the message must hold every fragment, and the key of the row's last
argument. `{w}` is the folder of the files that `world` holds. Rows below `---` are left to CI, as slow tests are.
"""

from __future__ import annotations

import gc
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra._internal.hydra import Hydra
from safetensors.torch import load_file, save_file

from bs_exp.models.tiny import byte_tokenizer, tiny_random

Cli = Callable[..., Any]

ROOT = """
sed=1 => does not exist | Did you mean seed? | retain_ratio
retain_ratios=0.5 => does not exist | Did you mean retain_ratio?
+new=3 => does not exist | Keys there
sweep=demo => sweep does not exist. Did you mean sweeps?
experiments=svd => experiments does not exist. Did you mean experiment?
ratio=0.8 => Did you mean retain_ratio? Settings and groups: allocation
output_dir=OUT => Did you mean hydra.run.dir?
device=cuda => Did you mean model.device?
dataset=x => Did you mean data?
data=[A.txt,B.txt] => and no list | calibration.files=[A.txt,B.txt]
model=[A,B] => and no list | --multirun model=A,B
foo=1 => foo does not exist. Settings and groups: allocation
reports x => 'reports' is no command. Did you mean report? Commands: cache, demo, estimate, export
compress => 'compress' is no command. Commands: cache
experiment=best_without => experiment=best_without/.. has natural_gradient, pivoted, steps
seed=-1 => at least 0, got -1
seed=4294967296 => at most 4294967295, got 4294967296
seed=1.5 => a whole number, got 1.5
seed=1e400 => a whole number, got inf
seed=abc => 'abc' | a whole number
seed=null => must not be null | seed=VALUE
retain_ratio=0 => above 0 and at most 1 | got 0
retain_ratio=-0.5 => above 0 and at most 1 | got -0.5
retain_ratio=20 => above 0 and at most 1 | got 20 | retain_ratio=0.8
retain_ratio=inf => above 0 and at most 1 | got inf
retain_ratio=nan => above 0 and at most 1 | got nan
retain_ratio=abc => 'abc' | a number
retain_ratio=null => must not be null
retain_ratio=[1] => [1] | a number
objective=5 => a list of names, or null | got 5
objective=[5] => a list of names, or null | got [5]
objective=[a,a] => several different ones | got ['a', 'a']
objective=[] => several different ones | got []
objective={a:1} => a list of names, or null | got {a: 1}
save_model=maybe => 'maybe' | bool
save_model=null => must not be null
force=x => 'x' | bool
name=null => must not be null
name=[a] => ['a']
name=../../x => a plain name | '../../x' | hydra.run.dir=DIR
name=/x => a plain name | '/x'
name='' => a plain name | ''
cache.dir=[a] => ['a']
cache.dirr=x => does not exist | Did you mean dir?
cache=5 => value: 5
evaluation.parts=5 => a list of names or null, got 5 | Parts: perplexity
evaluation.parts=[speed] => speed | Parts: perplexity
evaluation.evaluators=null => a mapping of names to evaluators, got null
hydra.run.dir=null => must not be null
model=dmo => model=dmo does not exist | Did you mean demo?
layout=null => layout=null | Options of layout: pivoted, plain
layout= => layout= does not exist | pivoted, plain
precision=8 => precision=8 does not exist. Did you mean int8? Options of precision: int3, int4, int8, none
layout=1 => layout=1 does not exist | Options of layout: pivoted, plain
~model => a group needs one of its options | tiny_random
~layout => must be set | layout=VALUE
sharing=sharing => sharing=sharing does not exist | clustered
experiment=svdllm => does not exist | Did you mean svd_llm?
experiment=null => Options of experiment | svd_llm
sweeps=nope => does not exist | Options of sweeps
calibration=text => calibration.files must be set
evaluation=text => evaluation.files must be set
model=local => model.path must be set | model.path=VALUE
model=hub => model.name must be set
calibration.num_sequence=3 => does not exist | Did you mean num_sequences?
sharing=none sharing.size=3 => does not exist in sharing=none | Keys there: none
calibratoin.seed=3 => calibratoin does not exist | Did you mean calibration?
retain_ratio=0.5,0.6 => --multirun
retain_ratio=0,8 => For one number, with a point: retain_ratio=0.8 | --multirun
experiment=best sharing.group_size=3 => does not exist in sharing=none | sharing=paper
experiment=best,svd => experiment=best,svd names several values | bs-exp --multirun (-m) experiment=best,svd
seed => 'seed' | key=value
=5 => '=5' | its key is missing
seed=[ => is not understood | stands in quotes
cache.dir=/tmp/a(b => "cache.dir='/tmp/a(b'"
"""

STRATEGIES = """
sharing.group_size=null => a whole number or a mapping of names to whole numbers, got null
sharing.group_size=99999999999999999999 => a whole number | At most 9223372036854775807 | got 99999999999999999999
sharing=clustered sharing.subspace=x => a whole number of directions | got 'x'
sharing=criterion sharing.squared=5 => true or false, got 5
sharing=explicit sharing.layers=5 => {q: [[0, 1], [2, 5]]} | got 5
sharing=heads sharing.heads_per_block=x => a number, kv or all, got 'x'
sharing=optimal sharing.g_max=0 => at least 1, got 0
sharing=residual sharing.residual_rank=-1 => at least 0, got -1
whitening.ridge=x => at least 0 and below 1, got 'x'
whitening=diagonal whitening.alpha=null => a number, got null
whitening=block_diagonal whitening.blocks=null => a whole number, got null
whitening=two_sided whitening.temper=2 => between 0 and 1 | got 2
whitening=fisher_rows whitening.ridge=0 => above 0 and at most 1, got 0
importance=channel importance.p=2 => at least 0 and below 1, got 2
importance=soft_channel importance.temperature=0 => at least 1e-06, got 0
importance=adaptive_channel importance.by=moon => spectrum, kurtosis, sensitivity, got 'moon'
allocation=bayesopt allocation.trials=x => a whole number | got 'x'
allocation=bayesopt allocation.warm_starts=null => a mapping of names to strategies | got null
allocation=bayesopt allocation.warm_starts.uniform=5 => a strategy | got 5
allocation=bayesopt allocation.warm_starts.uniform.fill=x => true or false, got 'x'
allocation=bayesopt allocation.storage=5 => text or null, got 5 | "allocation.storage='5'"
allocation=manual allocation.by_layer=5 => a list of numbers or null, got 5
allocation=smooth allocation.smoothness=-1 => at least 0 | got -1
allocation=sensitivity allocation.ratios=null => a list of numbers, got null
allocation=effective_rank allocation.beta=5 => at least 0 and below 1, got 5
allocation=dipsvd_heuristic allocation.sign=minus => paper, code, got 'minus'
allocation=water_filling allocation.multiple=1.5 => a whole number | got 1.5
allocation=water_filling allocation.layer_bounds={a:[0,1]} => layers by their numbers | got 'a'
allocation=loss_threshold allocation.max_loss=x => a number or null, got 'x'
allocation=uniform allocation.fill=5 => true or false, got 5
schedule=steps schedule.size=[0.1] => above 0 and at most 1, got [0.1]
schedule=adaptive_steps schedule.max_loss=0 => above 0, got 0
selection=measured selection.candidates=5 => a mapping, got 5
selection=measured selection.holdout=0 => above 0
selection=measured selection.objective=beauty => cosine, perplexity, kl, got 'beauty'
selection=measured selection.seed=x => a whole number | got 'x'
update=recover update.steps=null => a whole number, got null
update=lora update.alpha=x => a finite number above 0, got 'x'
update=refit update.mode=twice => one_shot, sequential, got 'twice'
update=refit_recover update.updates=5 => a mapping of names | got 5
update=refit_recover update.updates.recover=5 => got 5
update=refit_recover update.updates.recover.steps=-1 => at least 0, got -1
analysis=sharing_pays analysis.figures=[gif] => svg, png, got 'gif'
tracking=wandb tracking.timeout=x => a number, got 'x'
tracking=wandb tracking.timeout=null => a number, got null
tracking=wandb tracking.timeout=0 => above 0 seconds, got 0
evaluation=full evaluation.limit='5' => a number or null, got '5'
evaluation=full evaluation.limit=0 => positive | got 0
evaluation=full evaluation.tasks=5 => a list of names, got 5
evaluation=full evaluation.throughput_batch_size=0 => at least 1, got 0
evaluation.sequence_length=null => a whole number, got null
evaluation.stride=9999 => at most sequence_length (64), got 9999
evaluation=perplexity evaluation.corpora.python_docs.split=tuesday => heldout, calibration, train, got 'tuesday'
evaluation=similarity evaluation.mask_share=0 => above 0 and below 1, got 0
calibration.num_sequences=some => a whole number | all | got 'some'
calibration.batch_size=null => a whole number, got null
calibration.seed=null => a whole number, got null
calibration.seed=99999999999999999999999999 => at most 4294967295
model.family=lama => llama | got 'lama'
model=local model.path=5 => text, got 5 | "model.path='5'"
model=hub model.name=null => text, got null
---
sharing.group_size=0 => at least 1, got 0
sharing.group_size=-1 => at least 1, got -1
sharing.group_size=1e3 => a whole number | got 1000.0
sharing.group_size=true => a whole number | got true
sharing.group_size={q:0} => sharing.group_size.q must be | at least 1, got 0
sharing.group_size={q:x} => sharing.group_size.q must be | got 'x'
sharing.group_size={down:2} => down | list the type there too
~sharing.group_size => must be set | AdjacentSharing
+sharing.size=3 => does not exist | Settings there: group_size, matrices
sharing.matrices=null => a list of names, got null
sharing.matrices=[] => is empty | sharing=none
sharing.matrices=[q,q] => names q twice
sharing.matrices=[5] => a list of names | got [5]
sharing.matrices=q => a list of names | got 'q'
sharing._target_=null => the import path of its class
sharing._target_=foo.Bar => foo.Bar | No module named 'foo'
sharing._target_=bs_exp.sharing.adjacent.Nope => Nope
sharing._target_=5 => the import path of its class
sharing=clustered sharing.linkage=foo => average, complete, single, got 'foo'
sharing=clustered sharing.max_distance=x => a number or null, got 'x'
sharing=clustered sharing.clusters=1.5 => a whole number | got 1.5
sharing=clustered sharing.adjacent_only=maybe => true or false, got 'maybe'
sharing=criterion sharing.norm=null => frobenius, whitened, output, got null
sharing=explicit sharing.layers={q:[[0,0]]} => sharing.layers.q names layer 0 twice
sharing=explicit sharing.layers={q:[[x]]} => sharing.layers | [['x']]
sharing=heads sharing.heads_per_block=null => got null
sharing=residual sharing.residual_rank=null => a whole number, got null
whitening.ridge=null => at least 0 and below 1, got null
whitening.ridge=nan => at least 0 and below 1, got nan
whitening.ridge=inf => at least 0 and below 1, got inf
whitening.ridge=-1e-9 => at least 0 and below 1, got -1e-09
whitening=diagonal whitening.size=median => mean, max, got 'median'
whitening=diagonal whitening.epsilon=0 => at least 1e-12, got 0
importance=channel importance.a=inf => a finite number of at least 1, got inf
importance=channel importance.form=three_sided => one_sided, two_sided, got 'three_sided'
importance=adaptive_channel importance.a_min=null => a number, got null
allocation=bayesopt allocation.trials=null => a whole number, got null
allocation=bayesopt allocation.sampler=moon => gp, tpe, cmaes, got 'moon'
allocation=bayesopt allocation.min_ratio=x => a number, got 'x'
allocation=bayesopt allocation.min_ratio=2 => 0 < min_ratio < max_ratio <= 1
allocation=bayesopt allocation.unit=galaxy => block, matrix, got 'galaxy'
allocation=bayesopt allocation.num_windows=0 => at least 1, got 0
allocation=bayesopt allocation.seed=-1 => at least 0, got -1
allocation=manual allocation.by_layer=[] => is empty
allocation=manual allocation.by_layer=[1,x] => got 'x'
allocation=manual allocation.by_type=5 => a mapping of names to numbers or null, got 5
allocation=manual allocation.by_type.q=x => a number, got 'x'
allocation=manual allocation.by_depth=[nan] => finite numbers | got nan
allocation=smooth allocation.relative=null => true or false, got null
allocation=sensitivity allocation.ratios=[2] => above 0 and below 1 | got [2]
allocation=sensitivity allocation.ratios=[x] => a list of numbers, got ['x']
allocation=water_filling allocation.layer_bounds=5 => {0:[0.9,1.0]} | got 5
allocation=water_filling allocation.layer_bounds={0:[1]} => a list of 2 numbers, got [1]
allocation=loss_threshold allocation.max_loss=-1 => above 0 | got -1
update=recover update.batch_size=0 => at least 1, got 0
update=recover update.optimizer=sgd => adamw, soap, got 'sgd'
update=recover update.learning_rate=inf => a finite number above 0, got inf
update=recover update.prompt_length=null => a whole number, got null
update=lora update.dropout=1 => at least 0 and below 1, got 1
update=lora update.data=5 => a strategy | or null, got 5
update=lora update.matrices=q => [q, v] | got 'q'
update=lora update.merge=5 => true or false, got 5
update=refit update.gram=null => group, layer, got null
analysis=sharing_pays analysis.matrices=5 => a list of names or null, got 5
tracking=wandb tracking.project=5 => text, got 5 | "tracking.project='5'"
tracking=wandb tracking.tags=5 => a list of names, got 5
tracking=wandb tracking.mode=sometimes => auto, online, offline, disabled, got 'sometimes'
evaluation=full evaluation.tasks=[] => is empty
evaluation=full evaluation.include_path=[/nowhere] => /nowhere
evaluation=full evaluation.seed=-1 => at least 0, got -1
evaluation.sequence_length=1 => at least 2, got 1
evaluation.tail=half => drop, keep, got 'half'
evaluation.batch_size=null => a whole number, got null
evaluation.special_tokens=maybe => false or per_window, got 'maybe'
evaluation.corpora=5 => a mapping of names to strategies | got 5
evaluation.corpora.text=null => a strategy | got null
evaluation=perplexity evaluation.corpora.python_docs.packages=5 => a list | got 5
calibration.num_sequences=null => a whole number or all, got null
calibration.sequence_length=0 => at least 1, got 0
calibration.order=backwards => sequential, random, got 'backwards'
calibration.mask_share=x => a number, got 'x'
calibration.corpus=5 => a strategy | got 5
calibration.set=null => got null
calibration.files=5 => a list of names, got 5
calibration.files=[] => is empty
model.layers=null => a whole number | got null
model.layers=true => a whole number, got true
model.dtype=int4 => float32, float16, bfloat16, auto, got 'int4'
model.device=moon => auto, cpu, cuda | got 'moon'
model.device=cuda:99 => 'cuda:99' | model.device=cpu
model.roles=5 => {q_proj: q} | got 5
"""

TEXTS = """
calibration.files=[{w}/absent.txt] => absent.txt does not exist | must name text files
calibration.files=[{w}/empty.txt] => empty.txt holds no text
calibration.files=[{w}/binary.txt] => binary.txt is a binary file | UTF-8
calibration.files=[{w}/wrong.json] => wrong.json | not JSON
calibration.files=[{w}/other.jsonl] => other.jsonl, line 1 | 'text' | content | calibration.corpus.field=NAME
calibration.files=[{w}/loop.txt] => loop.txt
calibration.files=[{w}/short.txt] => too short for one window | 64 needed
whitening=two_sided calibration.sequence_length=1 => sequence_length
---
calibration.files=[{w}/blank.txt] => blank.txt holds no text
calibration.files=[{w}/latin.txt] => latin.txt is not UTF-8 | 0xfc
calibration.files=[{w}/table.csv] => .csv are not read
calibration.files=[{w}/cut.gz] => cut.gz
calibration.files=[{w}/line2.jsonl] => line2.jsonl, line 2 | not JSON
calibration.files=[{w}/number.jsonl] => number.jsonl, line 1 | int
calibration.files=[{w}/half.jsonl] => half.jsonl, line 1 | half of a surrogate pair
calibration.files=[{w}/list.jsonl] => list.jsonl, line 1 | expected an object
calibration.files=[{w}/folder.txt] => folder.txt cannot be read (a folder)
calibration.files=[{w}/pipe.txt] => pipe.txt cannot be read (no regular file)
calibration.num_sequences=100000 => 100,000 windows
evaluation.files=[{w}/absent.txt] => absent.txt does not exist
evaluation.files=[{w}/short.txt] => too short for one window
"""

MODELS = """
model.path={w}/absent => absent | must name a folder
model.path={w}/config_cut => config_cut | config.json
model.path={w}/no_tokenizer => no_tokenizer | tokenizer
model.path={w}/weights_cut => weights_cut
model.path={w}/wrong_shapes => wrong_shapes | k_proj
model.path={w}/unused_weights => unused_weights | up_proj.bias | allow_unused
model.path={w}/unknown_type => unknown_type | warp_drive
model.path={w}/quantised => quantised
model.path={w}/loop => loop | leads back to itself
model.path={w}/dense model.attn_implementation=moon => moon
---
model.path={w}/empty.txt => empty.txt
model.path={w}/no_config => no_config | config.json
model.path={w}/config_list => config_list
model.path={w}/no_weights => no_weights
model.path={w}/weights_text => weights_text
model.path={w}/missing_weights => missing_weights | layers.1.mlp.up_proj
model.path='~nobody1/x' => ~ | in full
model.path={w}/dense model.dtype=float99 => got 'float99'
model.path={w}/dense model.roles={q_proj:v} => roles
"""

FOLDERS = """
hydra.run.dir={w}/empty.txt => cannot write | empty.txt | hydra.run.dir=DIR
hydra.run.dir={w}/empty.txt/x => cannot write | empty.txt
hydra.run.dir={w}/loop_out/x => loop_out
hydra.run.dir=/proc/nowhere => cannot write | /proc/nowhere
cache.dir={w}/empty.txt => empty.txt | cache.dir
cache.dir={w}/empty.txt/x => empty.txt | cache.dir
cache.dir=/proc/nowhere => /proc/nowhere | cache.dir
"""

RECORDS = """
report {w}/absent => absent
report {w}/no_records => no_records
report {w}/empty.txt => empty.txt
report {w}/record_cut => record_cut
report {w}/record_list => record_list
report {w}/record_foreign => record_foreign
report {w}/record_binary => record_binary
report {w}/record_folder => record_folder
report {w}/loop => loop
figures {w}/absent => absent
report => FOLDER
reprot {w} => reprot
"""

SWEEPS = """
-m retain_ratio=range(0) => no points: retain_ratio=range(0)
-m sharing.groupsize=1,2 => sharing.groupsize | Did you mean group_size?
-m retain_ratio=2,3 => retain_ratio must be | got 2
-m retain_ratio=0.5,0.6 name=../../x => a plain name | '../../x'
-m hydra/sweeper=optuna whitening.ridge=interval(0.1,0.2) name=../../x => a plain name | '../../x'
-m whitening=gram,moon => whitening=moon | identity
-m hydra/sweeper=moon => moon
-m hydra/launcher=moon => moon
-m hydra/sweeper=optuna hydra/sweeper/sampler=moon retain_ratio=interval(0.5,0.9) => moon | tpe
-m hydra/sweeper=optuna => parameter
-m hydra/sweeper=optuna retain_ratio=interval(0.9,0.5) => retain_ratio
-m hydra/sweeper=optuna retain_ratio=interval(0.5,0.9) hydra.sweeper.n_trials=0 => n_trials | 0
-m hydra/sweeper=optuna retain_ratio=interval(0.5,0.9) hydra.sweeper.n_trials=x => n_trials | x
-m hydra/sweeper=optuna retain_ratio=interval(0.5,0.9) hydra.sweeper.n_trials=null => n_trials
-m hydra/sweeper=optuna retain_ratio=interval(0.5,0.9) hydra.sweeper.n_jobs=0 => n_jobs | 0
-m hydra/sweeper=optuna retain_ratio=interval(0.5,0.9) hydra.sweeper.direction=up => direction | up | minimize
-m hydra/sweeper=optuna retain_ratio=interval(0.5,0.9) hydra.sweeper.direction=5 => direction | 5
-m hydra/sweeper=optuna retain_ratio=interval(0.5,0.9) hydra.sweeper.max_failure_rate=2 => max_failure_rate | 2
-m hydra/sweeper=optuna retain_ratio=interval(0.5,0.9) hydra.sweeper.storage={w}/empty.txt/x => empty.txt
-m hydra/sweeper=optuna retain_ratio=interval(0.5,0.9) hydra.sweeper.sampler.seed=x => seed
-m hydra/sweeper=optuna retain_ratios=interval(0.5,0.9) => retain_ratios
-m hydra/sweeper=optuna hydra/sweeper/sampler=grid retain_ratio=interval(0.5,0.9) => BruteForceSampler | step
"""

_GROUPS = {
    "model": ("model=tiny_random",),
    "calibration": (
        "calibration=text",
        "calibration.files=[{w}/text.txt]",
        "calibration.num_sequences=4",
        "calibration.sequence_length=64",
    ),
    "evaluation": ("evaluation=text", "evaluation.files=[{w}/text.txt]", "evaluation.sequence_length=64"),
    "tracking": ("tracking=none",),
}
_BIAS = "model.layers.0.mlp.up_proj.bias"
_MOST_LINES, _MOST_CHARACTERS = 24, 1000
# Seconds of this process for a setting that needs no model.
_BUDGET = 3.0


def rows(table: str) -> list[Any]:
    found = []
    marks: list[pytest.MarkDecorator] = []
    for line in table.strip().splitlines():
        if line == "---":
            marks = [pytest.mark.slow]
            continue
        arguments, _, fragments = line.partition("=>")
        found.append(pytest.param(arguments.split(), fragments.strip().split(" | "), id=arguments.strip(), marks=marks))
    return found


def test_the_catalogue_is_large() -> None:
    tables = (ROOT, STRATEGIES, TEXTS, MODELS, FOLDERS, RECORDS, SWEEPS)
    listed = [row for table in tables for row in rows(table)]
    assert len(listed) >= 280 and len({row.id for row in listed}) == len(listed)
    assert sum(not row.marks for row in listed) >= 150


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Files, models and records that are wrong, each in its own way."""
    import bs_exp.runs.experiment  # noqa: F401  (its imports are nobody's time)

    folder = tmp_path_factory.mktemp("w")
    _build_texts(folder)
    _build_models(folder)
    _build_records(folder)
    # Runs collect garbage; they need not walk through all libraries for it, several hundred times.
    gc.collect()
    gc.freeze()
    yield folder
    gc.unfreeze()


@pytest.fixture(autouse=True)
def composing_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hydra composes everything a first time to learn `hydra.mode`, which here only files of sweeps set.

    That is two fifths of the time of a row. What it would say of a wrong setting it keeps to itself.
    """
    ask = Hydra.get_mode

    def get_mode(self: Hydra, config_name: str | None, overrides: list[str]) -> Any:
        may_set = any(override.startswith(("sweeps=", "hydra.mode=")) for override in overrides)
        return ask(self, config_name, overrides) if may_set else None

    monkeypatch.setattr(Hydra, "get_mode", get_mode)


def _build_texts(folder: Path) -> None:
    (folder / "text.txt").write_text("the model reads a text and learns which word may follow another. " * 60)
    contents: dict[str, bytes] = {
        "empty.txt": b"",
        "blank.txt": b" \n\n ",
        "binary.txt": b"text\0text",
        "latin.txt": "für".encode("latin-1"),
        "table.csv": b"a,b\n1,2\n",
        "cut.gz": b"\x1f\x8b\x08\x00",
        "wrong.json": b"[{'text': 1}]",
        "line2.jsonl": b'{"text": "a"}\n{"text": \n',
        "other.jsonl": b'{"content": "a"}\n',
        "number.jsonl": b'{"text": 5}\n',
        "half.jsonl": b'{"text": "\\ud83d"}\n',
        "list.jsonl": b"[1, 2]\n",
        "short.txt": b"short",
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    (folder / "folder.txt").mkdir()
    os.mkfifo(folder / "pipe.txt")
    for name in ("loop", "loop.txt", "loop_out"):
        (folder / name).symlink_to(folder / name)


def _build_models(folder: Path) -> None:
    dense = folder / "dense"
    tiny_random().module.save_pretrained(dense)
    byte_tokenizer().save_pretrained(dense)

    def variant(name: str) -> Path:
        return Path(shutil.copytree(dense, folder / name))

    (variant("no_config") / "config.json").unlink()
    (variant("config_cut") / "config.json").write_text('{"model_type": ')
    (variant("config_list") / "config.json").write_text("[1]")
    for path in variant("no_tokenizer").glob("*token*"):
        path.unlink()
    (variant("no_weights") / "model.safetensors").unlink()
    weights = variant("weights_cut") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    (variant("weights_text") / "model.safetensors").write_text("hello")
    changes: dict[str, Callable[[dict[str, Any]], object]] = {
        "missing_weights": lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"),
        "unused_weights": lambda tensors: tensors.update({_BIAS: tensors["model.norm.weight"].clone()}),
    }
    for name, change in changes.items():
        path = variant(name) / "model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, {"format": "pt"})
    settings: dict[str, dict[str, Any]] = {
        "wrong_shapes": {"num_key_value_heads": 1},
        "unknown_type": {"model_type": "warp_drive"},
        "quantised": {"quantization_config": {"quant_method": "gptq", "bits": 4}},
    }
    for name, changed in settings.items():
        path = variant(name) / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changed))


def _build_records(folder: Path) -> None:
    contents = {
        "record_cut": b'{"name": "x", ',
        "record_list": b"[1, 2]",
        "record_foreign": b'{"loss": 3.5}',
        "record_binary": b"\xff\xfe\0",
    }
    for name, content in contents.items():
        (folder / name).mkdir()
        (folder / name / "record.json").write_bytes(content)
    (folder / "record_folder" / "record.json").mkdir(parents=True)
    (folder / "no_records").mkdir()


def refused(cli: Cli, world: Path, arguments: list[str], fragments: list[str], base: dict[str, Any]) -> str:
    """Runs the arguments on top of a small run, and checks what is said of them; returns that."""
    chosen = {argument.partition("=")[0] for argument in arguments}
    settings = [setting for group, given in base.items() if group not in chosen for setting in given]
    done = cli(*(argument.replace("{w}", str(world)) for argument in (*settings, *arguments)))
    said = str(done.err)
    assert done.status != 0, said
    message = said[max(said.find("error:"), 0) :]
    for part in fragments:
        assert part in message, message
    # Stages that went well come before the message; the list of a group's options may be long.
    lines = message.splitlines()
    assert len(lines) <= _MOST_LINES and all(len(line) <= _MOST_CHARACTERS for line in lines), message
    assert "Traceback" not in said and "unexpected " not in message, message
    assert not re.search(r"<[\w.]+ object at|<class '|0x[0-9a-f]{8}", message), message
    return message


def _key(argument: str) -> str:
    return argument.lstrip("+~").partition("=")[0].partition("[")[0]


@pytest.mark.parametrize(("arguments", "fragments"), rows(ROOT))
def test_settings_of_the_root(
    cli: Cli, world: Path, tmp_path: Path, arguments: list[str], fragments: list[str]
) -> None:
    start = time.process_time()
    message = refused(cli, world, arguments, fragments, _GROUPS)
    assert time.process_time() - start < _BUDGET
    assert _key(arguments[-1]).partition(".")[0] in message
    assert not any(tmp_path.iterdir()), "a slip leaves no folder"


@pytest.mark.parametrize(("arguments", "fragments"), rows(STRATEGIES))
def test_settings_of_strategies(cli: Cli, world: Path, arguments: list[str], fragments: list[str]) -> None:
    start = time.process_time()
    message = refused(cli, world, arguments, fragments, _GROUPS)
    assert time.process_time() - start < _BUDGET
    assert _key(arguments[-1]).removesuffix("._target_") in message


@pytest.mark.parametrize(("arguments", "fragments"), rows(TEXTS))
def test_texts(cli: Cli, world: Path, arguments: list[str], fragments: list[str]) -> None:
    refused(cli, world, ["cache.dir=null", *arguments], fragments, _GROUPS)


@pytest.mark.parametrize(("arguments", "fragments"), rows(MODELS))
def test_models(cli: Cli, world: Path, arguments: list[str], fragments: list[str]) -> None:
    refused(cli, world, ["model=local", "cache.dir=null", *arguments], fragments, _GROUPS)


@pytest.mark.parametrize(("arguments", "fragments"), rows(FOLDERS))
def test_folders(cli: Cli, world: Path, arguments: list[str], fragments: list[str]) -> None:
    refused(cli, world, arguments, fragments, _GROUPS)


@pytest.mark.parametrize(("arguments", "fragments"), rows(RECORDS))
def test_records(cli: Cli, world: Path, arguments: list[str], fragments: list[str]) -> None:
    start = time.process_time()
    refused(cli, world, arguments, fragments, {})
    assert time.process_time() - start < _BUDGET


@pytest.mark.parametrize(("arguments", "fragments"), rows(SWEEPS))
def test_sweeps_and_searches(cli: Cli, world: Path, arguments: list[str], fragments: list[str]) -> None:
    refused(cli, world, ["cache.dir=null", *arguments], fragments, _GROUPS)
