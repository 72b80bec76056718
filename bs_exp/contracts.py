"""Cheap checks, at run time, that a strategy keeps what its protocol asks for; `bs_exp.testing` has the thorough ones.

They are for strategies that others write: an error here names the class and what it breaks, where the run would go on
with a wrong model, end in an internal error, or not end at all.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor
from transformers import PreTrainedModel

from bs_exp.errors import ConfigError, ContractError
from bs_exp.identity import class_name
from bs_exp.protocols import (
    Allocation,
    Analysis,
    Calibration,
    Evaluator,
    Importance,
    Layout,
    ModelSource,
    Precision,
    Schedule,
    Selection,
    Sharing,
    Tracker,
    Update,
    Whitening,
)
from bs_exp.types import (
    Architecture,
    GroupStatistics,
    LoadedModel,
    LossUnit,
    Metric,
    RankPlan,
    Spectrum,
    Statistic,
    TokenWindows,
    WeightGroup,
)

_PROTOCOLS: dict[str, type] = {
    "model": ModelSource,
    "calibration": Calibration,
    "sharing": Sharing,
    "whitening": Whitening,
    "importance": Importance,
    "allocation": Allocation,
    "layout": Layout,
    "schedule": Schedule,
    "selection": Selection,
    "update": Update,
    "precision": Precision,
    "analysis": Analysis,
    "evaluator": Evaluator,
    "tracking": Tracker,
}


def check_members(family: str, strategy: object) -> None:
    """ConfigError if a strategy lacks something that the protocol of its family names, or its `needs` are none."""
    protocol = _PROTOCOLS[family]
    if missing := [name for name in _members(protocol) if not hasattr(strategy, name)]:
        raise ConfigError(
            f"{family}: {class_name(strategy)} has no {missing[0]}, which bs_exp.protocols.{protocol.__name__} asks "
            f"for, with {', '.join(_members(protocol))}. Add it to the class."
        )
    needs: object = getattr(strategy, "needs", frozenset()) if "needs" in _members(protocol) else frozenset()
    if not isinstance(needs, frozenset) or not all(isinstance(need, Statistic) for need in needs):
        raise ConfigError(
            f"{family}: {class_name(strategy)}.needs must be a frozenset of bs_exp.types.Statistic "
            f"({', '.join(Statistic.__members__)}), got {needs!r}."
        )


def _members(protocol: type) -> list[str]:
    """Public attributes and methods that a protocol declares."""
    declared = [name for base in protocol.__mro__[:-1] for name in (*base.__dict__, *inspect.get_annotations(base))]
    return sorted({name for name in declared if not name.startswith("_")})


def check_windows(windows: TokenWindows, calibration: Calibration) -> None:
    """ContractError for windows that are no token ids, or say nothing of their content: keys of statistics hold it."""
    ids = windows.ids
    if ids.ndim != 2 or ids.is_floating_point() or ids.is_complex() or not ids.numel():
        raise _broken(calibration, "calibration", f"ids must be whole numbers [windows, length], got {_shape(ids)}")
    if not isinstance(windows.provenance.get("sha256"), str):
        raise _broken(
            calibration,
            "calibration",
            "provenance must hold the windows' hash under 'sha256': statistics are cached under it. "
            "bs_exp.corpora.windows makes windows of any corpus that have it",
        )


def check_groups(groups: Sequence[WeightGroup], architecture: Architecture, sharing: Sharing) -> None:
    """ContractError unless every targeted matrix is in exactly one group, whose shape is the matrix's own."""
    seen: set[tuple[str, int]] = set()
    for group in groups:
        if not group.layers or list(group.layers) != sorted(group.layers):
            raise _broken(sharing, "sharing", f"layers of a group must rise, got {group.name}")
        for layer in group.layers:
            matrix = architecture.by_position.get((group.matrix, layer))
            if matrix is None:
                raise _broken(
                    sharing, "sharing", f"{group.name} holds layer {layer}, where the model has no such matrix"
                )
            if (matrix.d_in, matrix.d_out) != (group.d_in, group.d_out):
                raise _broken(
                    sharing,
                    "sharing",
                    f"{group.name} is {group.d_in} x {group.d_out}, and {matrix.module} is {matrix.d_in} x "
                    f"{matrix.d_out}",
                )
            if (group.matrix, layer) in seen:
                raise _broken(sharing, "sharing", f"{matrix.module} is in two groups")
            seen.add((group.matrix, layer))
    if missing := [m for position, m in architecture.by_position.items() if position not in seen]:
        raise _broken(sharing, "sharing", f"{missing[0].module} is in no group; a matrix alone is a group of one layer")


