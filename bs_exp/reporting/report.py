"""A report on disk: page, tables and figures in one folder, made from records alone."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bs_exp.collector import collector_paused
from bs_exp.errors import RecordError
from bs_exp.files import read_text, remove_leftovers, write_file
from bs_exp.reporting import cost, papers, ranks, results, runs, settings, table
from bs_exp.reporting.collect import collect
from bs_exp.reporting.drawing import Drawn
from bs_exp.reporting.figures import pair_figures, study_figures
from bs_exp.reporting.page import Chapter, Contents, to_html
from bs_exp.reporting.searches import search_figures
from bs_exp.reporting.study import Section, Study, arrange
from bs_exp.reporting.table import Table

PAGE, TABLES_TEXT, TABLES_FOLDER, FIGURES_FOLDER = "index.html", "tables.md", "tables", "figures"
_MADE = ".made.json"
# What a report consists of; nothing else is removed because a list in the folder names it.
_OURS = re.compile(r"index\.html|tables\.md|tables/[^/\0]+\.csv|(figures/)?[^/\0]+\.(svg|png)")


@dataclass(frozen=True)
class Written:
    """The files that were written, and the study with its unreadable records."""

    folder: Path
    files: tuple[Path, ...]
    study: Study


@dataclass(frozen=True)
class PageOfRun:
    """The report of one run, in its folder; for what takes reports along, such as a tracker."""

    def write(self, folder: Path) -> Path:
        """The folder `report` in the run's folder; RecordError if it cannot be written."""
        return write_report([folder], folder / "report").folder


# Records and tables are trees of many small objects: to look for cycles among them, again and again, takes longer the
# more a process holds besides, and finds none.
@collector_paused()
def write_report(folders: Sequence[Path], out: Path) -> Written:
    """Page, Markdown, CSV and figures of all records below the folders; RecordError if there is none."""
    study = arrange(collect(folders))
    figures, pairs = study_figures(study), pair_figures(study.pairs)
    searched = search_figures(study.searches)
    contents = _contents(study, figures, pairs, searched, out)
    tables = _tables(contents)
    full = [t for i, section in enumerate(study.sections, start=1) if (t := ranks.rank_table(section, f"m{i}"))]
    files: dict[str, bytes] = {PAGE: to_html(contents).encode()}
    files[TABLES_TEXT] = table.to_markdown(tables, study.name).encode()
    files |= {
        f"{TABLES_FOLDER}/{found.key}.csv": table.to_csv(found).encode()
        for found in (*tables, *full, settings.tidy_table(study))
    }
    files |= _figure_files([*(f for drawn in figures.values() for f in drawn), *pairs, *searched])
    return Written(out, _write(files, out), study)


@collector_paused()
def write_figures(folders: Sequence[Path], out: Path) -> Written:
    """The figures alone; RecordError if there is no record."""
    study = arrange(collect(folders))
    drawn = [*(figure for found in study_figures(study).values() for figure in found), *pair_figures(study.pairs)]
    drawn += search_figures(study.searches)
    files = {name.removeprefix(f"{FIGURES_FOLDER}/"): data for name, data in _figure_files(drawn).items()}
    return Written(out, _write(files, out), study)


def _contents(
    study: Study, figures: dict[Section, list[Drawn]], pairs: Sequence[Drawn], searched: Sequence[Drawn], out: Path
) -> Contents:
    chapters = [
        Chapter(
            section=section,
            results=list(results.result_tables(section, f"m{i}")),
            ranks=ranks.short_rank_table(section, f"m{i}"),
            agreement=list(ranks.correlation_tables(section, f"m{i}")),
            cost=list(cost.cost_tables(section, f"m{i}")),
            quality_figures=[f for f in figures[section] if "-curve-" in f.key or "-pareto-" in f.key],
            cost_figures=[
                f for f in figures[section] if "-speed-" in f.key.replace("-pareto-speed-", "") or "-timings" in f.key
            ],
            rank_figures=[f for f in figures[section] if "-ranks" in f.key],
        )
        for i, section in enumerate(study.sections, start=1)
    ]
    places = runs.environments(study)
    return Contents(
        study=study,
        chapters=chapters,
        pairs=pairs,
        searches=searched,
        papers=list(papers.paper_tables(study, papers.compare(study))),
        problems=list(runs.problems(study)),
        all_runs=runs.all_runs(study, places),
        environments=places,
        settings=settings.differences(study),
        records=runs.record_links(study, out),
    )


def _tables(contents: Contents) -> list[Table]:
    """The tables of the page, in its order."""
    tables = [t for chapter in contents.chapters for t in (*chapter.results, *chapter.cost, *chapter.agreement)]
    tables += [chapter.ranks for chapter in contents.chapters if chapter.ranks is not None]
    return [*tables, *contents.papers, *contents.problems, contents.all_runs]


def _figure_files(figures: Sequence[Drawn]) -> dict[str, bytes]:
    files: dict[str, bytes] = {}
    for figure in figures:
        files[f"{FIGURES_FOLDER}/{figure.key}.svg"] = figure.svg.encode()
        files[f"{FIGURES_FOLDER}/{figure.key}.png"] = figure.png
    return files


def _write(files: dict[str, bytes], out: Path) -> tuple[Path, ...]:
    """Writes the files, and removes those of an earlier report that this one does not make: they are out of date."""
    folders = {(out / name).parent for name in files}
    try:
        for folder in folders - {out}:
            if folder.is_symlink():
                raise RecordError(
                    f"{folder} is a link, through which nothing is written. Name another folder with --out."
                )
        for folder in folders:
            remove_leftovers(folder)
        for name in _made_before(out) - files.keys():
            (out / name).unlink(missing_ok=True)
        for name, data in files.items():
            path = out / name
            path.parent.mkdir(parents=True, exist_ok=True)
            write_file(path, data)
        write_file(out / _MADE, json.dumps(sorted(files), indent=1) + "\n")
    except OSError as error:
        raise RecordError(
            f"Cannot write the report to {out}: {error}. Free some space, or name another folder with --out."
        ) from error
    return tuple(out / name for name in files)


def _made_before(out: Path) -> set[str]:
    try:
        names = json.loads(read_text(out / _MADE))
    except (OSError, ValueError, RecursionError):
        return set()
    if not isinstance(names, list):
        return set()
    # Never outside the folder, whatever the list says.
    inside = out.resolve()
    ours = (name for name in names if isinstance(name, str) and _OURS.fullmatch(name))
    return {name for name in ours if (out / name).parent.resolve().is_relative_to(inside) and not (out / name).is_dir()}
