"""The journal times stages, counts progress on terminals only, and remembers what it said."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from bs_exp.progress import Journal


@pytest.fixture
def screen() -> io.StringIO:
    return io.StringIO()


def _journal(screen: io.StringIO, *, terminal: bool) -> Journal:
    return Journal(_console=Console(file=screen, force_terminal=terminal, soft_wrap=True, highlight=False))


def test_a_stage_entered_twice_adds_up() -> None:
    journal = Journal(quiet=True)
    for _ in range(2):
        with journal.stage("load"):
            assert journal.current == "load"
    first = journal.timings["load"]
    with journal.stage("outer"), journal.stage("load"):
        pass
    assert journal.timings.keys() == {"load", "outer"}
    assert journal.timings["load"] > first
    assert journal.current is None


def test_failure_remembers_its_innermost_stage(screen: io.StringIO) -> None:
    journal = _journal(screen, terminal=False)
    with pytest.raises(KeyboardInterrupt), journal.stage("compress"), journal.stage("calibrate"):
        raise KeyboardInterrupt
    assert journal.current == "calibrate"
    assert journal.timings.keys() == {"compress", "calibrate"}
    assert screen.getvalue() == ""


def test_notes_are_shown_and_kept(screen: io.StringIO) -> None:
    journal = _journal(screen, terminal=False)
    journal.note("16 of [16] came from the cache")
    assert journal.notes == ["16 of [16] came from the cache"]
    assert screen.getvalue() == "note: 16 of [16] came from the cache\n"


def test_no_bar_without_a_terminal(screen: io.StringIO) -> None:
    assert list(_journal(screen, terminal=False).track([1, 2], label="counting")) == [1, 2]
    assert screen.getvalue() == ""


def test_bars_nest_and_go_away(screen: io.StringIO) -> None:
    journal = _journal(screen, terminal=True)
    for _ in journal.track(range(2), label="outer", total=2):
        assert list(journal.track("ab", label="inner")) == ["a", "b"]
    assert "outer" in screen.getvalue()
    with journal.stage("next"):  # prints below, not over a bar that stayed
        pass
    assert screen.getvalue().rstrip().endswith("s\x1b[0m")


def test_a_bar_that_ends_early_goes_away_too(screen: io.StringIO) -> None:
    journal = _journal(screen, terminal=True)
    for _ in journal.track(range(100), label="stopped"):
        break
    assert journal._progress is None
    assert list(journal.track([1], label="again")) == [1]


def test_quiet_says_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    journal = Journal(quiet=True)
    with journal.stage("load"):
        journal.note("kept")
    assert list(journal.track([1], label="x")) == [1]
    assert capfd.readouterr() == ("", "")
    assert journal.notes == ["kept"]
