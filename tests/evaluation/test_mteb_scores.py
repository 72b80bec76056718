"""Scores on MTEB's tasks, on pairs of sentences in files: mteb itself runs, and scipy says what it must find."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from bs_exp.errors import ConfigError, DataError
from bs_exp.evaluation.mteb_scores import MtebScores
from bs_exp.evaluation.text_embeddings import embeddings_of, token_rows
from bs_exp.models.tiny import tiny_random
from bs_exp.types import LoadedModel, Pooling
from tests.support.encoders import headless

PAIRS = [
    (
        f"line {i} of a text " + "and more of it " * (i % 5),
        f"another line {i * i % 7}" + " that is long" * (i % 3),
        i % 6,
    )
    for i in range(20)
]


def settings(**changes: object) -> MtebScores:
    given: dict[str, object] = {"tasks": [], "pairs": {}, "languages": None, "sequence_length": 32, "batch_size": 7}
    return MtebScores(**{**given, **changes})  # type: ignore[arg-type]


@pytest.fixture
def model() -> LoadedModel:
    return replace(headless(), pooling=Pooling(modes=("mean",)))


def written(path: Path) -> Path:
    """The pairs in a file of the kind that its name says."""
    rows = [dict(zip(("sentence1", "sentence2", "score"), pair, strict=True)) for pair in PAIRS]
    if path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    else:
        sign = "\t" if path.suffix == ".tsv" else ","
        lines = [sign.join(rows[0]), *(sign.join(map(str, pair)) for pair in PAIRS)]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def alone(model: LoadedModel, text: str) -> np.ndarray:
    ids = model.tokenizer(text, truncation=True, max_length=32, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        found = model.module(input_ids=ids).last_hidden_state[0].double().numpy().mean(0)
    return found / np.linalg.norm(found)  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.csv", "pairs.tsv"])
def test_a_score_is_the_rank_correlation_with_the_judgement(tmp_path: Path, model: LoadedModel, name: str) -> None:
    evaluator = settings(pairs={"mine": str(written(tmp_path / name))})
    evaluator.check(model)
    found = evaluator.evaluate(model)
    cosines = [float(alone(model, first) @ alone(model, second)) for first, second, _ in PAIRS]
    wanted = stats.spearmanr([score for *_, score in PAIRS], cosines).statistic
    assert found["mteb_score/mine"] == pytest.approx(wanted, abs=1e-3)
    assert found["mteb_score/mean"] == found["mteb_score/mine"]
    assert str(found["mteb/mine"]).startswith(f"{name}@")
    assert found["mteb/version"]


def test_sentences_are_read_as_they_are(tmp_path: Path) -> None:
    """Quotation marks of a .tsv file are the sentence's own; line breaks stay inside quotes, and in JSON any sign."""
    from bs_exp.evaluation.mteb_encoder import own_pairs

    texts = {
        "a.tsv": '\ufeffsentence1\tsentence2\tscore\n"Hello, he said\tb\t1\nc\td\t2\nBye\tf"\t3\n',
        "a.csv": 'sentence1,sentence2,score\n"a\nb",c,1\nd,"e, f",2\ng,h,3\n',
        "a.jsonl": "".join(
            json.dumps({"sentence1": f"a\u2028{i}", "sentence2": "b", "score": i}, ensure_ascii=False) + "\n"
            for i in range(3)
        ),
    }
    firsts = {"a.tsv": ['"Hello, he said', "c", "Bye"], "a.csv": ["a\nb", "d", "g"]}
    for name, text in texts.items():
        (tmp_path / name).write_text(text, encoding="utf-8", newline="")
        read = own_pairs("mine", tmp_path / name).dataset["test"]
        assert read["sentence1"][:] == firsts.get(name, [f"a\u2028{i}" for i in range(3)])


def test_embeddings_without_order_or_numbers_score_nothing(tmp_path: Path, model: LoadedModel) -> None:
    evaluator = settings(pairs={"mine": str(written(tmp_path / "a.csv"))}, batch_size=1)
    with torch.no_grad():
        for parameter in model.module.parameters():
            parameter.zero_()
    found = evaluator.evaluate(model)
    assert found["mteb_score/mine"] == 0.0
    with torch.no_grad():
        next(model.module.parameters()).fill_(float("nan"))
    found = evaluator.evaluate(model)
    assert found["mteb_score/mine"] == 0.0 and found["mteb_score_nonfinite/mine"] == 40


def test_a_text_without_tokens_has_an_embedding_in_every_batch() -> None:
    model = tiny_random()
    rows = token_rows(["", "a text"], model, length=8)
    both = embeddings_of(rows, model)
    torch.testing.assert_close(embeddings_of(rows[:1], model), both[:1], rtol=1e-4, atol=1e-5)
    assert bool(both.isfinite().all())


