"""Models that are larger than the device, or than memory: the weights of one block at a time are there.

The weights of blocks stay where they were loaded, in the host's memory or in the checkpoint's own files, and are on the
device from the beginning of a block's call to its end, or for as long as the block is `resident`. Parameters stay the
objects they are: twins share them, and hooks watch their gradients.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from bs_exp.errors import ConfigError, ModelError
from bs_exp.models.mapped import can_map, is_mapped, release
from bs_exp.validation import check_choice, shown

OFFLOADS = ("none", "cpu", "disk")
_RESIDENCE = "_bs_exp_residence"


def check_offload(offload: str, device: torch.device) -> None:
    """ConfigError for an unknown place, or one that makes no sense with a device."""
    check_choice("offload", offload, OFFLOADS)
    if offload == "cpu" and device.type == "cpu":
        raise ConfigError(
            "offload must be none or disk with device=cpu, got 'cpu': the weights are in the CPU's memory already. "
            "model.offload=disk leaves them in the checkpoint's files."
        )
    if offload != "none" and device.type not in ("cpu", "cuda"):
        raise ConfigError(
            f"offload must be none with device={device}, got {shown(offload)}: blocks are moved to cuda devices alone. "
            "Use model.device=cpu with model.offload=disk, or model.offload=none."
        )
    if offload == "disk" and not can_map():
        raise ConfigError("offload must be none or cpu here, got 'disk': this system cannot give back pages of files.")


def check_whole_backward(module: nn.Module, device: torch.device, what: str) -> None:
    """ModelError if `what` goes backward through the whole model while its blocks come to a cuda device one by one."""
    if is_offloaded(module) and device.type != "cpu":
        raise ModelError(
            f"{what} goes backward through the whole model, all of which must be on {device} then. Set "
            "model.offload=none, or model.device=cpu with model.offload=disk."
        )


def place(module: nn.Module, blocks: Iterable[str], device: torch.device) -> None:
    """Puts all that is outside the blocks on the device, and has blocks come there when they run."""
    paths = tuple(blocks)
    inside = {id(tensor) for path in paths for tensor in module.get_submodule(path).parameters()}
    for parameter in module.parameters():
        if id(parameter) not in inside and parameter.device != device:
            parameter.data = parameter.data.to(device)
    for part in module.modules():
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = buffer.to(device)
    for path in paths:
        block = module.get_submodule(path)
        setattr(block, _RESIDENCE, _Residence(device))
        block.register_forward_pre_hook(_enter)
        block.register_forward_hook(_leave, always_call=True)


def is_offloaded(module: nn.Module) -> bool:
    """Whether the blocks of a model wait elsewhere than on its device."""
    return any(_RESIDENCE in vars(part) for part in module.modules())


def lies_in_files(module: nn.Module) -> bool:
    """Whether weights of a model lie in files."""
    return any(is_mapped(parameter) for parameter in module.parameters())


@contextmanager
def resident(block: nn.Module) -> Iterator[None]:
    """The weights of a block on the device, and in memory; its calls meanwhile move nothing."""
    _enter(block)
    try:
        yield
    finally:
        _leave(block)


def keep_changes(block: nn.Module) -> None:
    """The weights of a resident block, as they are now, go to where they wait."""
    residence: _Residence | None = vars(block).get(_RESIDENCE)
    for parameter, data in residence.home if residence is not None else ():
        data.copy_(parameter.data)


@dataclass(eq=False)
class _Residence:
    """Where a block's weights are: `home` holds those that wait elsewhere while the block is on the device."""

    device: torch.device
    depth: int = 0
    home: list[tuple[nn.Parameter, Tensor]] = field(default_factory=list)


def _enter(block: nn.Module, *call: Any) -> None:
    residence: _Residence | None = vars(block).get(_RESIDENCE)
    if residence is None:
        return
    residence.depth += 1
    if residence.depth > 1:
        return
    for parameter in block.parameters():
        if parameter.device != residence.device:
            residence.home.append((parameter, parameter.data))
            parameter.data = parameter.data.to(residence.device)


def _leave(block: nn.Module, *call: Any) -> None:
    residence: _Residence | None = vars(block).get(_RESIDENCE)
    if residence is None:
        return
    residence.depth -= 1
    if residence.depth:
        return
    for parameter, data in residence.home:
        parameter.data = data
    residence.home.clear()
    release(block.parameters())
