"""What the matrices of a model read, seen as it runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from bs_exp.models.hooks import Hooks


@contextmanager
def inputs_of(module: nn.Module, sites: Mapping[str, str]) -> Iterator[dict[str, Tensor]]:
    """Inputs of the named modules by site, tokens x channels, filled in as the model runs, in the order of calls."""
    seen: dict[str, Tensor] = {}

    def see(site: str, inputs: Tensor) -> None:
        rows = inputs.flatten(0, -2)
        seen[site] = torch.cat((seen[site], rows)) if site in seen else rows

    with Hooks() as hooks:
        for site, name in sites.items():
            hooks.on_input(module.get_submodule(name), partial(see, site))
        yield seen
