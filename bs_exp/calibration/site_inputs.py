"""What the matrices of a model read, seen as it runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from bs_exp.models.hooks import Hooks
from bs_exp.models.modeling_basis_sharing import UnfusedExperts


class SiteInputs(dict[str, Tensor]):
    """Inputs by site, tokens x channels; `tokens` has, by site of an expert, which tokens of a run these are."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens: dict[str, Int[Tensor, " rows"]] = {}


@contextmanager
def inputs_of(module: nn.Module, sites: Mapping[str, str]) -> Iterator[SiteInputs]:
    """Inputs of the named modules by site, filled in as the model runs, in the order of calls."""
    seen = SiteInputs()

    def see(site: str, inputs: Tensor) -> None:
        rows = inputs.flatten(0, -2)
        seen[site] = torch.cat((seen[site], rows)) if site in seen else rows

    with Hooks() as hooks:
        for site, name in sites.items():
            hooks.on_input(module.get_submodule(name), partial(see, site))
        for path, by_number in _experts(module, sites).items():
            experts = cast("UnfusedExperts", module.get_submodule(path))
            hooks.on_call(experts, partial(_note_tokens, seen, experts, by_number))
        yield seen


def same_tokens(
    seen: SiteInputs, wanted: SiteInputs, site: str
) -> tuple[Float[Tensor, "rows d_in"], Float[Tensor, "rows d_in"]] | None:
    """The inputs of a site in two runs on the same text, row by row those of the same tokens; None if there are none.

    Of an expert these are the tokens that were sent to it in both runs, in the order of the text; of other sites all,
    or None if they are not as many.
    """
    if site not in seen or site not in wanted:
        return None
    if site not in seen.tokens:
        return (seen[site], wanted[site]) if seen[site].shape == wanted[site].shape else None
    both = []
    for one, other in ((seen, wanted), (wanted, seen)):
        tokens, order = one.tokens[site].sort()
        both.append(one[site][order[torch.isin(tokens, other.tokens[site])]])
    return (both[0], both[1]) if len(both[0]) else None


def _experts(module: nn.Module, sites: Mapping[str, str]) -> dict[str, dict[int, list[str]]]:
    """Paths of modules of experts, and the sites in each of them by the number of the expert."""
    found: dict[str, dict[int, list[str]]] = {}
    for site, name in sites.items():
        path, apart, rest = name.rpartition(".members.")
        if apart and isinstance(module.get_submodule(path), UnfusedExperts):
            found.setdefault(path, {}).setdefault(int(rest.partition(".")[0]), []).append(site)
    return found


def _note_tokens(
    seen: SiteInputs,
    experts: UnfusedExperts,
    by_number: Mapping[int, list[str]],
    arguments: tuple[Any, ...],
    keywords: Mapping[str, Any],
    output: Tensor,
) -> None:
    chosen = arguments[1] if len(arguments) > 1 else keywords["top_k_index"]
    for number, tokens, _ in experts.routes(chosen):
        for site in by_number.get(number, ()):
            seen.tokens[site] = tokens
