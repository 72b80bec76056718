"""`bs-exp report` and `bs-exp figures`: from the records of finished runs to something to look at."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from bs_exp.errors import RecordError
from bs_exp.printable import printable

COMMANDS = ("report", "figures")
# Skipped files beyond these are named on the page alone.
_MOST_SKIPPED = 20


def run_command(arguments: Sequence[str]) -> None:
    """Runs the command that `arguments` begin with; RecordError if there is nothing to report on."""
    # Imported late: --help answers at once.
    from bs_exp.reporting.report import FIGURES_FOLDER, PAGE, write_figures, write_report

    options = _parser().parse_args(list(arguments))
    default = options.folders[0] / "report"
    if options.out is None:  # a received folder must not choose where its report goes
        for place in (default, default / FIGURES_FOLDER):
            if place.is_symlink():
                raise RecordError(f"{place} is a link, through which nothing is written. Name a folder with --out.")
    if options.command == "report":
        written = write_report(options.folders, options.out or default)
        result = written.folder / PAGE
    else:
        written = write_figures(options.folders, options.out or default / FIGURES_FOLDER)
        result = written.folder
    skipped = written.study.skipped
    for item in skipped[:_MOST_SKIPPED]:
        print(printable(f"skipped {item.path}: {item.reason}"), file=sys.stderr)
    if len(skipped) > _MOST_SKIPPED:
        print(f"skipped {len(skipped) - _MOST_SKIPPED:,} more files, see the page of the report", file=sys.stderr)
    points = len(written.study.points)
    print(f"{points} record{'' if points == 1 else 's'}, {len(written.files)} files")
    print(printable(str(result)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bs-exp", description="Looks at finished runs; their record.json is all it needs."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    report = commands.add_parser("report", help="one HTML page, CSV, Markdown and figures")
    figures = commands.add_parser("figures", help="every figure anew, as SVG and PNG")
    for command, place in ((report, "FOLDER/report"), (figures, "FOLDER/report/figures")):
        command.add_argument(
            "folders", metavar="FOLDER", nargs="+", type=Path, help="a run, a sweep, or what holds them"
        )
        command.add_argument(
            "--out", metavar="OUT", type=Path, help=f"where to write (default: {place} of the first folder)"
        )
    return parser
