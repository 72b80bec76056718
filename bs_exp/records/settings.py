"""Which settings of a run make no difference to its results."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Names, places and switches: configurations that differ in these alone have one hash, and are one point of a study.
WITHOUT_EFFECT = frozenset({"name", "cache", "debug", "force", "sample", "save_model", "tracking"})
# Of groups: where weights and hidden states wait while they are not used.
_PLACES = frozenset({"model.offload", "calibration.activations", "calibration.set.activations"})


def result_settings(config: Mapping[Any, Any]) -> dict[Any, Any]:
    """The part of a configuration that can change a result."""
    return {key: _without_places(value, str(key)) for key, value in config.items() if key not in WITHOUT_EFFECT}


def _without_places(value: Any, path: str) -> Any:
    if not isinstance(value, Mapping):
        return value
    found = {key: (f"{path}.{key}", inner) for key, inner in value.items()}
    return {key: _without_places(inner, below) for key, (below, inner) in found.items() if below not in _PLACES}
