"""What every stage of a compression has at hand besides its data."""

from __future__ import annotations

from dataclasses import dataclass

from bs_exp.cache import Cache
from bs_exp.progress import Progress


@dataclass(frozen=True)
class Workspace:
    """The cache in which stages keep tensors, and the progress that tells the user and the record what they do."""

    cache: Cache
    progress: Progress
