"""The commands beside runs and sweeps: pages and figures of runs, the cache, export and upload of saved models."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bs_exp.cli.export_command import FORMS
from bs_exp.errors import RecordError
from bs_exp.printable import printable


@dataclass(frozen=True)
class Command:
    """How a command is called, and what it does."""

    usage: str
    told: str


COMMANDS = {
    "report": Command("FOLDER ...", "one HTML page, CSV, Markdown and figures of finished runs"),
    "figures": Command("FOLDER ...", "every figure anew, as SVG and PNG"),
    "cache": Command("[prune --max-gb N] [FOLDER]", "what the cache holds: kind, model, size, last use; or less of it"),
    "export": Command("OUT/model --to dense|onnx", "a saved compressed model as ordinary layers, or for onnxruntime"),
    "push": Command("OUT/model ORG/NAME", "a saved compressed model to the hub, with its card and its recipe"),
}
# Skipped files beyond these are named on the page alone.
_MOST_SKIPPED = 20


def run_command(arguments: Sequence[str]) -> None:
    """Runs the command that `arguments` begin with; an error of `bs_exp.errors` if it has nothing to work on."""
    options = _options(arguments)
    # Imported late: --help answers at once.
    if options.command == "cache":
        from bs_exp.cli.cache_command import print_cache, prune_cache

        if options.max_gb is None:
            print_cache(options.folder)
        else:
            prune_cache(options.folder, options.max_gb)
    elif options.command == "export":
        from bs_exp.cli.export_command import export

        exported = export(options.folder, options.to, options.out)
        for title, text in exported.facts.items():
            print(printable(f"{title:<9}{text}"))
        print(printable(str(exported.folder)))
    elif options.command == "push":
        from bs_exp.cli.push_command import push

        push(options)
    else:
        _report(options)


def _report(options: argparse.Namespace) -> None:
    from bs_exp.reporting.report import FIGURES_FOLDER, PAGE, write_figures, write_report

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


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    """The parsed arguments; `cache prune` is `cache` with a limit."""
    parser, given = _parser(), list(arguments)
    prunes = given[:2] == ["cache", "prune"]
    if prunes:
        del given[1]
    options = parser.parse_args(given)
    if options.command == "cache" and prunes != (options.max_gb is not None):
        parser.error("it is `bs-exp cache [FOLDER]`, or `bs-exp cache prune --max-gb N [FOLDER]`")
    if options.command == "cache" and prunes and not options.max_gb >= 0:
        parser.error(f"--max-gb must be at least 0, got {options.max_gb}")
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bs-exp", description="Commands beside runs and sweeps.")
    added = parser.add_subparsers(dest="command", required=True)
    commands = {name: added.add_parser(name, help=about.told) for name, about in COMMANDS.items()}
    for name, place in (("report", "FOLDER/report"), ("figures", "FOLDER/report/figures")):
        commands[name].add_argument(
            "folders", metavar="FOLDER", nargs="+", type=Path, help="a run, a sweep, or what holds them"
        )
        commands[name].add_argument(
            "--out", metavar="OUT", type=Path, help=f"where to write (default: {place} of the first folder)"
        )
    commands["cache"].add_argument(
        "folder", metavar="FOLDER", nargs="?", type=Path, help="cache.dir of runs (default: outputs/cache)"
    )
    commands["cache"].add_argument(
        "--max-gb", metavar="N", type=float, help="with prune: remove the longest unused until N GiB are left"
    )
    export = commands["export"]
    export.add_argument("folder", metavar="MODEL", type=Path, help="a saved model, such as RUN_FOLDER/model")
    forms = "; ".join(f"{name}: {told}" for name, told in FORMS.items())
    export.add_argument("--to", choices=tuple(FORMS), required=True, help=forms)
    export.add_argument("--out", metavar="OUT", type=Path, help="where to write (default: MODEL-dense, MODEL-onnx)")
    push = commands["push"]
    push.add_argument("folder", metavar="MODEL", type=Path, help="a saved model, such as RUN_FOLDER/model")
    push.add_argument("name", metavar="ORG/NAME", help="its name on the hub; the repository is made if it is not there")
    push.add_argument("--private", action="store_true", default=None, help="make a new repository private")
    push.add_argument("--revision", metavar="BRANCH", help="the branch to write to (default: main)")
    push.add_argument("--create-pr", action="store_true", help="open a pull request instead")
    push.add_argument("--dry-run", action="store_true", help="list what would go up, and send nothing")
    return parser
