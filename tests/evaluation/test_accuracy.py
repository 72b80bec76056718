"""Accuracy through the real harness, on tiny models: what it measures, what it returns, what it leaves as it was."""

from __future__ import annotations

import copy
import json
import os
import random
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lm_eval.tasks import TaskManager
from torch import Tensor

from bs_exp.errors import ConfigError, DataError
from bs_exp.evaluation.accuracy import OWN_TASKS, Accuracy
from bs_exp.models.tiny import tiny_random
from bs_exp.types import LoadedModel

ITEMS = 12


def _accuracy(**settings: Any) -> Accuracy:
    defaults: dict[str, Any] = {
        "tasks": ["docs_cloze"],
        "limit": ITEMS,
        "num_fewshot": None,
        "batch_size": 4,
        "seed": 0,
        "include_path": [],
    }
    return Accuracy(**{**defaults, **settings})


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return tiny_random("llama")


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """A folder with a generation task, a rolling-likelihood task, and two multiple-choice tasks in a group."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    data = tmp_path / "data.jsonl"
    rows = [{"question": f"{i} plus one is", "answer": i % 2, "text": f"The number {i} and more."} for i in range(6)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: '{data}'}}}}\ntest_split: test\n"
    choice = "output_type: multiple_choice\ndoc_to_text: '{{question}}'\ndoc_to_target: answer\n"
    files = {
        "generating": "output_type: generate_until\ndoc_to_text: '{{question}}'\ndoc_to_target: '{{answer}}'\n"
        "generation_kwargs: {until: ['.'], max_gen_toks: 4}\n"
        "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n",
        "rolling": "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{text}}'\n"
        "metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]\n",
        "first": f"{choice}doc_to_choice: ['odd', 'even']\n",
        "second": f"{choice}doc_to_choice: ['no', 'yes']\n",
    }
    for name, settings in files.items():
        (folder / f"{name}.yaml").write_text(f"task: {name}\n{source}{settings}metadata: {{version: 2.0}}\n")
    (folder / "both.yaml").write_text(
        "group: both\ntask: [first, second]\naggregate_metric_list: [{metric: acc, weight_by_size: true}]\n"
    )
    return folder


def _log_likelihood(model: LoadedModel, context: str, continuation: str) -> float:
    encode = model.tokenizer
    given, scored = encode(context)["input_ids"], encode(f" {continuation}")["input_ids"]
    # The harness cuts from the left what the model has no positions for.
    longest = model.module.config.max_position_embeddings + 1
    ids: Tensor = torch.tensor([(given + scored)[-longest:]])
    with torch.no_grad():
        log_probabilities = model.module(ids[:, :-1]).logits[0].double().log_softmax(-1)
    return float(log_probabilities[-len(scored) :].gather(1, ids[0, -len(scored) :, None]).sum())


def test_accuracy_is_the_share_of_items_whose_answer_is_most_likely(model: LoadedModel) -> None:
    metrics = _accuracy().evaluate(model)
    manager = TaskManager(include_path=str(OWN_TASKS), include_defaults=False)
    rows = manager.load(["docs_cloze"])["tasks"]["docs_cloze"].dataset["test"].select(range(ITEMS))
    right = 0
    for row in rows:
        scores = [_log_likelihood(model, row["context"], choice) for choice in row["choices"]]
        right += scores.index(max(scores)) == row["answer"]
    share = right / ITEMS
    assert metrics["acc/docs_cloze"] == metrics["acc_norm/docs_cloze"] == metrics["acc/mean"] == share
    assert metrics["acc_stderr/docs_cloze"] == pytest.approx((share * (1 - share) / (ITEMS - 1)) ** 0.5)
    assert metrics["items/docs_cloze"] == ITEMS
    assert metrics["task_version/docs_cloze"] == "1.0"
    assert metrics["lm_eval/version"] == metadata.version("lm_eval")


def test_nothing_is_left_changed_or_printed(model: LoadedModel, capfd: pytest.CaptureFixture[str]) -> None:
    tokenizer = copy.deepcopy(model.tokenizer)
    tokenizer.pad_token = None
    loaded = LoadedModel(model.module, tokenizer, model.architecture, model.provenance)
    torch.manual_seed(3)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    first = _accuracy(limit=2).evaluate(loaded)
    assert random.getstate() == before[0]
    assert np.random.get_state()[1].tolist() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])
    assert tokenizer.pad_token is None
    assert _accuracy(limit=2).evaluate(loaded) == first
    assert capfd.readouterr() == ("", "")


def test_bf16_models_are_measured(model: LoadedModel) -> None:
    half = tiny_random("llama")
    half.module.bfloat16()
    assert 0 <= _accuracy(limit=2).evaluate(half)["acc/docs_cloze"] <= 1


def test_metrics_of_other_kinds_are_kept(model: LoadedModel, tasks: Path) -> None:
    metrics = _accuracy(tasks=["generating", "rolling"], include_path=[str(tasks)]).evaluate(model)
    assert 0 <= metrics["exact_match/generating"] <= 1
    assert metrics["word_perplexity/rolling"] > 1
    assert metrics["bits_per_byte/rolling"] > 0
    assert metrics["items/generating"] == 6
    assert not any(name.startswith("acc") for name in metrics)


def test_examples_in_the_prompt_are_the_tasks_own_unless_set(model: LoadedModel, tasks: Path) -> None:
    def prompts(num_fewshot: int | None) -> list[str]:
        seen: list[str] = []
        hook = model.module.register_forward_pre_hook(
            lambda _, arguments: seen.extend(model.tokenizer.batch_decode(arguments[0]))
        )
        _accuracy(tasks=["first"], include_path=[str(tasks)], num_fewshot=num_fewshot).evaluate(model)
        hook.remove()
        return seen

    assert all(prompt.count("plus one is") == 1 for prompt in prompts(None))
    assert all(prompt.count("plus one is") == 3 for prompt in prompts(2))


@pytest.mark.slow
def test_a_group_counts_once_in_the_mean(model: LoadedModel, tasks: Path) -> None:
    metrics = _accuracy(tasks=["both", "docs_cloze"], include_path=[str(tasks)]).evaluate(model)
    assert metrics["acc/both"] == pytest.approx((metrics["acc/first"] + metrics["acc/second"]) / 2)
    assert metrics["acc/mean"] == pytest.approx((metrics["acc/both"] + metrics["acc/docs_cloze"]) / 2)


@pytest.mark.slow
def test_an_unknown_task_gets_the_nearest_names_and_a_task_without_network_the_embedded_one(
    model: LoadedModel,
) -> None:
    with pytest.raises(ConfigError, match=r"'docs_close' is none of the [\d,]+ tasks.*did you mean docs_cloze"):
        _accuracy(tasks=["docs_close"]).check(model)
    with pytest.raises(DataError, match=r"data of task piqa cannot be reached.*docs_cloze"):
        _accuracy(tasks=["piqa"]).evaluate(model)


@pytest.mark.slow
def test_the_task_works_from_the_command_line_of_lm_eval(model: LoadedModel, tmp_path: Path) -> None:
    model.module.save_pretrained(tmp_path / "model")
    model.tokenizer.save_pretrained(tmp_path / "model")
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--device", "cpu", "--tasks", "docs_cloze"]
    command += ["--model_args", f"pretrained={tmp_path / 'model'}", "--include_path", str(OWN_TASKS)]
    command += ["--limit", str(ITEMS), "--batch_size", "4", "--output_path", str(tmp_path / "out")]
    root = Path(__file__).parents[2]
    subprocess.run(command, check=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(root)}, capture_output=True)
    results = json.loads(next((tmp_path / "out").rglob("results*.json")).read_text())["results"]["docs_cloze"]
    metrics = _accuracy().evaluate(model)
    assert results["acc,none"] == metrics["acc/docs_cloze"]
    assert results["acc_stderr,none"] == pytest.approx(metrics["acc_stderr/docs_cloze"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tasks": []}, "tasks is empty"),
        ({"limit": 0}, "limit must be positive"),
        ({"batch_size": 0}, "batch_size"),
        ({"num_fewshot": -1}, "num_fewshot"),
        ({"include_path": ["/nowhere/tasks"]}, "/nowhere/tasks is none"),
    ],
)
def test_wrong_settings_are_refused_at_once(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _accuracy(**settings)
