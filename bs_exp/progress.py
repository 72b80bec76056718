"""Messages of a run while it runs: stages with their timings, progress bars, notes."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.text import Text

from bs_exp.printable import printable, printable_lines

Item = TypeVar("Item")

# What notes begin with that must not be missed.
WARNING = "WARNING: "
_REDRAW_SECONDS = 0.2


def _stderr() -> Console:
    # Progress goes to stderr, so that stdout holds the report alone. Soft wrapping: a log line stays one line.
    return Console(file=sys.stderr, soft_wrap=True, highlight=False)


class _NotebookDisplay:
    """Bars below a cell, drawn anew in place; Rich's own live display would need ipywidgets there."""

    def __init__(self, bars: Bars) -> None:
        from IPython.display import display  # there is one wherever there is a notebook

        self._bars, self._drawn = bars, time.monotonic()
        self._handle: Any = display(bars, display_id=True)

    def refresh(self) -> None:
        """Draws the bars, a few times per second."""
        if time.monotonic() - self._drawn >= _REDRAW_SECONDS:
            self._drawn = time.monotonic()
            self._handle.update(self._bars)

    def close(self) -> None:
        """Takes the bars away."""
        self._handle.update(Text(""))


@dataclass
class Progress:
    """Prints what a run does to stderr, and keeps it: `timings` in seconds by stage, `notes` in order.

    Progress bars are drawn on terminals and in notebooks only. `quiet` prints nothing.
    """

    quiet: bool = False
    timings: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    _stages: list[str] = field(default_factory=list)
    _failed: str | None = None
    _console: Console = field(default_factory=_stderr)
    _bars: Bars | None = None
    _notebook: _NotebookDisplay | None = None

    @property
    def current(self) -> str | None:
        """The innermost stage that is running; after a failure, the innermost stage that failed."""
        return self._failed or (self._stages[-1] if self._stages else None)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Times the block; the times of a stage entered twice are added, and an outer stage includes its inner ones."""
        name = str(name)  # one of bs_exp.records.stages, as plain text in the record
        self._stages.append(name)
        start = time.perf_counter()
        finished = False
        try:
            yield
            finished = True
        finally:
            seconds = time.perf_counter() - start
            self.timings[name] = self.timings.get(name, 0.0) + seconds
            self._stages.pop()
            if finished:
                self._print(f"{'  ' * len(self._stages)}{escape(printable(name)):<24}[dim]{seconds:>8.1f} s[/dim]")
            else:
                self._failed = self._failed or name

    def go_on(self) -> None:
        """Forgets the stage that failed, after an error that does not end the run."""
        self._failed = None

    def note(self, message: str) -> None:
        """Prints a line for the user, and adds it to `notes`, which the record keeps."""
        self.notes.append(message)
        self._print(f"[yellow]note:[/yellow] {escape(printable_lines(message))}")

    def warn(self, message: str) -> None:
        """A note that must not be missed: in red, and repeated at the end of the run."""
        self.notes.append(f"{WARNING}{message}")
        self._print(f"[bold red]{WARNING}{escape(printable_lines(message))}[/bold red]")

    def track(
        self, iterable: Iterable[Item], *, label: str | Callable[[], str], total: int | None = None
    ) -> Iterator[Item]:
        """The items, under a progress bar that is removed at the end, also at an early one.

        A label that is a function is called again after every item. `total` is the number of items, None if unknown.
        """
        in_notebook = self._console.is_jupyter
        if self.quiet or not (self._console.is_terminal or in_notebook):
            yield from iterable
            return
        # One live display per terminal: an inner bar joins the outer one's.
        outermost = self._bars is None
        bars = self._bars = self._bars or self._new_bars()
        if outermost:
            self._notebook = _NotebookDisplay(bars) if in_notebook else None
            if self._notebook is None:
                bars.start()
        title = label if callable(label) else lambda: label
        task = bars.add_task(title(), total=total)
        try:
            for item in iterable:
                yield item
                bars.update(task, advance=1, description=title())
                if self._notebook is not None:
                    self._notebook.refresh()
        finally:
            bars.remove_task(task)
            if outermost:
                if self._notebook is None:
                    bars.stop()
                else:
                    self._notebook.close()
                self._bars = self._notebook = None

    def _new_bars(self) -> Bars:
        return Bars(
            TextColumn("{task.description:<22}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
        )

    def _print(self, text: str) -> None:
        if not self.quiet:
            self._console.print(text)
