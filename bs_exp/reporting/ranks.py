"""Ranks per layer and matrix type, from the plans."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, combinations
from statistics import correlation

from bs_exp.reporting import formats
from bs_exp.reporting.literature import LayerShares, literature
from bs_exp.reporting.results import RATIO, ratio_cell, series_cells, series_columns
from bs_exp.reporting.study import ReportedRun, Section, Series
from bs_exp.reporting.table import Cell, Column, Row, Table
from bs_exp.types import block_of

_SPREAD = 0.02
# Of a search with hundreds of trials, pairs say nothing.
_MOST_PAIRS = 200
_MOST_POINTS = 24
# Of a table of ranks: 1,000 runs of a model with 80 layers have half of it.
_MOST_CELLS = 1_000_000
# A page with a wider table cannot be read, nor shown quickly.
_MOST_LAYERS = 512


@dataclass(frozen=True)
class Place:
    """One matrix of a plan. `rank` is None where it stays dense; `kept` is its group's share of parameters.

    Of the experts of a layer: the mean of their ranks, where one is factorised, and of what they keep.
    """

    rank: int | None
    kept: float
    shared: int


def places(point: ReportedRun) -> dict[tuple[str, int], Place]:
    """(matrix type, layer) -> its rank and share kept, for every matrix of a run's plan."""
    found: dict[tuple[str, int], Place] = {}
    experts: dict[tuple[str, int], list[tuple[Place, int]]] = {}
    for planned in point.groups:
        group = planned.group
        place = Place(planned.rank, planned.parameters / group.parameters, group.size)
        for layer in group.blocks:
            if group.is_routed:
                experts.setdefault((group.matrix, layer), []).extend(
                    [(place, group.full_rank)] * len(group.within(layer))
                )
            else:
                found[group.matrix, layer] = place
    return found | {position: _mean(members) for position, members in experts.items()}


def _mean(members: Sequence[tuple[Place, int]]) -> Place:
    """What experts with their full ranks have on average."""
    ranks = [full if place.rank is None else place.rank for place, full in members]
    dense = all(place.rank is None for place, _ in members)
    kept = sum(place.kept for place, _ in members) / len(members)
    return Place(None if dense else round(sum(ranks) / len(ranks)), kept, max(place.shared for place, _ in members))


def rank_points(section: Section) -> list[tuple[Series, ReportedRun]]:
    """One point per series, at the ratio where most series have a plan (the lowest of several)."""
    planned = {
        removed: [(s, p) for s in section.series if (p := s.by_removed.get(removed)) and p.completed and p.groups]
        for removed in section.ratios
    }
    if not any(planned.values()):
        return []
    return planned[max(planned, key=lambda removed: (len(planned[removed]), removed))]


def layer_shares(point: ReportedRun) -> list[float]:
    """Share of its parameters that each layer keeps, by layer; a shared group counts for each of its layers."""
    kept: dict[int, float] = {}
    dense: dict[int, float] = {}
    for planned in point.groups:
        group = planned.group
        size = float(group.d_in * group.d_out)
        for layer in map(block_of, group.layers):
            kept[layer] = kept.get(layer, 0.0) + planned.parameters / group.parameters * size
            dense[layer] = dense.get(layer, 0.0) + size
    return [kept[layer] / dense[layer] for layer in sorted(kept)]


def correlation_tables(section: Section, key: str) -> Iterator[Table]:
    """Pearson's r between the shares that two methods leave to each layer, for all pairs of methods at each ratio.

    Shares and correlations that papers report for the model stand beside them.
    """
    known = literature()
    agreements = [found for found in known.agreements if section.model in found.models]
    rows, sources, told = [], [], False
    for removed in section.ratios:
        shares = [
            (series.label, frozenset({series.method}), layer_shares(point))
            for series in section.series
            if (point := series.by_removed.get(removed)) is not None and point.completed
        ]
        reported = reported_shares(section, removed)
        shares += [(f"{found.method}, reported", frozenset[str](), list(found.shares)) for found in reported]
        # Uniform shares correlate with nothing; rounding to whole ranks must not make them seem to.
        spread = [entry for entry in shares if len(entry[2]) > 2 and max(entry[2]) - min(entry[2]) > _SPREAD]
        for (first, one, ours), (second, other, theirs) in combinations(spread, 2):
            if len(ours) == len(theirs) and (one or other):
                r = correlation(ours, theirs)
                there = [a for a in agreements if a.presets == one | other and abs(a.removed - removed) < 1e-6]
                told |= bool(there)
                sources += [f"{found.place}: {found.note}" for found in there]
                sources += [found.place for found in reported if not (one and other)]
                cells = (
                    ratio_cell(removed),
                    Cell(first),
                    Cell(second),
                    Cell(f"{r:+.2f}", value=r),
                    Cell(", ".join(f"{a.r:+.2f}" for a in there), value=there[0].r if there else None),
                )
                rows.append(Row(cells))
    columns = [RATIO, Column("one", numeric=False), Column("other", numeric=False), Column("Pearson r")]
    if rows and len(rows) <= _MOST_PAIRS:
        note = "Correlation of the shares that the layers keep. Methods that treat all layers alike are left out."
        note += f" Reported: {'; '.join(dict.fromkeys(sources))}." if sources else ""
        yield Table(
            f"{key}-correlation",
            "Do methods agree on which layers matter?",
            (*columns, *([Column("reported")] if told else [])),
            tuple(rows if told else [Row(row.cells[:-1]) for row in rows]),
            note=note,
        )
    yield from _share_table(section, key)


