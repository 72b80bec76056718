"""Paths among settings are shown by their base names, as far as these tell them apart."""

from __future__ import annotations

import pytest

from bs_exp.reporting.dials import base_names


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        (["/data/a/train.txt", "/data/a/valid.txt"], ["train.txt", "valid.txt"]),
        (["[/data/a/train.txt, ~/b/more.txt]", "null"], ["[train.txt, more.txt]", "null"]),
        (["/data/a/train.txt", "/data/b/train.txt"], ["a/train.txt", "b/train.txt"]),
        (["a/b/c.txt"], ["c.txt"]),
        # Ids of hubs are no paths, nor are numbers and names.
        (["Salesforce/wikitext", "0.5", "svd_llm"], ["Salesforce/wikitext", "0.5", "svd_llm"]),
    ],
)
def test_base_names(values: list[str], shown: list[str]) -> None:
    found = base_names(values)
    assert [found[value] for value in values] == shown


def test_different_values_never_look_the_same() -> None:
    values = [f"/{x}/a/b/c/d/e.txt" for x in "xy"]
    assert len(set(base_names(values).values())) == 2
