"""Data sets through `datasets`: local folders and files take the same way as those of the hub."""

from __future__ import annotations

from pathlib import Path

import pytest
from datasets import Dataset

from bs_exp.corpora.hub_dataset import HubDataset
from bs_exp.errors import ConfigError, DataError

ROWS = ["First row.", "", "Third row."]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "data"
    path.mkdir()
    for split in ("train", "test"):
        rows = Dataset.from_dict({"text": [f"{split}: {row}" for row in ROWS], "number": [1, 2, 3]})
        rows.to_parquet(path / f"{split}.parquet")
    return path


def test_the_rows_of_a_split_are_joined(folder: Path) -> None:
    text, provenance = HubDataset(path=str(folder), split="test").read()
    assert text == "test: First row.\n\ntest: \n\ntest: Third row."
    assert provenance["documents"] == 3
    assert HubDataset(path=str(folder), split="train").read()[1]["fingerprint"] != provenance["fingerprint"]


def test_a_split_can_be_cut_in_two(folder: Path) -> None:
    """As Alpaca's, which has but one."""
    first, last = (HubDataset(path=str(folder), split=split).read()[0] for split in ("train[:-1]", "train[-1:]"))
    assert (first, last) == ("train: First row.\n\ntrain: ", "train: Third row.")


@pytest.mark.parametrize("streaming", [False, True])
def test_named_files_and_the_first_documents(folder: Path, streaming: bool) -> None:
    corpus = HubDataset(
        path="parquet",
        data_files={"train": str(folder / "train.parquet"), "test": str(folder / "test.parquet")},
        split="test",
        max_documents=2,
        joiner="|",
        streaming=streaming,
    )
    assert corpus.read()[0] == "test: First row.|test: "


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"field": "sentence"}, "row 0 must hold text in the column 'sentence', found no such column.*text, number"),
        ({"field": "number"}, "found int"),
        ({"split": "validation"}, "validation"),
        ({"name": "large"}, "large"),
    ],
)
def test_wrong_settings_say_what_there_is(folder: Path, settings: dict[str, str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        HubDataset(**{"path": str(folder), "split": "test", **settings}).read()


def test_without_network_the_offline_alternatives_are_named() -> None:
    # The tests run with HF_HUB_OFFLINE=1: the same error as without network, at once.
    with pytest.raises(DataError, match=r"nobody/nothing cannot be reached.*python_docs.*files=") as error:
        HubDataset(path="nobody/nothing", split="test").read()
    assert isinstance(error.value.__cause__, ConnectionError)


def test_a_data_set_without_text_is_refused(tmp_path: Path) -> None:
    Dataset.from_dict({"text": ["", " "]}).to_parquet(tmp_path / "empty.parquet")
    with pytest.raises(DataError, match="holds no text"):
        HubDataset(path="parquet", data_files=str(tmp_path / "empty.parquet"), split="train").read()


def test_max_documents_must_be_positive() -> None:
    with pytest.raises(ConfigError, match="max_documents"):
        HubDataset(path="x", split="test", max_documents=0)
