"""What the literature reports: the numbers in `paper_results.yaml`, with their sources and protocols."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

import yaml

DENSE = "Original"
_ROW_FIELDS = frozenset({"model", "method", "removed", "group_size", "calibration", "where", "note"})


@dataclass(frozen=True)
class Method:
    """A method of the papers and how we call it."""

    method: str
    presets: tuple[str, ...]
    options: Mapping[str, Sequence[str]]
    shares: bool = False
    only_in: tuple[str, ...] = ()
    not_in: tuple[str, ...] = ()

    def covers(self, reported: Reported) -> bool:
        return (
            self.method == reported.method
            and (not self.only_in or reported.protocol in self.only_in)
            and reported.protocol not in self.not_in
        )


@dataclass(frozen=True)
class Reported:
    """One number of a paper, with the ids of its model on the hub.

    `where` holds settings by dotted key that a run must share; `speed` and `hardware` say how time was measured.
    """

    models: tuple[str, ...]
    method: str
    removed: float
    metric: str
    value: float
    protocol: str
    place: str
    group_size: int | None
    calibration: str | None
    notes: tuple[str, ...]
    where: Mapping[str, Any]
    speed: Mapping[str, Any]
    hardware: str | None

    @property
    def name(self) -> str:
        """The method, and what tells it apart from other rows of its table."""
        words = [f"group {self.group_size}"] if self.group_size else []
        words += [f"calibrated on {self.calibration}"] if self.calibration else []
        words += [f"{key.rpartition('.')[2]} {value}" for key, value in self.where.items()]
        return ", ".join([self.method, *words])


@dataclass(frozen=True)
class LayerShares:
    """The share of its parameters that a method leaves to each layer, the first layer first."""

    models: tuple[str, ...]
    method: str
    removed: float
    shares: tuple[float, ...]
    place: str


@dataclass(frozen=True)
class Agreement:
    """Pearson's r of the layers' shares of two presets, at a ratio."""

    models: tuple[str, ...]
    presets: frozenset[str]
    removed: float
    r: float
    place: str
    note: str


@dataclass(frozen=True)
class PairLoss:
    """What one basis for two layers (counted from 0) loses, and what one basis each loses, at a ratio."""

    models: tuple[str, ...]
    removed: float
    matrix: str
    layers: tuple[int, int]
    joint: float
    apart: tuple[float, float]
    place: str
    note: str

    @property
    def ratio(self) -> float:
        """Below 1, sharing pays."""
        return self.joint / sum(self.apart)


@dataclass(frozen=True)
class Literature:
    """All reported numbers, their protocols, and the names of methods."""

    rows: tuple[Reported, ...]
    protocols: Mapping[str, Mapping[str, Any]]
    methods: tuple[Method, ...]
    layer_shares: tuple[LayerShares, ...]
    agreements: tuple[Agreement, ...]
    pairs: tuple[PairLoss, ...]

    def about(self, model: str) -> list[Reported]:
        return [row for row in self.rows if model in row.models]

    def source(self, reported: Reported) -> str:
        protocol = self.protocols[reported.protocol]
        return f"{protocol['title']}, {reported.place} ({protocol['source']})"


@cache
def literature() -> Literature:
    """The numbers that the package holds."""
    text = (resources.files("bs_exp.reporting") / "paper_results.yaml").read_text(encoding="utf-8")
    data = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    ids = {model: tuple(found) for model, found in data["models"].items()}
    return Literature(
        rows=tuple(row for table in data["tables"] for row in _rows(table, ids)),
        protocols=data["protocols"],
        methods=tuple(_method(entry) for entry in data["methods"]),
        layer_shares=tuple(
            LayerShares(
                models=ids[row["model"]],
                method=data["layer_shares"]["method"],
                removed=float(row["removed"]),
                shares=tuple(row["shares"]),
                place=data["layer_shares"]["place"],
            )
            for row in data["layer_shares"]["rows"]
        ),
        agreements=tuple(
            Agreement(
                models=ids[row["model"]],
                presets=frozenset(row["presets"]),
                removed=float(row["removed"]),
                r=row["r"],
                place=data["agreements"]["place"],
                note=data["agreements"]["note"],
            )
            for row in data["agreements"]["rows"]
        ),
        pairs=tuple(
            PairLoss(
                models=ids[row["model"]],
                removed=float(row["removed"]),
                matrix=row["matrix"],
                layers=(row["layers"][0], row["layers"][1]),
                joint=row["joint"],
                apart=(row["apart"][0], row["apart"][1]),
                place=data["pairs"]["place"],
                note=data["pairs"]["note"],
            )
            for row in data["pairs"]["rows"]
        ),
    )


def _rows(table: Mapping[str, Any], ids: Mapping[str, tuple[str, ...]]) -> list[Reported]:
    return [
        Reported(
            models=ids[row["model"]],
            method=row["method"],
            removed=float(row["removed"]),
            metric=name,
            value=float(value),
            protocol=table["protocol"],
            place=table["place"],
            group_size=row.get("group_size"),
            calibration=row.get("calibration"),
            notes=(*table.get("notes", ()), *([row["note"]] if "note" in row else [])),
            where=row.get("where", {}),
            speed=table.get("speed", {}),
            hardware=table.get("hardware"),
        )
        for row in table["rows"]
        for name, value in row.items()
        if name not in _ROW_FIELDS
    ]


def _method(entry: Mapping[str, Any]) -> Method:
    return Method(
        method=entry["method"],
        presets=tuple(entry["presets"]),
        options=entry["options"],
        shares=entry.get("shares", False),
        only_in=tuple(entry.get("only_in", ())),
        not_in=tuple(entry.get("not_in", ())),
    )
