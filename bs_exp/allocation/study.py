"""The study that holds the trials of a search, and whether it belongs to it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import optuna
from optuna.pruners import BasePruner
from optuna.storages import BaseStorage

from bs_exp.errors import ConfigError

_IDENTITY = "identity"


def find_study(name: str, storage: BaseStorage) -> optuna.Study | None:
    """The study of this name; None if there is none yet."""
    names = {study.study_name for study in storage.get_all_studies()}
    return optuna.load_study(study_name=name, storage=storage) if name in names else None


def open_study(name: str, storage: BaseStorage, identity: Mapping[str, Any], pruner: BasePruner) -> optuna.Study:
    """The study of this name, made if it does not exist. ConfigError if it is about something else."""
    study = optuna.create_study(
        study_name=name, storage=storage, direction="minimize", pruner=pruner, load_if_exists=True
    )
    # Of two processes that start together, one may see the study before the other has signed it.
    if _IDENTITY not in study.user_attrs and not study.get_trials(deepcopy=False):
        study.set_user_attr(_IDENTITY, dict(identity))
    check_identity(study, identity)
    return study


def check_identity(study: optuna.Study, identity: Mapping[str, Any]) -> None:
    """ConfigError that says what differs, if the study's trials do not compare to this search's."""
    stored = study.user_attrs.get(_IDENTITY)
    what_to_do = "Set another allocation.study_name, or null: then every search finds its own."
    if stored is None:
        if study.get_trials(deepcopy=False):
            raise ConfigError(
                f"Study {study.study_name!r} was not made by allocation=bayesopt: nothing says what its trials mean. "
                f"{what_to_do}"
            )
        return
    different = [key for key in dict.fromkeys([*stored, *identity]) if stored.get(key) != identity.get(key)]
    if different:
        lines = "\n".join(f"  {key}: {stored.get(key)} in the study, {identity.get(key)} here" for key in different)
        raise ConfigError(
            f"Study {study.study_name!r} belongs to another search, whose trials do not compare with this one's. What "
            f"differs:\n{lines}\n{what_to_do}"
        )
