"""The processes of one run that `torchrun` starts together, or submitit as the tasks of one job.

All of them go through the same stages in the same order. They share out the batches of windows, for statistics and
evaluation, the requests of lm-eval's tasks, and the groups that are decomposed; what else there is, each does for
itself, and what could differ between them is taken from the first one. Tensors travel on the CPU, where statistics are
summed anyway. A single process, which most runs are, finds everything here without effect.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

from bs_exp.errors import LaunchError

if TYPE_CHECKING:
    from torch import Tensor, nn

T = TypeVar("T")
N = TypeVar("N", int, float)

# A process waits as long as the first one searches; where one dies, the launcher ends the others.
_PATIENCE = timedelta(days=30)

_joined = False


def launched() -> int:
    """How many processes the launcher started for this run; 1 without one. Known before anything is imported."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def take_tasks() -> None:
    """Takes the tasks of a submitit job for the processes of one run: they get the names that `torchrun` gives."""
    if launched() > 1 or "SUBMITIT_EXECUTOR" not in os.environ:
        return
    from submitit import JobEnvironment
    from submitit.helpers import TorchDistributedEnvironment

    if JobEnvironment().num_tasks > 1:
        # Which device is whose is decided here, and those of one process stay in sight.
        TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)


def is_first() -> bool:
    """Whether this process is the one that records and prints; known before anything is imported."""
    return launched() == 1 or os.environ["RANK"] == "0"


@contextmanager
def joined() -> Iterator[None]:
    """Joins the processes that were launched together, as long as the context lasts."""
    global _joined
    if launched() == 1:
        yield
        return
    import torch
    from torch import distributed

    if torch.cuda.is_available():  # a device each; more processes than devices share them
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    distributed.init_process_group("gloo", timeout=_PATIENCE)
    _joined = True
    try:
        yield
    finally:
        _joined = False
        distributed.destroy_process_group()


@contextmanager
def alone() -> Iterator[None]:
    """Meanwhile this process does all by itself, as if there were no others."""
    global _joined
    before, _joined = _joined, False
    try:
        yield
    finally:
        _joined = before


def on_this_machine() -> int:
    """How many processes of this run share this machine's memory."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if launched() > 1 else 1


def count() -> int:
    """How many processes work together now."""
    if not _joined:
        return 1
    from torch import distributed

    return distributed.get_world_size()


def mine(items: Sequence[T]) -> list[T]:
    """The items that fall to this process: every n-th, of n processes."""
    return list(items[rank() :: count()])


def put_together(found: Sequence[T], total: int) -> list[T]:
    """What all processes found for their items (`mine`), in the order of the `total` items."""
    if not _joined:
        return list(found)
    parts = _gathered(list(found))
    return [parts[index % len(parts)][index // len(parts)] for index in range(total)]


def anywhere(found: Sequence[bool]) -> list[bool]:
    """Of each of the truths that all processes have, whether it holds in any of them."""
    return [any(each) for each in zip(*_gathered(list(found)), strict=True)] if _joined else list(found)


def add_up(tensor: Tensor) -> Tensor:
    """The sum of the tensors of all processes, which have one shape; on the CPU, in their dtype."""
    return _reduced(tensor, "SUM")


def largest(tensor: Tensor) -> Tensor:
    """The elementwise maximum of the tensors of all processes."""
    return _reduced(tensor, "MAX")


def total_of(number: N) -> N:
    """The sum of a number over all processes."""
    return sum(_gathered(number)) if _joined else number


def wait() -> None:
    """Returns when all processes are here."""
    if _joined:
        _gathered(None)


def from_first(make: Callable[[], T]) -> T:
    """What `make` gives in the first process, for all; the others do not call it."""
    if not _joined:
        return make()
    from torch import distributed

    found = [make() if is_first() else None]
    with _together():
        distributed.broadcast_object_list(found, src=0)
    return found[0]  # type: ignore[return-value]  # of the first process


def same_values(module: nn.Module, *, unlike: nn.Module) -> None:
    """Gives the parameters and buffers of `module` that are none of `unlike` the values of the first process."""
    if not _joined:
        return
    import torch
    from torch import distributed

    known = {id(tensor) for tensor in _tensors(unlike)}
    with torch.no_grad(), _together():
        for tensor in _tensors(module):
            if id(tensor) not in known:
                values = tensor.detach().cpu().contiguous()
                distributed.broadcast(values, src=0)
                if not is_first():
                    tensor.copy_(values)


def raise_together(error: Exception | None) -> None:
    """Raises the error of this process, or that of another, if any has one: all end alike, and the first records it."""
    errors = _gathered(error) if _joined else [error]
    if error is not None:
        raise error
    for other in errors:
        if other is not None:
            raise other


def rank() -> int:
    """Which of them this process is, from 0."""
    return int(os.environ["RANK"]) if _joined else 0


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _reduced(tensor: Tensor, how: str) -> Tensor:
    if not _joined:
        return tensor
    from torch import distributed

    found = tensor.detach().cpu().contiguous().clone()
    with _together():
        distributed.all_reduce(found, getattr(distributed.ReduceOp, how))
    return found


def _gathered(item: T) -> list[T]:
    from torch import distributed

    found: list[T | None] = [None] * distributed.get_world_size()
    with _together():
        distributed.all_gather_object(found, item)
    return found  # type: ignore[return-value]  # every process put its own in


@contextmanager
def _together() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise LaunchError(
            f"Another process of this run ended ({error}). Its own message says why. What is in the cache is kept: "
            "start the same command again."
        ) from error