def test_the_mean_is_over_all_files_and_content_is_that_of_the_files(tmp_path: Path, model: LoadedModel) -> None:
    first, second = written(tmp_path / "a.csv"), tmp_path / "b.csv"
    second.write_text("sentence1,sentence2,score\na,b,1\nc,d e f,3\ng h,i,2\nj,k l,0\n", encoding="utf-8")
    evaluator = settings(pairs={"first": str(first), "second": str(second)})
    found = evaluator.evaluate(model)
    assert found["mteb_score/mean"] == pytest.approx(
        (float(found["mteb_score/first"]) + float(found["mteb_score/second"])) / 2
    )
    before = evaluator.content()
    assert set(before) == {"pairs first", "pairs second"}
    second.write_text(second.read_text(encoding="utf-8") + "m,n,5\n", encoding="utf-8")
    assert evaluator.content() != before


def test_a_task_of_mteb_is_named_with_the_revision_of_its_data() -> None:
    content = settings(tasks="STSBenchmark").content()
    assert set(content) == {"task STSBenchmark"}
    path, _, revision = content["task STSBenchmark"].partition("@")
    assert path.endswith("stsbenchmark-sts") and len(revision) == 40


def test_data_that_cannot_be_had_is_said(model: LoadedModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path))
    with pytest.raises(DataError, match=r"task STSBenchmark cannot be read.*pairs of your own"):
        settings(tasks=["STSBenchmark"]).evaluate(model)


def test_what_cannot_be_scored_is_refused_before_any_work(tmp_path: Path, model: LoadedModel) -> None:
    with pytest.raises(ConfigError, match=r"'STSBenchmrk' is none of the .* tasks known to mteb .*STSBenchmark"):
        settings(tasks=["STSBenchmrk"]).check(model)
    with pytest.raises(ConfigError, match=r"A score on MTEB needs an encoder.*evaluation=seq2seq"):
        settings(tasks=["STSBenchmark"]).check(tiny_random("t5"))
    with pytest.raises(ConfigError, match="CIFAR10 is on image; only tasks on text"):
        settings(tasks=["CIFAR10"]).check(model)
    with pytest.raises(ConfigError, match="CQADupstackRetrieval is made of others; name them: CQADupstack"):
        settings(tasks=["CQADupstackRetrieval"]).check(model)
    with pytest.raises(ConfigError, match=r"languages must be codes of three letters.*got \['?english"):
        settings(tasks=["STSBenchmark"], languages="english").check(model)
    with pytest.raises(ConfigError, match=r"tasks must be a list of names, got \[1\]"):
        settings(tasks=[1])
    with pytest.raises(ConfigError, match="tasks and pairs are both empty"):
        settings()
    with pytest.raises(ConfigError, match=r"pairs.mine must name a file, and there is none at .*none.csv"):
        settings(pairs={"mine": str(tmp_path / "none.csv")})
    file = str(written(tmp_path / "a.csv"))
    with pytest.raises(ConfigError, match="names other than mean and version, got 'mean'"):
        settings(pairs={"mean": file})
    with pytest.raises(ConfigError, match="other names than tasks, got BIOSSES in both"):
        settings(tasks=["BIOSSES"], pairs={"BIOSSES": file})


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("a.txt", "a\n", r"must be a .jsonl, .csv or .tsv file, got a.txt"),
        (
            "a.csv",
            "sentence1,score\na,1\n",
            r"must have sentence1, sentence2, score.*row 1 has the columns sentence1, score",
        ),
        (
            "a.csv",
            "sentence1,sentence2,score\na,b,1\na,b,high\n",
            r"two texts and a number: row 2 has the score 'high'",
        ),
        ("a.csv", "score,sentence1,sentence2\n1,a\n", r"row 1 has .*too few"),
        ("a.csv", 'sentence1,sentence2,score\n"a,b,1\nc,d,2\n', r"every row of a.csv must have"),
        ("a.jsonl", '{"sentence1": "a"\n', r"every row of a.jsonl must have"),
        ("a.jsonl", "[1]\n", r"row 1 has \[1\]"),
        ("a.jsonl", '{"sentence1": "a", "sentence2": null, "score": 1}\n', r"row 1 has"),
        ("a.jsonl", '{"sentence1": "a", "sentence2": ["b"], "score": 1}\n', r"row 1 has \['a', \['b'\], 1\]"),
        ("a.jsonl", '{"sentence1": "a", "sentence2": "b", "score": true}\n', r"row 1 has \['a', 'b', true\]"),
        ("a.csv", "sentence1,sentence2,score\na,b,1\nc,d,1\ne,f,1\n", r"not all the same, got 3 rows"),
        ("a.csv", "sentence1,sentence2,score\na,b,1\nc,d,2\n", r"at least 3 rows.*got 2 rows"),
    ],
)
def test_files_without_pairs_are_refused(tmp_path: Path, model: LoadedModel, name: str, text: str, told: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=told):
        settings(pairs={"mine": str(tmp_path / name)}).evaluate(model)
