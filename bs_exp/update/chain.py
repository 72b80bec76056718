"""Several updates, one after the other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from bs_exp.contracts import check_members
from bs_exp.errors import ConfigError
from bs_exp.protocols import Update, UpdatesRounds
from bs_exp.types import CalibrationData, LoadedModel, RankPlan
from bs_exp.validation import is_plain, shown
from bs_exp.workspace import Workspace


@dataclass(frozen=True, kw_only=True)
class UpdateChain:
    """Each update starts from the factors that the one before left; in the order of `updates`, null ones left out."""

    updates: Mapping[str, Update | None]

    def __post_init__(self) -> None:
        object.__setattr__(self, "updates", {name: u for name, u in self.updates.items() if u is not None})
        for name, update in self.updates.items():
            if is_plain(update):
                raise ConfigError(f"updates.{name} must be an update with its _target_, or null, got {shown(update)}.")
            check_members("update", update)
            if isinstance(update, UpdatesRounds) and update.every_round:
                raise ConfigError(
                    f"updates.{name}.every_round must be false: a chain is applied once, after the last round. Use the "
                    "update on its own, or without every_round."
                )
            # Adapters that are not merged are no part of the factors, which is all that the next update takes over.
            if getattr(update, "merge", True) is False and name != list(self.updates)[-1]:
                raise ConfigError(
                    f"updates.{name}.merge must be true, or {name} the last of the chain: the update behind it starts "
                    "from the factors alone, so that adapters beside them would be lost."
                )
        if not self.updates:
            raise ConfigError("updates is empty: name some, or use update=none.")

    @property
    def kept(self) -> Mapping[str, Update]:
        """The updates, by name, without null ones."""
        return {name: update for name, update in self.updates.items() if update is not None}

    @property
    def reads_windows(self) -> bool:
        """Whether one of the updates reads the calibration windows."""
        return any(update.reads_windows for update in self.kept.values())

    @property
    def is_traceable(self) -> bool:
        """Whether all of the updates are."""
        return all(getattr(update, "is_traceable", False) for update in self.kept.values())

    def check(self, dense: LoadedModel, data: CalibrationData) -> None:
        for update in self.kept.values():
            update.check(dense, data)

    def apply(
        self,
        compressed: PreTrainedModel,
        dense: LoadedModel,
        plan: RankPlan,
        data: CalibrationData,
        workspace: Workspace,
    ) -> Mapping[str, Any]:
        """What each update reports, by its name."""
        report = {}
        for name, update in self.kept.items():
            report[name] = dict(update.apply(compressed, dense, plan, data, workspace))
        return {"strategy": "chain", **report}
