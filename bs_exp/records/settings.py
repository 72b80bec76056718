"""Which settings of a run make no difference to its results."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Names, places and switches: configurations that differ in these alone have one hash, and are one point of a study.
WITHOUT_EFFECT = frozenset(
    {"name", "cache", "debug", "force", "dry_run", "ignore_estimate", "sample", "save_model", "tracking"}
)
# Of groups: where weights, and the hidden states of windows, wait while they are not used.
_OFFLOAD, _ACTIVATIONS = "offload", "activations"
# Of a class, values of settings that came later with which the same is done as before: left out, so that results stay
# found.
_AS_BEFORE: Mapping[str, Mapping[str, tuple[Any, ...]]] = {
    "bs_exp.whitening.two_sided.TwoSidedWhitening": {
        "curvature": ("auto", "label"),
        "probes": (1,),
        "probe_seed": (0,),
        "probed": ("hidden",),
    },
    "bs_exp.update.recover.Recovery": {"objective": ("auto",)},
}
_WINDOWS = "bs_exp.corpora.windows.CalibrationSet"
# A group that came later, and its option that does nothing: left out too.
_NOTHING = {"precision": {"_target_": "bs_exp.precision.none.ModelPrecision"}}


def result_settings(config: Mapping[Any, Any]) -> dict[Any, Any]:
    """The part of a configuration that can change a result."""
    counted = {k: v for k, v in config.items() if k not in WITHOUT_EFFECT and not (k in _NOTHING and v == _NOTHING[k])}
    settings = {key: _of_results(value, str(key)) for key, value in counted.items()}
    # Of the cache, only the rounding of what it holds.
    if (dtype := (config.get("cache") or {}).get("dtype", "auto")) != "auto":
        settings["cache"] = {"dtype": dtype}
    return settings


def _of_results(value: Any, path: str) -> Any:
    if not isinstance(value, Mapping):
        return value
    ignored = {_OFFLOAD} if path == "model" else set()
    if path == "calibration" or value.get("_target_") == _WINDOWS:
        ignored.add(_ACTIVATIONS)
    ignored |= {
        key for key, before in _AS_BEFORE.get(str(value.get("_target_")), {}).items() if value.get(key) in before
    }
    return {key: _of_results(inner, f"{path}.{key}") for key, inner in value.items() if key not in ignored}