def check_metric(metric: Metric, group: WeightGroup, whitening: Whitening) -> None:
    """ContractError for a metric of another shape, with entries that are not finite, or without an inverse."""
    sides: list[tuple[str, Tensor, int]] = []
    if metric.left_gram is None and metric.whitener is not None:
        sides.append(("whitener", metric.whitener, group.d_in))
    if metric.right is not None:
        if sorted(metric.right) != list(group.layers):
            raise _broken(whitening, "whitening", f"right must have the layers of {group.name}, got {[*metric.right]}")
        given = [layer for layer in metric.right if layer not in metric.right_grams]
        sides += [(f"right[{layer}]", metric.right[layer], group.d_out) for layer in given]
    for name, root, size in sides:
        if root.shape != (size, size):
            raise _broken(whitening, "whitening", f"{name} of {group.name} must be {size} x {size}, got {_shape(root)}")
        if not bool(root.isfinite().all()):
            raise _broken(whitening, "whitening", f"{name} of {group.name} holds NaN or infinite entries")
        if bool((root.diagonal() == 0.0).any()):
            raise _broken(
                whitening,
                "whitening",
                f"{name} of {group.name} is singular (a zero on the diagonal of its triangle), so whitened weights "
                "have no way back. Add a ridge",
            )
    if not isinstance(metric.unit, LossUnit):
        raise _broken(whitening, "whitening", f"unit must be a bs_exp.types.LossUnit, got {metric.unit!r}")


@contextmanager
def untouched_statistics(statistics: GroupStatistics, importance: Importance, whitening: Whitening) -> Iterator[None]:
    """ContractError if statistics are changed in place meanwhile: others read the same tensors."""
    tensors = list(_tensors(statistics))
    before = [_version(tensor) for _, tensor in tensors]
    yield
    for (name, tensor), version in zip(tensors, before, strict=True):
        if _version(tensor) != version:
            raise ContractError(
                f"importance {class_name(importance)} or whitening {class_name(whitening)} changes the {name} that it "
                "is given in place; other groups and strategies read it too. Work on a copy (clone)."
            )


def check_plan(
    plan: RankPlan, spectra: Sequence[Spectrum], ratio: float, layout: Layout, allocation: Allocation
) -> None:
    """ContractError for a plan that leaves the budget, the bounds of ranks, the groups, or says what is not so."""
    if [planned.group for planned in plan.groups] != [spectrum.group for spectrum in spectra]:
        raise _broken(allocation, "allocation", "a plan must hold the groups of its problem, in their order")
    for planned in plan.groups:
        group, rank = planned.group, planned.rank
        if rank is not None and not 1 <= rank <= group.full_rank:
            raise _broken(
                allocation,
                "allocation",
                f"the rank of {group.name} must be between 1 and {group.full_rank}, or None (dense), got {rank}",
            )
        cost = group.parameters if rank is None else layout.parameters(group, rank)
        if planned.parameters != cost:
            raise _broken(
                allocation,
                "allocation",
                f"{group.name} at rank {rank} takes {cost} parameters in this layout, the plan says "
                f"{planned.parameters}",
            )
    if plan.parameters > ratio * plan.dense_parameters + 0.5:
        raise _broken(
            allocation,
            "allocation",
            f"the plan keeps {plan.parameters} of {plan.dense_parameters} parameters, above the share of {ratio} that "
            "it was asked for",
        )
    if plan.requested_ratio != ratio:
        raise _broken(
            allocation, "allocation", f"requested_ratio must be the problem's {ratio}, got {plan.requested_ratio}"
        )


