"""A campaign of faults: cases as long as its time lasts, what each showed, and the table of all campaigns."""

from __future__ import annotations

import json
import os
import random
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SECONDS = float(os.environ.get("CHAOS_SECONDS", "900"))
"""Seconds that all campaigns may take together; each has a share."""
SEED = int(os.environ.get("CHAOS_SEED", "0"))
FOLDER = Path(os.environ.get("CHAOS_FOLDER", "outputs/chaos")).absolute()


@dataclass
class Campaign:
    """Tries faults and counts: `tried`, `passed` (all was as it should be), and `lost`.

    Lost is every result that is gone, doubled, or changed without a word. `faults` says what went wrong, lost or not.
    """

    name: str
    share: float
    tried: int = 0
    passed: int = 0
    lost: int = 0
    faults: list[str] = field(default_factory=list)
    details: Counter[str] = field(default_factory=Counter)
    _start: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.draw = random.Random(f"{SEED} {self.name}")

    @property
    def over(self) -> bool:
        """Whether the campaign's share of the time is spent."""
        return time.monotonic() - self._start > self.share * SECONDS

    def cases(self, most: int) -> Iterator[int]:
        """0, 1, ...: the first in any case, the others as long as time lasts."""
        for case in range(most):
            if case and self.over:
                return
            yield case

    def count(self, case: str, *, tried: int = 1, lost: Iterable[str] = (), other: Iterable[str] = ()) -> None:
        """Counts `tried` faults of one case, and what was lost or otherwise wrong after them."""
        lost, wrong = list(lost), list(other)
        self.tried += tried
        self.lost += len(lost)
        self.passed += max(0, tried - len(lost) - len(wrong))
        self.faults += [f"{case}: {what}" for what in (*(f"LOST {what}" for what in lost), *wrong)]

    def close(self) -> None:
        """Writes what was counted to FOLDER/NAME.json."""
        FOLDER.mkdir(parents=True, exist_ok=True)
        found: dict[str, Any] = {
            "campaign": self.name,
            "seed": SEED,
            "seconds": round(time.monotonic() - self._start),
            "tried": self.tried,
            "passed": self.passed,
            "lost": self.lost,
            "details": dict(sorted(self.details.items())),
            "faults": self.faults,
        }
        (FOLDER / f"{self.name.replace(' ', '-')}.json").write_text(json.dumps(found, indent=2) + "\n")


def table() -> list[str]:
    """All campaigns that were run into FOLDER, as a table in Markdown; also written to FOLDER/chaos.md."""
    lines = ["| Campaign | Tried | Passed | Lost | Seconds | What |", "|---|---:|---:|---:|---:|---|"]
    for path in sorted(FOLDER.glob("*.json")):
        found = json.loads(path.read_text())
        details = ", ".join(f"{count} {what}" for what, count in found["details"].items())
        numbers = " | ".join(str(found[key]) for key in ("tried", "passed", "lost", "seconds"))
        lines.append(f"| {found['campaign']} | {numbers} | {details} |")
    if len(lines) > 2:
        (FOLDER / "chaos.md").write_text("\n".join(lines) + "\n")
    return lines
