"""`sharing_pays.json`: what sharing costs for every pair of layers, as analysis=sharing_pays measured it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bs_exp.errors import RecordError
from bs_exp.records.parsing import (
    below,
    count,
    decode,
    filled,
    list_of,
    number,
    object_with,
    or_null,
    read_object,
    text_up_to,
)

PAIRS_FILE = "sharing_pays.json"
_WHAT = "a table of pairs"
# Heat maps of more cannot be drawn in a reasonable time.
_MOST_LAYERS = 1_000
_MOST_TABLES = 32  # one for each matrix type


@dataclass(frozen=True)
class PairTable:
    """What sharing costs for every pair of layers of a matrix type: loss of one basis for both, minus both apart.

    `values[i][j]` belongs to layers `layers[i]` and `layers[j]`; negative means that sharing pays. None: not measured.
    `ratios` holds the loss of one basis as a share of both apart, by pair, where that is defined.
    """

    matrix: str
    layers: tuple[int, ...]
    values: tuple[tuple[float | None, ...], ...]
    folder: Path
    unit: str
    ratios: Mapping[tuple[int, int], float] = field(default_factory=dict)


def pairs_document(facts: Mapping[str, Any], tables: Sequence[Mapping[str, Any]]) -> str:
    """The text of the file: `facts` on the measurement, and each table with its `values` added."""
    unit = tables[0]["unit"] if tables else ""
    return json.dumps({**facts, "unit": unit, "tables": [{**t, "values": _values(t)} for t in tables]}, indent=1)


def pair_table(table: Mapping[str, Any], folder: Path) -> PairTable:
    """A table as measured: `matrix`, `layers`, `unit`, and `pairs` with `layers`, `difference` and `ratio`."""
    values = tuple(tuple(row) for row in _values(table))
    return PairTable(table["matrix"], tuple(table["layers"]), values, folder, table["unit"])


def read_pairs(path: Path) -> list[PairTable]:
    """The tables of a file; RecordError if it is not one."""
    data = decode(read_object(path, _WHAT))
    try:
        _FILE("file", data)
    except RecordError as error:
        raise RecordError(f"{path} is not {_WHAT}: {str(error).removeprefix('file.')}.") from error
    return [_table(table, path, data.get("unit", "")) for table in data["tables"]]


def _table(table: Mapping[str, Any], path: Path, unit: str) -> PairTable:
    layers, values = tuple(table["layers"]), tuple(map(tuple, table["values"]))
    if len(values) != len(layers) or any(len(row) != len(layers) for row in values):
        raise RecordError(f"{path} is not {_WHAT}: that of {table['matrix']} is not {len(layers)} by {len(layers)}.")
    ratios = {}
    for pair in table.get("pairs", ()):
        if len(pair["layers"]) != 2:
            raise RecordError(f"{path} is not {_WHAT}: {pair['layers']!r:.60} is no pair of layers.")
        if pair["ratio"] is not None:
            ratios[pair["layers"][0], pair["layers"][1]] = float(pair["ratio"])
    return PairTable(table["matrix"], layers, values, path.parent, unit, ratios)


def _values(table: Mapping[str, Any]) -> list[list[float | None]]:
    """Joint minus separate loss by pair, as a symmetric matrix; None where there is no pair."""
    differences = {tuple(pair["layers"]): pair["difference"] for pair in table["pairs"]}
    return [[differences.get((min(a, b), max(a, b))) for b in table["layers"]] for a in table["layers"]]


_LAYERS = filled(list_of(below(10_000, count), _MOST_LAYERS))
_PAIR = object_with(frozenset({"layers", "ratio"}), layers=_LAYERS, ratio=or_null(number))
_FILE = object_with(
    frozenset({"tables"}),
    unit=text_up_to(100),
    tables=list_of(
        object_with(
            frozenset({"matrix", "layers", "values"}),
            matrix=text_up_to(100),
            layers=_LAYERS,
            values=list_of(list_of(or_null(number))),
            pairs=list_of(_PAIR),
        ),
        _MOST_TABLES,
    ),
)
