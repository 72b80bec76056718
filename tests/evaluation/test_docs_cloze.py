"""The items of docs_cloze: fair, reproducible, from held-out documentation."""

from __future__ import annotations

from collections import Counter

import pytest

from bs_exp.demo.documentation import read_python_docs
from bs_exp.errors import DataError
from bs_exp.evaluation.docs_cloze import cloze_items, docs_cloze

SETTINGS = {"items": 200, "context_characters": 240, "continuation_characters": 40}


@pytest.fixture(scope="module")
def rows() -> list[dict[str, object]]:
    return list(docs_cloze(**SETTINGS, seed=0, version=1.0, config_source="x.yaml")["test"])


def test_the_right_choice_and_only_it_continues_its_context(rows: list[dict[str, object]]) -> None:
    documents = read_python_docs("heldout").documents
    assert len(rows) == 200
    for row in rows:
        home = [document for document in documents if row["context"] in document]
        continuing = [i for i, c in enumerate(row["choices"]) if any(f"{row['context']} {c}" in d for d in home)]
        assert continuing == [row["answer"]]


def test_length_gives_nothing_away(rows: list[dict[str, object]]) -> None:
    for row in rows:
        assert len(set(row["choices"])) == 4
        assert len({len(choice) for choice in row["choices"]}) == 1
        assert len(row["context"]) >= 240 and len(row["choices"][0]) >= 40
        assert all(choice == choice.strip() for choice in row["choices"])


def test_answers_are_spread_evenly(rows: list[dict[str, object]]) -> None:
    counts = Counter(row["answer"] for row in rows)
    assert set(counts) == {0, 1, 2, 3} and min(counts.values()) > 30


def test_the_same_seed_gives_the_same_items_and_another_others(rows: list[dict[str, object]]) -> None:
    documents = read_python_docs("heldout").documents
    assert cloze_items(documents, **SETTINGS, seed=0) == rows
    assert cloze_items(documents, **SETTINGS, seed=1) != rows


def test_too_little_text_says_so() -> None:
    with pytest.raises(DataError, match="needs 200 items, but 2 held-out documents give only 0"):
        cloze_items(["A short text. " * 40, "Another one. " * 40], **SETTINGS, seed=0)
