"""Evaluators on two processes find what they find on one: run as a program, this file evaluates and prints."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from lm_eval.api.instance import Instance

from bs_exp import processes
from bs_exp.corpora.given_texts import GivenTexts
from bs_exp.evaluation.accuracy import Accuracy
from bs_exp.evaluation.embeddings import Embeddings
from bs_exp.evaluation.masked_perplexity import MaskedPerplexity
from bs_exp.evaluation.perplexity import Perplexity
from bs_exp.evaluation.shared_harness import _shared_out
from bs_exp.evaluation.similarity import Similarity
from bs_exp.models.tiny import tiny_random
from bs_exp.types import LoadedModel

TEXT = "\n".join(f"line {number} of a text " + "and of what is in it"[: number % 17] + "." for number in range(40))
CORPORA = {"text": GivenTexts(texts=[TEXT])}


def items(**_: object) -> Mapping[str, object]:
    """Questions whose few examples are drawn, anew for every question."""
    import datasets

    rows = [{"question": f"{n} plus {n % 7} is", "choices": [f"{n}", f"{n + n % 7}", "no"]} for n in range(11)]
    return {"test": datasets.Dataset.from_list([{**row, "answer": n % 3} for n, row in enumerate(rows)])}


def tasks(folder: Path) -> Path:
    """Tasks of all three kinds of requests: choices with examples in the prompt, whole texts, and generated text."""
    common = {
        "custom_dataset": f"!function {Path(__file__).stem}.items",
        "test_split": "test",
        "fewshot_split": "test",
        "doc_to_text": "{{question}}",
        "target_delimiter": " ",
        "metadata": {"version": 1.0},
    }
    kinds: list[dict[str, object]] = [
        {
            "task": "picked", "num_fewshot": 2, "output_type": "multiple_choice", "doc_to_choice": "{{choices}}",
            "doc_to_target": "{{answer}}", "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        },
        {
            "task": "rolled", "num_fewshot": 0, "output_type": "loglikelihood_rolling", "doc_to_text": "",
            "doc_to_target": "{{question}}", "metric_list": [{"metric": "word_perplexity"}],
        },
        {
            "task": "written", "num_fewshot": 1, "output_type": "generate_until", "doc_to_target": "{{choices[1]}}",
            "metric_list": [{"metric": "bleu"}], "generation_kwargs": {"until": ["."], "max_gen_toks": 6},
        },
    ]  # fmt: skip
    (folder / Path(__file__).name).write_text(Path(__file__).read_text(encoding="utf-8"), encoding="utf-8")
    for kind in kinds:
        text = yaml.safe_dump({**common, **kind}).replace("'!function", "!function").replace(".items'", ".items")
        (folder / f"{kind['task']}.yaml").write_text(text, encoding="utf-8")
    return folder


def changed(original: LoadedModel) -> LoadedModel:
    other = tiny_random(original.module.config.model_type)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in other.module.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return replace(other, original=original)


def evaluate(folder: Path) -> dict[str, float | str]:
    """Five batches at most, so that processes have unlike shares; of the last text one has none."""
    causal, masked = changed(tiny_random("llama")), changed(tiny_random("bert"))
    common = {"corpora": CORPORA, "sequence_length": 24, "batch_size": 7}
    some = {**common, "mask_share": 0.2, "max_windows": 30, "special_tokens": False, "seed": 3}
    one_batch = {**some, "max_windows": 7}
    alike = {"target": "continuation", "source_share": 0.6}
    found: dict[str, float | str] = {}
    for prefix, model, evaluator in (
        ("", causal, Perplexity(
            **common, stride=None, tail="keep", max_windows=None, average="tokens", special_tokens=False
        )),
        ("", causal, Similarity(**some, **alike)),
        ("one batch ", causal, Similarity(**one_batch, **alike)),
        ("", masked, MaskedPerplexity(**some)),
        ("one batch ", masked, MaskedPerplexity(**one_batch)),
        ("", causal, Embeddings(**common, unit="lines", max_texts=None)),
        ("", causal, Accuracy(
            tasks=["picked", "rolled", "written"], limit=None, num_fewshot=None, batch_size=4, seed=5,
            include_path=[str(folder)],
        )),
    ):  # fmt: skip
        found |= {prefix + name: value for name, value in evaluator.evaluate(model).items()}  # type: ignore[attr-defined]
    return found


def _printed(*launcher: str, folder: Path) -> list[dict[str, float | str]]:
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [*launcher, __file__, str(folder)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)},
        timeout=250,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def test_items_with_the_same_context_are_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Choices of one item stay together; items whose context is empty do not."""
    requests = [
        Instance("loglikelihood", {}, ("", f"choice {choice}"), choice, ("task", item, 1))
        for item in range(5)
        for choice in range(3)
    ]
    own: list[int] = []

    def answer(asked: list[Instance], disable_tqdm: bool) -> list[str]:
        own.append(len(asked))
        return [request.args[1] for request in asked]

    for start in (0, 1):
        monkeypatch.setattr(processes, "mine", lambda items, start=start: list(items)[start::2])
        monkeypatch.setattr(processes, "put_together", lambda found, total: found)
        answers = _shared_out(answer, requests, False)
        assert answers == ["choice 0", "choice 1", "choice 2"] * (3 - start)
    assert own == [9, 6]


@pytest.mark.slow
def test_two_processes_find_what_one_finds(tmp_path: Path) -> None:
    folder = tasks(tmp_path)
    (alone,) = _printed(sys.executable, folder=folder)
    both = _printed(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", folder=folder)
    assert len(both) == 2
    assert {"ppl/text", "masked_ppl/text", "acc/picked", "word_perplexity/rolled", "bleu/written"} <= alone.keys()
    for found in both:
        assert found.keys() == alone.keys()
        for name, value in alone.items():
            assert found[name] == (value if isinstance(value, str) else pytest.approx(value, rel=1e-5)), name


if __name__ == "__main__":
    with processes.joined():
        print(json.dumps(evaluate(Path(sys.argv[1]))), flush=True)