def reported_shares(section: Section, removed: float) -> list[LayerShares]:
    """The shares by layer that papers report for the section's model at a ratio."""
    found = literature().layer_shares
    return [entry for entry in found if section.model in entry.models and abs(entry.removed - removed) < 1e-6]


def _share_table(section: Section, key: str) -> Iterator[Table]:
    """The share that every layer keeps, measured beside reported; nothing where nothing is reported."""
    rows, places, count = [], [], 0
    for removed in section.ratios:
        points = [(s, p) for s in section.series if (p := s.by_removed.get(removed)) and p.completed]
        measured = [(series.label, point.number, layer_shares(point)) for series, point in points[:_MOST_POINTS]]
        for there in reported_shares(section, removed) if any(shares for _, _, shares in measured) else ():
            rows += [
                _shares(removed, label, shares, link=number, kind="dense")
                for label, number, shares in measured
                if shares
            ]
            rows.append(_shares(removed, f"{there.method}, reported", there.shares, kind="reported"))
            places.append(there.place)
            count = max(count, len(there.shares), *(len(shares) for _, _, shares in measured))
    if not rows:
        return
    columns = [RATIO, Column("method", numeric=False), *(Column(f"layer {i}") for i in range(count))]
    filled = [Row((*row.cells, *(Cell("") for _ in range(len(columns) - len(row.cells)))), row.kind) for row in rows]
    yield Table(
        f"{key}-shares",
        "Share of parameters kept per layer, measured beside reported",
        tuple(columns),
        tuple(filled),
        note=f"Per cent. Reported: {'; '.join(dict.fromkeys(places))}.",
    )


def _shares(removed: float, label: str, shares: Sequence[float], *, kind: str, link: int | None = None) -> Row:
    cells = (Cell(f"{100 * share:.1f}", value=share) for share in shares)
    return Row((ratio_cell(removed, link), Cell(label), *cells), kind=kind)


def rank_table(section: Section, key: str) -> Table | None:
    """Ranks of every completed point: a row per type, a column per layer."""
    return _table(section, [(s, p) for s in section.series for p in s.completed if p.groups], key, "")


def short_rank_table(section: Section, key: str) -> Table | None:
    """The same, of as many points as a page can hold: if there are more, those at the ratio that the figure shows."""
    entries = [(s, p) for s in section.series for p in s.completed if p.groups]
    if len(entries) <= _MOST_POINTS:
        return _table(section, entries, key, "")
    chosen = rank_points(section)[:_MOST_POINTS]
    return _table(section, chosen, key, f" {len(chosen)} of {len(entries)} runs; the CSV file has all.")


def _table(section: Section, entries: Sequence[tuple[Series, ReportedRun]], key: str, note: str) -> Table | None:
    found = [places(point) for _, point in entries]
    layers = sorted({layer for planned in found for _, layer in planned})
    if not layers:
        return None
    if len(layers) > _MOST_LAYERS:
        note += f" The first {_MOST_LAYERS} of {len(layers):,} layers."
        layers = layers[:_MOST_LAYERS]
    fitting = _MOST_CELLS // len(layers)  # rows
    counts = accumulate(len({matrix for matrix, _ in planned}) for planned in found)
    if (shown := sum(count <= fitting for count in counts)) < len(entries):
        note += f" The first {shown} of {len(entries)} runs."
        entries, found = entries[:shown], found[:shown]
    columns = [RATIO, *series_columns(section), Column("matrix", numeric=False)]
    columns += [Column(f"layer {layer}") for layer in layers]
    rows = []
    for (series, point), planned in zip(entries, found, strict=True):
        for i, matrix in enumerate(dict.fromkeys(matrix for matrix, _ in planned)):
            cells = [ratio_cell(point.removed, point.number)]
            cells += [*series_cells(series), Cell(matrix)]
            cells += [_rank(planned.get((matrix, layer))) for layer in layers]
            rows.append(Row(tuple(cells), kind="" if i else "block"))
    return Table(
        f"{key}-ranks",
        "Rank per layer and matrix type",
        tuple(columns),
        tuple(rows),
        note="A shared basis is counted once: its rank stands at every layer of its group. 'dense' stays as it was."
        + (
            " Experts have the mean of their layer."
            if any(m.startswith("expert_") for p in found for m, _ in p)
            else ""
        )
        + note,
    )


def _rank(place: Place | None) -> Cell:
    if place is None:
        return Cell(formats.ABSENT, style="muted", hint="not targeted")
    hint = f"{100 * place.kept:.1f} % kept" + (f", shared by {place.shared} layers" if place.shared > 1 else "")
    if place.rank is None:
        return Cell("dense", style="muted", hint=hint)
    return Cell(f"{place.rank:,}", value=place.rank, hint=hint)
