"""Disks that fill up at any byte: the command says so, the next one with space goes on, nothing of others is lost."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from bs_exp.reporting.report import PAGE
from bs_exp.search.storage import file_of, open_storage
from tests.support.campaign import Campaign
from tests.support.deaths import FullDisk, end, start_command
from tests.support.sweeps import differences, digests, search_command, signature, sweep_command

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(1200)]
SECONDS = 240.0
RATIO = "0.8"  # two points
# What lies on the small disk, and the most bytes of it that are free.
PLACES = {
    "cache": 300_000,
    "records and models": 450_000,
    "journal": 12_000,
    "sqlite": 100_000,
    "report": 600_000,
}
# What a message about a full disk must say; which file it was is in it as well.
REASONS = ("No space left", "File too large", "disk is full", "database or disk", "disk I/O error", "not enough space")


class Disk:
    """A file system of 4 MB in memory, of which all but some bytes can be taken."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._filler = folder / "filler"

    def leave(self, size: int) -> None:
        """Takes all but about `size` bytes (whole pages)."""
        found = os.statvfs(self.folder)
        with self._filler.open("wb") as file:
            file.write(b"\0" * max(0, found.f_bavail * found.f_frsize - size))

    def make_room(self) -> None:
        self._filler.unlink(missing_ok=True)


@contextmanager
def _mounted(folder: Path) -> Iterator[Disk]:
    """A small disk; skips the test where none may be mounted."""
    folder.mkdir()
    mount = shutil.which("mount")
    command = [mount or "mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    if mount is None or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("no file system can be mounted here (root's right): see the campaign with limited files")
    try:
        yield Disk(folder)
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def _on(disk: Path, place: str, tiny: tuple[str, ...], reported: Path) -> list[str]:
    """The command whose files at a place are on the disk."""
    match place:
        case "cache":
            return sweep_command(tiny, f"cache.dir={disk}/cache", ratios=RATIO)
        case "records and models":
            return sweep_command(tiny, f"hydra.sweep.dir={disk}/sweep", ratios=RATIO)
        case "journal":
            return search_command(tiny, f"hydra.sweeper.storage={disk}/study.journal")
        case "sqlite":
            return search_command(tiny, f"hydra.sweeper.storage=sqlite:///{disk}/study.db")
        case _:
            return ["report", str(reported), "--out", f"{disk}/report"]


def _unclear(code: int | None, said: str) -> list[str]:
    """What is wrong with how a command ended that had too little space."""
    if code == 0:
        return []
    wrong = ["it did not end"] if code is None else []
    wrong += [f"exit code {code}"] if code is not None and code < 0 else []
    wrong += ["a traceback"] if "Traceback" in said else []
    wrong += [] if any(reason in said for reason in REASONS) else ["no word of space"]
    wrong += ["unexpected"] if "unexpected" in said else []
    return [f"{', '.join(wrong)}: {said[-800:]}"] if wrong else []


def _completed(place: str, copy: Path) -> dict[int, tuple[dict[str, Any], list[float]]]:
    """The completed trials of a study: number, parameters, values. Read from a copy: opening a study may mend it."""
    file = file_of(place)
    assert file is not None
    copy.mkdir()
    for path in file.parent.glob(f"{file.name}*"):
        shutil.copy(path, copy)
    storage = open_storage(place.replace(str(file.parent), str(copy)), setting="storage")
    names = optuna.get_all_study_names(storage)
    trials = optuna.load_study(study_name=names[0], storage=storage).trials if names else []
    return {t.number: (t.params, t.values) for t in trials if t.state is TrialState.COMPLETE}


def _check(place: str, folder: Path, sweep: Path, storage: str, expected: dict[str, object]) -> list[str]:
    """What was lost of a sweep, or of a search, that has ended."""
    if place in ("journal", "sqlite"):
        done = _completed(storage, folder / "at-the-end")
        ratios = sorted(params["retain_ratio"] for params, _ in done.values())
        return [] if ratios == [0.4, 0.5, 0.6, 0.7, 0.8, 0.9] else [f"the points {ratios} are completed"]
    return differences(signature(sweep), expected)


@pytest.mark.parametrize("kind", ["small disk", "limited files"])
def test_full_disks(
    kind: str, tmp_path: Path, tiny: tuple[str, ...], campaign: Callable[[str, float], Campaign]
) -> None:
    reference = tmp_path / "reference"
    reference.mkdir()
    assert end(start_command(sweep_command(tiny, ratios=RATIO), reference, reference / "log"), SECONDS) == 0
    expected = signature(reference / "sweep")
    assert len(expected) == 2
    if kind == "limited files":
        _fill(campaign("full disks, limited files", 0.07), None, tmp_path, tiny, expected)
    else:
        with _mounted(tmp_path / "disk") as disk:
            _fill(campaign("full disks, tmpfs", 0.1), disk, tmp_path, tiny, expected)


def _fill(
    found: Campaign, disk: Disk | None, tmp_path: Path, tiny: tuple[str, ...], expected: dict[str, object]
) -> None:
    for case in found.cases(200):
        place = tuple(PLACES)[case % len(PLACES)]
        free = int(found.draw.uniform(0, 1) ** 2 * PLACES[place])
        folder = tmp_path / str(case)
        folder.mkdir()
        root = folder / "disk" if disk is None else disk.folder
        for old in root.iterdir() if root.exists() else ():
            shutil.rmtree(old) if old.is_dir() else old.unlink()
        root.mkdir(exist_ok=True)
        # What somebody else has on the disk, with space and before this command.
        (root / "others").mkdir()
        (root / "others" / "file").write_bytes(bytes(range(256)) * 40)
        others = digests(root / "others")
        command = _on(root, place, tiny, tmp_path / "reference" / "sweep")
        sweep = root / "sweep" if place == "records and models" else folder / "sweep"
        storage = f"sqlite:///{root}/study.db" if place == "sqlite" else f"{root}/study.journal"
        log, death = folder / "log", None
        if disk is None:
            death = FullDisk(free)
        else:
            disk.leave(free)
        code = end(start_command(command, folder, log, death), SECONDS)
        unclear = _unclear(code, log.read_text(errors="replace") if log.exists() else "")
        if code == 0:
            found.details["had space enough"] += 1
        before = signature(sweep)
        if disk is not None:
            disk.make_room()
        done = _completed(storage, folder / "before") if place in ("journal", "sqlite") and code == 1 else {}
        code = end(start_command(command, folder, log), SECONDS)
        other = [*unclear, *([f"with space: {code}: {log.read_text()[-800:]}"] if code else [])]
        lost = [f"file {name} of somebody else" for name in others if digests(root / "others") != others]
        if place == "report":
            other += [] if (root / "report" / PAGE).is_file() or code else ["no page was written"]
        else:
            lost += differences(before, expected, whole=False) if place not in ("journal", "sqlite") else []
            lost += _check(place, folder, sweep, storage, expected)
        if done:
            now = _completed(storage, folder / "after")
            lost += [
                f"trial {number} was completed and is no more" for number in done if now.get(number) != done[number]
            ]
        found.count(f"{place}, {free} bytes free", lost=lost, other=other)
        found.details[place] += 1
    assert not found.faults, "\n".join(found.faults)
