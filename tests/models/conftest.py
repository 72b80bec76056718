from __future__ import annotations

from collections.abc import Callable

import pytest

from bs_exp.models.tiny import tiny_random
from bs_exp.types import LoadedModel


@pytest.fixture(scope="session")
def dense() -> Callable[[str], LoadedModel]:
    """The tiny random model of a family, built once; tests leave it as it is."""
    built: dict[str, LoadedModel] = {}

    def get(family: str) -> LoadedModel:
        if family not in built:
            built[family] = tiny_random(family)
        return built[family]

    return get
