"""Uses the candidate recipe that stays closest to the dense model on held-out windows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bs_exp.contracts import check_members
from bs_exp.corpora.sampling import hold_out
from bs_exp.corpora.windows import part_of
from bs_exp.errors import ConfigError, DataError
from bs_exp.protocols import Contest, PlanObjective
from bs_exp.types import TokenWindows
from bs_exp.validation import check_choice, check_seed, check_share, is_plain, shown

PARTS = ("sharing", "whitening", "importance", "allocation", "layout", "schedule")
_ROUNDS = ("single", "all")


@dataclass(frozen=True, kw_only=True)
class MeasuredSelection:
    """Compresses by every candidate on a part of the calibration windows, and measures the results on the others.

    A candidate replaces parts of the recipe by other strategies; one that replaces nothing is the recipe itself. The
    share `holdout` of the windows, drawn by `seed`, enters no candidate's statistics. Candidates are measured without
    the recipe's update and, with `rounds=single`, after one round of compression, which compares groupings and metrics
    as well at a fraction of the cost. The best one is compressed again with its whole schedule and, if `recalibrate` is
    set, with all windows. Losses are measured, since predicted ones misjudge sharing when much is removed.
    """

    candidates: Mapping[str, Mapping[str, Any]]
    objective: str
    holdout: float
    rounds: str
    recalibrate: bool
    seed: int

    def __post_init__(self) -> None:
        for name, parts in self.candidates.items():
            if not isinstance(parts, Mapping | None):
                raise ConfigError(
                    f"candidates.{name} must say which parts it replaces, as in +sharing@selection.candidates.{name}"
                    f".sharing=all, got {shown(parts)}."
                )
        object.__setattr__(
            self, "candidates", {str(name): dict(parts or {}) for name, parts in self.candidates.items()}
        )
        if not self.candidates:
            raise ConfigError("candidates is empty: name some, or use selection=none.")
        for name, parts in self.candidates.items():
            if unknown := sorted(set(parts) - set(PARTS)):
                raise ConfigError(
                    f"candidates.{name} replaces {unknown[0]}, which is no part that candidates may differ in. Parts: "
                    f"{', '.join(PARTS)}."
                )
            if plain := [part for part, value in parts.items() if is_plain(value)]:
                raise ConfigError(
                    f"candidates.{name}.{plain[0]} must be a strategy, as in +{plain[0]}@selection.candidates.{name}"
                    f".{plain[0]}=OPTION, got {parts[plain[0]]!r}."
                )
            for part, value in parts.items():
                check_members(part, value)
        if not isinstance(self.recalibrate, bool):
            raise ConfigError(f"recalibrate must be true or false, got {shown(self.recalibrate)}.")
        check_choice("rounds", self.rounds, _ROUNDS)
        check_seed(self.seed)
        check_share(holdout=self.holdout)
        if self.holdout == 0.0:
            raise ConfigError("holdout must be above 0: candidates are compared on windows that none of them has seen.")
        PlanObjective(objective=self.objective, num_windows=None)

    def contest(self, windows: TokenWindows) -> Contest:
        """How the candidates are compared: the windows in two parts, at least one in each, and the objective.

        Raises DataError if there are fewer than 2 windows.
        """
        count = len(windows.ids)
        if count < 2:
            raise DataError(
                f"A selection needs at least 2 calibration windows, one of them held out, got {count}. Raise "
                "calibration.num_sequences, or set selection=none."
            )
        training, held_out = hold_out(count, self.holdout, self.seed)
        return Contest(
            training=part_of(windows, training, name="training"),
            held_out=part_of(windows, held_out, name="held out"),
            objective=PlanObjective(objective=self.objective, num_windows=None),
            single_round=self.rounds == "single",
            recalibrate=self.recalibrate,
        )
