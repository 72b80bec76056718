"""The Pareto front against its definition."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.study import StudyDirection

from bs_exp.search.drawing import draw
from bs_exp.search.results import Results, collect

BOTH = (StudyDirection.MINIMIZE, StudyDirection.MAXIMIZE)


def results(values: list[tuple[float, ...]], directions: list[StudyDirection]) -> Results:
    study = optuna.create_study(directions=directions)
    for number in range(len(values)):
        trial = study.ask()
        study.tell(trial, values[number])
    return collect(study, study.trials, [f"f{i}" for i in range(len(directions))])


def dominates(a: tuple[float, ...], b: tuple[float, ...], directions: list[StudyDirection]) -> bool:
    signs = [1.0 if d is StudyDirection.MINIMIZE else -1.0 for d in directions]
    pairs = [(s * x, s * y) for s, x, y in zip(signs, a, b, strict=True)]
    return all(x <= y for x, y in pairs) and any(x < y for x, y in pairs)


@pytest.mark.parametrize("directions", [*product(BOTH, repeat=2), BOTH[:1] * 3], ids=str)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_front_is_what_nothing_dominates(directions: tuple[StudyDirection, ...], data: st.DataObject) -> None:
    wanted = list(directions)
    # Few values, so that points are equal in one objective, or in all.
    values = data.draw(st.lists(st.tuples(*[st.integers(0, 4).map(float)] * len(wanted)), min_size=1, max_size=12))
    oracle = {v for v in values if not any(dominates(other, v, wanted) for other in values)}
    front = [point.values for point in results(values, wanted).best]
    assert front == sorted(oracle)
    assert len(front) == len(set(front))


@pytest.mark.parametrize("directions", [BOTH[:1], list(BOTH)], ids=str)
def test_trials_that_another_process_ends_meanwhile_are_not_among_the_best_yet(
    directions: list[StudyDirection],
) -> None:
    study, names = optuna.create_study(directions=directions), ["f0", "f1"][: len(directions)]
    trials = [study.ask() for _ in range(3)]
    study.tell(trials[1], [5.0] * len(directions))
    seen = study.trials
    for trial, value in ((trials[0], 0.0), (trials[2], 1.0)):
        study.tell(trial, [value, 9.0][: len(directions)])
    assert [point.number for point in collect(study, seen, names).best] == [1]
    assert [point.number for point in collect(study, study.trials, names).best] == [0]


def test_three_objectives_are_drawn_pair_by_pair(tmp_path: Path) -> None:
    found = results([(1.0, 2.0, 3.0), (2.0, 1.0, 3.0), (3.0, 3.0, 3.0)], [StudyDirection.MINIMIZE] * 3)
    png, svg = draw(found, tmp_path)
    assert png.stat().st_size > 10_000
    drawn = svg.read_text()
    assert drawn.startswith("<?xml") and drawn.count('<g id="axes_') == 3


def test_nothing_is_drawn_of_nothing(tmp_path: Path) -> None:
    study = optuna.create_study()
    study.tell(study.ask(), state=optuna.trial.TrialState.FAIL)
    found = collect(study, study.trials, ["loss"])
    assert (found.best, found.completed, draw(found, tmp_path)) == ((), (), [])
