"""Which settings of a run make no difference to its results."""

from __future__ import annotations

# Names, places and switches: configurations that differ in these alone have one hash, and are one point of a study.
WITHOUT_EFFECT = frozenset({"name", "cache", "debug", "force", "save_model", "tracking"})
