"""Two models on one device that share most of their weights: what each holds alone, and making room for one of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def held_alone(module: nn.Module, *, beside: nn.Module, device: torch.device) -> int:
    """Bytes on a device of the parameters and buffers that `module` does not share with another one."""
    return sum(t.numel() * t.element_size() for t in _alone(module, beside) if t.device == device)


@contextmanager
def parked(module: nn.Module, *, beside: nn.Module) -> Iterator[None]:
    """Keeps in the CPU's memory what `module` does not share with `beside`; afterwards it is where it was."""
    places = [(tensor, tensor.device) for tensor in _alone(module, beside) if not tensor.is_meta]
    try:
        for tensor, _ in places:
            tensor.data = tensor.data.cpu()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        yield
    finally:
        for tensor, device in places:
            tensor.data = tensor.data.to(device)


def _alone(module: nn.Module, beside: nn.Module) -> list[Tensor]:
    shared = {id(tensor) for tensor in _tensors(beside)}
    return list({id(tensor): tensor for tensor in _tensors(module) if id(tensor) not in shared}.values())


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()
