"""Figures of a search by Optuna's own visualization: optimisation history, importances, parallel coordinates."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from bs_exp.records import metrics
from bs_exp.records.trials import TrialTable
from bs_exp.reporting import drawing, formats
from bs_exp.reporting.drawing import Drawn

if TYPE_CHECKING:
    import optuna
    from matplotlib.figure import Figure
    from optuna.distributions import BaseDistribution

# fANOVA needs a handful of trials before it means anything.
_FEWEST = 5
_MOST_PARAMETERS = 20
_SEED = 0


def search_figures(tables: Sequence[TrialTable]) -> list[Drawn]:
    """Three figures for every objective of every search with enough completed trials."""
    if not any(len(table.trials) > 1 for table in tables):
        return []
    from matplotlib import pyplot as plt

    found: list[Drawn] = []
    for i, table in enumerate(tables, start=1):
        if len(table.trials) > 1:
            study = _study(table)
            for j, name in enumerate(table.objectives):
                # Optuna sets a style of its own, for all later figures too: it ends with the context.
                with drawing.house_style():
                    try:
                        found += _figures(study, table, j, name, f"search-{i}-{formats.file_key(name)}")
                    finally:
                        plt.close("all")
    return found


def _figures(study: optuna.Study, table: TrialTable, j: int, name: str, key: str) -> Iterator[Drawn]:
    from optuna.exceptions import ExperimentalWarning
    from optuna.importance import FanovaImportanceEvaluator, get_param_importances
    from optuna.visualization import matplotlib as plots

    target: Callable[[Any], float] = lambda trial: trial.values[j]  # noqa: E731
    title = metrics.title(name)
    told: dict[str, Any] = {"target": target, "target_name": formats.short(title)}
    best = (min if table.directions[j] == "minimize" else max)(table.trials, key=lambda trial: trial.values[j])
    value = formats.metric(name, best.values[j])
    about = f"{len(table.trials)} trials of {table.study}; the best is trial {best.number}: {value}."
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        # Of one objective, without a target, it draws the best so far too.
        alone = {"target_name": told["target_name"]} if len(table.objectives) == 1 else told
        drawn = plots.plot_optimization_history(study, **alone)
        yield _render(drawn, f"{key}-history", f"Search: {title} from trial to trial", about)
        varied = _varied(study)
        if not varied or len(table.trials) < _FEWEST:
            return
        if len(varied) > 1:
            evaluator = FanovaImportanceEvaluator(seed=_SEED)
            found = get_param_importances(study, evaluator=evaluator, params=varied, target=target)
            words = ", ".join(f"{param} {share:.0%}" for param, share in list(found.items())[:5])
            drawn = plots.plot_param_importances(study, evaluator=evaluator, params=varied, **told)
            caption = "Share of the variance between trials that fANOVA ascribes to each parameter; it says nothing of "
            yield _render(
                drawn,
                f"{key}-importances",
                f"Search: what {title} depends on",
                f"{caption}what was not tried. {words}.",
            )
            drawn = plots.plot_parallel_coordinate(study, params=varied, **told)
            yield _render(
                drawn,
                f"{key}-parallel",
                f"Search: parameters and {title}",
                f"One line per trial, through its parameters. {about}",
                wide=True,
            )


def _study(table: TrialTable) -> optuna.Study:
    """The trials as a study in memory; parameters over the values that were tried."""
    import optuna
    from optuna.study import StudyDirection

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    distributions = {name: made for name in table.params if (made := _distribution(table, name)) is not None}
    study = optuna.create_study(directions=[StudyDirection[d.upper()] for d in table.directions])
    for trial in table.trials:
        params = {name: value for name, value in trial.params.items() if name in distributions}
        for name, value in params.items():
            if isinstance(distributions[name], optuna.distributions.CategoricalDistribution):
                params[name] = str(value)
        known = {name: distributions[name] for name in params}
        study.add_trial(optuna.trial.create_trial(params=params, distributions=known, values=list(trial.values)))
    return study


def _distribution(table: TrialTable, name: str) -> BaseDistribution | None:
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    values = [trial.params[name] for trial in table.trials if name in trial.params]
    numbers = [value for value in values if isinstance(value, float)]
    if not values:
        return None
    if len(numbers) < len(values):
        return CategoricalDistribution(sorted(set(map(str, values))))
    low, high = min(numbers), max(numbers)
    return FloatDistribution(low, high, log=name in table.logarithmic and low > 0 and not math.isclose(low, high))


def _varied(study: optuna.Study) -> list[str]:
    """Parameters that every trial has, with several values: only these can be compared."""
    trials = study.get_trials(deepcopy=False)
    shared = set.intersection(*(set(trial.params) for trial in trials))
    varied = [name for name in trials[0].params if name in shared and len({t.params[name] for t in trials}) > 1]
    return varied[:_MOST_PARAMETERS]


def _render(axes: Any, key: str, title: str, caption: str, *, wide: bool = False) -> Drawn:
    """Optuna's figure in the colours of the page."""
    from matplotlib.text import Text

    figure: Figure = axes.figure
    figure.set_size_inches(2 * drawing.WIDTH if wide else drawing.WIDTH, drawing.HEIGHT + 0.3)
    for part in figure.axes:
        for place in ("left", "center", "right"):
            part.set_title("", loc=place)
        for axis in (part.xaxis, part.yaxis):
            axis.label.set_fontsize(9)
            if axis.get_scale() == "log":  # Mathematical text is off in our style
                axis.set_major_formatter(lambda value, _: f"{value:g}")
                axis.set_minor_formatter(lambda value, _: f"{value:g}")
        part.set_facecolor("none")
        part.grid(visible=False)
        if not wide:
            part.grid(visible=True, color=drawing.FAINT, linewidth=0.6)
        for spine in part.spines.values():
            spine.set_color(drawing.INK)
        part.tick_params(colors=drawing.INK, labelsize=8)
        for text in part.findobj(Text):
            assert isinstance(text, Text)
            text.set_color(drawing.INK)
        if (legend := part.get_legend()) is not None:
            if len(legend.get_texts()) > 1:
                part.legend(loc="best", labelcolor=drawing.INK)
            else:  # the title says it
                legend.remove()
    figure.set_facecolor(drawing.PAPER)
    figure.tight_layout()
    words = re.sub(r"\s+", " ", f"{title}. {caption}")
    return drawing.render(figure, key, title, caption, f"Chart by Optuna. {words}", wide=wide)
