"""`bs-exp report` and `bs-exp figures`: from the records of finished runs to something to look at."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from bs_exp.errors import RecordError

COMMANDS = ("report", "figures")


def run_command(arguments: Sequence[str]) -> None:
    """Runs the command that `arguments` begin with; RecordError if there is nothing to report on."""
    # Imported late: --help answers at once.
    from bs_exp.reporting.report import FIGURES_FOLDER, PAGE, write_figures, write_report

    options = _parser().parse_args(list(arguments))
    default = options.folders[0] / "report"
    if options.out is None and default.is_symlink():  # a received folder must not choose where its report goes
        raise RecordError(f"{default} is a link, through which nothing is written. Name a folder with --out.")
    if options.command == "report":
        written = write_report(options.folders, options.out or default)
        result = written.folder / PAGE
    else:
        written = write_figures(options.folders, options.out or default / FIGURES_FOLDER)
        result = written.folder
    for item in written.study.skipped:
        print(f"skipped {item.path}: {item.reason}", file=sys.stderr)
    points = len(written.study.points)
    print(f"{points} record{'' if points == 1 else 's'}, {len(written.files)} files")
    print(result)


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
