"""Campaigns of faults (`make chaos`): left out unless asked for; their figures stand in one table at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.support.campaign import SEED, Campaign, table


@pytest.fixture
def campaign() -> Iterator[Callable[[str, float], Campaign]]:
    """Makes a campaign, by its name and its share of the time; its figures are written when the test ends."""
    made: list[Campaign] = []

    def make(name: str, share: float) -> Campaign:
        made.append(Campaign(name, share))
        return made[-1]

    yield make
    for one in made:
        one.close()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The table of the campaigns that were run."""
    if len(lines := table()) > 2:
        terminalreporter.section(f"chaos, seed {SEED}")
        terminalreporter.write_line("\n".join(lines))
