"""Inputs of one block's matrices, in the compressed model and in the dense one, while windows pass through both."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import TypeAlias

from torch import Tensor
from transformers import PreTrainedModel

from bs_exp.calibration.site_inputs import SiteInputs, inputs_of, same_tokens
from bs_exp.errors import CalibrationError, ModelError
from bs_exp.linalg.least_squares import InputPairs
from bs_exp.models.block_stream import BlockStream, Waiting
from bs_exp.models.blocks import Blocks
from bs_exp.models.model_inputs import feeder
from bs_exp.models.whole_stream import WholeStream
from bs_exp.progress import Progress
from bs_exp.types import CalibrationData, LoadedModel, WeightGroup
from bs_exp.workspace import Workspace

Stream: TypeAlias = BlockStream | WholeStream


def streams_of(
    dense: LoadedModel, data: CalibrationData, workspace: Workspace
) -> Callable[[LoadedModel], BlockStream] | Callable[[LoadedModel], WholeStream]:
    """What makes a stream of the dense model, or of a model made from it, over all windows.

    Block by block where the blocks can be run one at a time; else from the model's beginning, which a note says.
    """
    feed = feeder(dense, data.windows.feeding)
    waiting = Waiting(data.activations, workspace.cache.folder)

    def inputs(model: LoadedModel) -> Iterator[Mapping[str, object]]:
        return (feed.inputs(ids.to(model.device)) for ids in data.batches)

    first, *second = (feed.inputs(ids.to(dense.device)) for ids in data.windows.ids.split(1)[:2])
    try:
        Blocks(dense).check(first, second[0] if second else first)
    except ModelError as error:
        workspace.progress.note(f"{error} The refit runs the model from its beginning for each block.")
        return lambda model: WholeStream(model, inputs(model))
    return lambda model: BlockStream(Blocks(model), inputs(model), waiting)


def without_experts(groups: Sequence[WeightGroup], update: str, progress: Progress) -> list[WeightGroup]:
    """The groups of matrices that read the same tokens in the dense and in the compressed model, which those of routed
    experts need not; a note says how many are left out."""
    chosen = [group for group in groups if not group.is_routed]
    if left := sum(group.size for group in groups) - sum(group.size for group in chosen):
        progress.note(
            f"{update}: {left} matrices of routed experts keep the factors that truncation gave them, since other "
            "tokens are sent to them in the dense model than in the compressed one"
        )
    return chosen


def gather_pairs(
    compressed: tuple[PreTrainedModel, Stream],
    dense: tuple[PreTrainedModel, Stream] | None,
    modules: Mapping[str, str],
    layer: int,
    *,
    advance: bool,
    least: Mapping[str, int] | None = None,
) -> dict[str, InputPairs]:
    """Moments of a block's inputs by site; `modules` are the paths of one matrix per site.

    Carries the dense stream on, and the compressed one if asked to. Sites of experts have in `least` how many tokens
    they need: those that read fewer, of the same in both models, are left out. CalibrationError if another matrix does
    not read the same tokens in both.
    """
    module, current = compressed
    found: dict[str, InputPairs] = {}
    tokens: Counter[str] = Counter()
    routed = least or {}
    with current.resident(layer), nullcontext() if dense is None else dense[1].resident(layer):
        for batch in range(len(current)):
            wanted: SiteInputs | None = None
            if dense is not None:
                with inputs_of(dense[0], modules) as wanted:
                    dense[1].advance(batch, dense[1].run(layer, batch))
            with inputs_of(module, modules) as seen:
                states = current.run(layer, batch)
            if advance:
                current.advance(batch, states)
            for site, name in modules.items():
                both: tuple[Tensor, Tensor | None] | None = (seen[site], None) if site in seen else None
                if wanted is not None:
                    both = same_tokens(seen, wanted, site)
                if both is None and site in routed:
                    continue
                if both is None:
                    raise CalibrationError(
                        f"Refit: {name} does not read the same tokens in the dense and in the compressed model. Use "
                        "update.target=compressed_inputs update.mode=one_shot."
                    )
                pairs = InputPairs.of(*both)
                found[site] = found[site] + pairs if site in found else pairs
                tokens[site] += len(both[0])
    return {site: pairs for site, pairs in found.items() if tokens[site] >= routed.get(site, 0)}
