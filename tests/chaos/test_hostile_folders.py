"""`bs-exp report` on folders made to do harm: it ends soon, says what it skips, and touches nothing else."""

from __future__ import annotations

import json
import os
import random
import stat
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from bs_exp.records.pairs import PAIRS_FILE
from bs_exp.records.record import FILE_NAME
from bs_exp.records.sweep import PLAN_FILE
from bs_exp.reporting.report import PAGE
from tests.support import synthetic
from tests.support.campaign import Campaign
from tests.support.deaths import end, start_command
from tests.support.sweeps import digests

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(1200)]
# Wall time, beside whatever else the machine does.
SECONDS = 120.0
CONTROL = "\x1b[2J\x1b]0;owned\x07\x00\x9b1m\u202e"
FORBIDDEN = set("\x1b\x07\x00\x9b\u202e")
SCRIPT = "<script>alert(1)</script>"
VALUES: tuple[Any, ...] = (
    *(None, True, -1, 0, 1e308, -1e308, 5e-324, 10**400, 10**9, "NaN", "Infinity", "\ud800", CONTROL, "x" * 100_000),
    *([], {}, [[[]]], {"a": {"b": [None]}}, "../../home/mine", "/etc/passwd", "=1+1", "a\nb|c", SCRIPT, "", " "),
)
# Where results are read from, and where a report is written to.
READ = (FILE_NAME, PLAN_FILE, PAIRS_FILE, "study.json", "study.journal", ".hydra")
WRITTEN = (PAGE, "tables.md", ".made.json", "tables", "figures", "tables/all-runs.csv", "figures/.made.json")


def _special(place: Path, home: Path, draw: random.Random) -> str:
    """Puts something at a place that is no ordinary file of its kind; returns what."""
    place.parent.mkdir(parents=True, exist_ok=True)
    what = draw.choice(
        ("fifo", "zero", "mine", "folder", "self", "huge", "deep", "empty", "bytes", "device", "loop", "wide", "gone")
    )
    match what:
        case "fifo":
            os.mkfifo(place)
        case "zero":
            place.symlink_to("/dev/zero")
        case "mine":
            place.symlink_to(home / "mine")
        case "folder":
            place.symlink_to(home)
        case "self":
            place.symlink_to(place.name)
        case "huge":
            with place.open("wb") as file:
                file.truncate(2**36)
        case "deep":
            place.write_text(draw.choice(("[", '{"a":')) * 100_000)
        case "empty":
            place.touch()
        case "bytes":
            place.write_bytes(draw.randbytes(5000))
        case "device":
            with suppress(PermissionError):  # the right of root
                os.mknod(place, 0o666 | stat.S_IFCHR, os.makedev(1, 5))
        case "loop":
            place.symlink_to("..")
        case "wide":
            place.write_text(json.dumps({"notes": ["x"] * 300_000}))
        case _:
            place.symlink_to(home / "new")
    return f"{what} as {place.name}"


def _nodes(data: Any) -> Iterator[tuple[Any, Any]]:
    """Every place inside of plain data, as container and key."""
    for key, value in data.items() if isinstance(data, dict) else enumerate(data):
        yield data, key
        if isinstance(value, dict | list):
            yield from _nodes(value)


def _forge(folder: Path, draw: random.Random) -> str:
    """A record in which some values, or names, are others."""
    folder.mkdir(parents=True)
    data = synthetic.record("forged", draw.choice((0.2, 0.4))).to_dict()
    changed = []
    for container, key in draw.sample([*_nodes(data)], draw.randint(1, 3)):
        value = draw.choice(VALUES)
        changed.append(f"{key}={value!r:.40}")
        if isinstance(container, dict) and isinstance(value, str) and draw.random() < 0.3:
            container[value] = container.pop(key, None)
        else:
            container[key] = value
    (folder / FILE_NAME).write_text(json.dumps(data))
    return ", ".join(changed)


def _name(folder: Path, draw: random.Random) -> str:
    """A folder with a name that does harm, and half a record in it."""
    name = draw.choice(
        (CONTROL.replace("\0", ""), "n" * 255, "a\nb", "=1+1", os.fsdecode(b"\xff\xfe"), SCRIPT.replace("/", ""), "-x")
    )
    (folder / name).mkdir()
    (folder / name / FILE_NAME).write_text("{")
    return f"folder {name!r:.30}"


def _many(folder: Path, draw: random.Random) -> str:
    if draw.random() < 0.5:
        (folder / "/".join(["d"] * 300)).mkdir(parents=True)
        return "300 folders in each other"
    for i in range(200):
        (folder / f"bad{i}").mkdir()
        (folder / f"bad{i}" / FILE_NAME).write_text("{")
    return "200 damaged records"


def _make(folder: Path, home: Path, draw: random.Random) -> list[str]:
    """A folder with two good records and one to four hostile things; says which."""
    synthetic.write([synthetic.record(removed=removed) for removed in (0.2, 0.4)], folder)
    made = []
    for i in range(draw.randint(1, 4)):
        match draw.randrange(7):
            case 0 | 1:
                made.append(_forge(folder / f"forged{i}", draw))
            case 2 | 3:
                made.append(_special(folder / f"bad{i}" / draw.choice(READ), home, draw))
            case 4:
                # Of two at one place the second cannot be made.
                with suppress(OSError):
                    made.append(_special(folder / "report" / draw.choice(WRITTEN), home, draw))
            case 5:
                with suppress(FileExistsError):
                    made.append(_name(folder, draw))
            case _:
                with suppress(FileExistsError):
                    made.append(_many(folder, draw))
    if draw.random() < 0.1 and not (folder / "report").exists():
        (folder / "report").symlink_to(home)
        made.append("report is a link")
    return made


def _around(case: Path) -> dict[str, str]:
    """All files beside the received folder."""
    return {name: digest for name, digest in digests(case / "home").items()} | {
        path.name: "" for path in case.iterdir() if path.name != "log"
    }


def test_reports(tmp_path: Path, campaign: Callable[[str, float], Campaign]) -> None:
    found = campaign("hostile folders", 0.08)
    for number in found.cases(2000):
        case = tmp_path / str(number)
        received, home = case / "received", case / "home"
        home.mkdir(parents=True)
        (home / "mine").write_text("precious")
        made = _make(received, home, found.draw)
        before = _around(case)
        code = end(start_command(["report", str(received)], case, case / "log"), SECONDS)
        said = (case / "log").read_text(errors="surrogateescape")
        lost = [] if _around(case) == before else ["files outside of the folder were changed"]
        other = [] if code in (0, 1) else [f"it ended with {code}"]
        other += ["a traceback"] if "Traceback" in said or "unexpected" in said else []
        other += ["escape codes on the terminal"] if FORBIDDEN & set(said) else []
        other += ["more than a screen"] if len(said.splitlines()) > 60 else []
        if code == 0:
            for path in (received / "report").rglob("*"):
                if path.suffix in (".html", ".md", ".csv", ".svg") and path.is_file() and not path.is_symlink():
                    text = path.read_text(encoding="utf-8")
                    other += [f"control characters in {path.name}"] if FORBIDDEN & set(text) else []
                    other += [f"a script in {path.name}"] if SCRIPT in text and path.suffix == ".html" else []
        if other:
            other = [f"{'; '.join(other)}: {said[-500:]!r}"]
        found.count(f"{number}: {' and '.join(made)}", lost=lost, other=other)
        found.details["reported" if code == 0 else "refused"] += 1
    assert not found.faults, "\n".join(found.faults)