def check_ratio(proposed: float, current: float, target: float, schedule: Schedule) -> None:
    """ContractError for a next round that does not bring the model closer to its target: rounds would never end."""
    if not target <= proposed <= current or (proposed == current and proposed != target):
        raise _broken(
            schedule,
            "schedule",
            f"the next share must be at least the target, {target}, and below the current one, {current}, got "
            f"{proposed}",
        )


@contextmanager
def only_factors_change(compressed: PreTrainedModel, dense: LoadedModel, update: Update) -> Iterator[None]:
    """ContractError if parameters of the dense model change in place meanwhile, or what the compressed one stores."""
    before = {name: _version(parameter) for name, parameter in dense.module.named_parameters()}
    stored = _stored(compressed)
    yield
    if changed := [name for name, p in dense.module.named_parameters() if before.get(name) != _version(p)]:
        raise _broken(
            update,
            "update",
            f"{changed[0]} of the dense model changed, which the compressed one shares; only factors may",
        )
    if different := sorted(stored.items() ^ _stored(compressed).items()):
        raise _broken(
            update, "update", f"{different[0][0]} has another shape, or is new, or gone; only values may change"
        )


@contextmanager
def only_groups_change(
    compressed: PreTrainedModel, dense: LoadedModel, plan: RankPlan, precision: Precision
) -> Iterator[None]:
    """ContractError if the dense model changes meanwhile, or a Parameter of the compressed one out of all groups."""
    positions = dense.architecture.by_position
    targets = [positions[g.group.matrix, layer].module for g in plan.groups for layer in g.group.layers]

    def others() -> dict[str, tuple[int, int]]:
        """Identity and version of every Parameter out of the groups, by name."""
        named = compressed.named_parameters(remove_duplicate=False)
        outside = ((n, p) for n, p in named if not any(n.startswith(f"{target}.") for target in targets))
        return {name: (id(parameter), _version(parameter)) for name, parameter in outside}

    versions = {name: _version(parameter) for name, parameter in dense.module.named_parameters()}
    before = others()
    yield
    if changed := [name for name, p in dense.module.named_parameters() if versions.get(name) != _version(p)]:
        raise _broken(precision, "precision", f"{changed[0]} of the dense model changed")
    if different := sorted(before.items() ^ others().items()):
        raise _broken(
            precision, "precision", f"{different[0][0]} is another Parameter, though it belongs to no group of the plan"
        )


def _stored(module: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    """Shapes by name of all that the model stores, adapters left out: an update may keep them beside the factors."""
    tensors = module.state_dict(keep_vars=True).items()
    return {name: tuple(tensor.shape) for name, tensor in tensors if ".lora_" not in name}


def _tensors(statistics: GroupStatistics) -> Iterator[tuple[str, Tensor]]:
    if statistics.gram is not None:
        yield "Gram", statistics.gram
    for grams in (
        statistics.output_grams,
        statistics.sampled_grams,
        statistics.top_k_grams,
        statistics.probed_grams,
    ):
        yield from (("output Gram", gram) for gram in (grams or {}).values())
    if statistics.moments is not None:
        moments = statistics.moments
        yield from (("input moments", tensor) for tensor in (moments.absolute, moments.peak, moments.fourth))
    if statistics.weight_gradient is not None:
        yield "weight gradient", statistics.weight_gradient.rows
    if statistics.loss_gradient is not None:
        yield "loss gradient", statistics.loss_gradient


def _version(tensor: Tensor) -> int:
    """How often a tensor was changed in place; torch does not count for those made in inference mode."""
    return 0 if tensor.is_inference() else tensor._version


def _shape(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _broken(strategy: object, family: str, what: str) -> ContractError:
    protocol = _PROTOCOLS[family].__name__
    return ContractError(
        f"{family} {class_name(strategy)} does not keep its contract (bs_exp.protocols.{protocol}): {what}."
    )
