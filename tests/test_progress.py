"""The progress times stages, counts progress on terminals only, and remembers what it said."""

from __future__ import annotations

import io
import sys
from types import ModuleType
from typing import Any, cast

import pytest
from rich.console import Console

from bs_exp.progress import Progress


@pytest.fixture
def screen() -> io.StringIO:
    return io.StringIO()


def _progress_on(screen: io.StringIO, *, terminal: bool) -> Progress:
    return Progress(_console=Console(file=screen, force_terminal=terminal, soft_wrap=True, highlight=False))


def test_a_stage_entered_twice_adds_up() -> None:
    progress = Progress(quiet=True)
    for _ in range(2):
        with progress.stage("load"):
            assert progress.current == "load"
    first = progress.timings["load"]
    with progress.stage("outer"), progress.stage("load"):
        pass
    assert progress.timings.keys() == {"load", "outer"}
    assert progress.timings["load"] > first
    assert progress.current is None


def test_failure_remembers_its_innermost_stage(screen: io.StringIO) -> None:
    progress = _progress_on(screen, terminal=False)
    with pytest.raises(KeyboardInterrupt), progress.stage("compress"), progress.stage("calibrate"):
        raise KeyboardInterrupt
    assert progress.current == "calibrate"
    assert progress.timings.keys() == {"compress", "calibrate"}
    assert screen.getvalue() == ""


def test_a_failure_that_ended_nothing_is_forgotten(screen: io.StringIO) -> None:
    progress = _progress_on(screen, terminal=False)
    with pytest.raises(ValueError), progress.stage("estimate"):
        raise ValueError
    progress.go_on()
    with progress.stage("evaluate"):
        assert progress.current == "evaluate"


def test_notes_are_shown_and_kept(screen: io.StringIO) -> None:
    progress = _progress_on(screen, terminal=False)
    progress.note("16 of [16] came from the cache")
    assert progress.notes == ["16 of [16] came from the cache"]
    assert screen.getvalue() == "note: 16 of [16] came from the cache\n"


def test_no_bar_without_a_terminal(screen: io.StringIO) -> None:
    assert list(_progress_on(screen, terminal=False).track([1, 2], label="counting")) == [1, 2]
    assert screen.getvalue() == ""


def test_bars_nest_and_go_away(screen: io.StringIO) -> None:
    progress = _progress_on(screen, terminal=True)
    for _ in progress.track(range(2), label="outer", total=2):
        assert list(progress.track("ab", label="inner")) == ["a", "b"]
    assert "outer" in screen.getvalue()
    with progress.stage("next"):  # prints below, not over a bar that stayed
        pass
    assert screen.getvalue().rstrip().endswith("s\x1b[0m")


def test_a_bar_that_ends_early_goes_away_too(screen: io.StringIO) -> None:
    progress = _progress_on(screen, terminal=True)
    for _ in progress.track(range(100), label="stopped"):
        break
    assert progress._bars is None
    assert list(progress.track([1], label="again")) == [1]


def test_quiet_says_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    progress = Progress(quiet=True)
    with progress.stage("load"):
        progress.note("kept")
    assert list(progress.track([1], label="x")) == [1]
    assert capfd.readouterr() == ("", "")
    assert progress.notes == ["kept"]


def test_a_notebook_draws_bars_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[str] = []

    class Handle:
        def update(self, shown: Any) -> None:
            text = Console(file=io.StringIO(), width=100)
            text.print(shown)
            drawn.append(cast(io.StringIO, text.file).getvalue().strip())

    # IPython's: nothing here needs it, so it may not be installed.
    ipython = ModuleType("IPython.display")
    vars(ipython).update(display=lambda shown, display_id=None: Handle())
    monkeypatch.setitem(sys.modules, "IPython", ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", ipython)
    monkeypatch.setattr("bs_exp.progress._REDRAW_SECONDS", 0.0)
    progress = Progress(_console=Console(file=io.StringIO(), force_jupyter=True))
    for _ in progress.track(range(2), label="outer", total=2):
        assert list(progress.track(range(3), label="inner", total=3)) == [0, 1, 2]
    assert len(drawn) == 2 * (3 + 1) + 1
    assert "outer" in drawn[0] and "inner" in drawn[0] and "1/3" in drawn[0]
    assert drawn[-1] == "" and "2/2" in drawn[-2]
    progress.quiet = True
    assert list(progress.track(range(2), label="outer")) == [0, 1] and len(drawn) == 9
