"""Models that are larger than the device, or than memory: the weights of one block at a time are there.

The weights of blocks stay where they were loaded, in the host's memory or in the checkpoint's own files, and are on the
device from the beginning of a block's call to its end, or for as long as the block is `resident`. Parameters stay the
objects they are: twins share them, and hooks watch their gradients.

On a CPU that cannot multiply numbers of 16 bits, their products take 5 to 100 times as long as in fp32. There a block's
weights become fp32 as they come, what it is given does, too, and its output is rounded to the model's dtype again. So
it is with a head that has weights of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

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


def place(module: PreTrainedModel, blocks: Iterable[str], device: torch.device) -> None:
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
        _settle(module.get_submodule(path), device)
    head = head_of(module)
    own = {id(weight) for weight in head.parameters() if not computes(weight.dtype, device)}
    # Embeddings that share the head's weights run while it is resident, and what follows them is not made for fp32.
    if own and not any(id(weight) in own for weight in module.get_input_embeddings().parameters()):
        _settle(head, device)


def head_of(module: PreTrainedModel) -> nn.Module:
    """What makes logits of hidden states; a module without weights if there is no head."""
    found = module.get_output_embeddings()
    return nn.Identity() if found is None else found


def is_offloaded(module: nn.Module) -> bool:
    """Whether the blocks of a model wait elsewhere than on its device."""
    return any(_RESIDENCE in vars(part) for part in module.modules())


def lies_in_files(module: nn.Module) -> bool:
    """Whether weights of a model lie in files."""
    return any(is_mapped(parameter) for parameter in module.parameters())


@contextmanager
def resident(block: nn.Module) -> Iterator[None]:
    """The weights of a block on the device, and in memory; its calls meanwhile move nothing."""
    try:
        _enter(block)
        yield
    finally:
        _leave(block)


@contextmanager
def passing(block: nn.Module) -> Iterator[None]:
    """Something else runs in the place of a block's calls meanwhile: its weights stay where they are."""
    residence: _Residence | None = vars(block).get(_RESIDENCE)
    if residence is None:
        yield
        return
    before, residence.passing = residence.passing, True
    try:
        yield
    finally:
        residence.passing = before


def dtypes_at_home(block: nn.Module) -> dict[nn.Parameter, torch.dtype]:
    """Of the weights of a resident block that wait elsewhere, what they are stored in there."""
    residence: _Residence | None = vars(block).get(_RESIDENCE)
    return {} if residence is None else {parameter: data.dtype for parameter, data in residence.home}


def keep_changes(block: nn.Module) -> None:
    """The weights of a resident block, as they are now, go to where they wait; where they are rounded there, they are
    rounded here."""
    residence: _Residence | None = vars(block).get(_RESIDENCE)
    for parameter, data in residence.home if residence is not None else ():
        data.copy_(parameter.data)
        parameter.data.copy_(data)


def computes(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether PyTorch has kernels for products in a dtype that use a device's own instructions.

    On a CPU that is what oneDNN says: AVX-512 for bfloat16, its part for fp16. A PyTorch without it cannot tell.
    """
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return True
    match dtype:
        case torch.bfloat16:
            return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
        case torch.float16:
            return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
        case _:
            return True


@dataclass(eq=False)
class _Residence:
    """Where a block's weights are: `home` holds those that wait elsewhere while the block is on the device.

    `rounded` is the dtype of 16 bits that the device cannot multiply in, if the block's weights have one; while
    `converts` holds, they are in fp32 instead.
    """

    device: torch.device
    rounded: torch.dtype | None
    depth: int = 0
    converts: bool = False
    passing: bool = False
    home: list[tuple[nn.Parameter, Tensor]] = field(default_factory=list)


def _settle(part: nn.Module, device: torch.device) -> None:
    dtypes = {parameter.dtype for parameter in part.parameters()}
    rounded = next((dtype for dtype in dtypes if not computes(dtype, device)), None)
    setattr(part, _RESIDENCE, _Residence(device, rounded))
    part.register_forward_pre_hook(_enter)
    part.register_forward_pre_hook(_give, with_kwargs=True)
    part.register_forward_hook(_return)
    part.register_forward_hook(_leave, always_call=True)


def _enter(block: nn.Module, *call: Any) -> None:
    residence: _Residence | None = vars(block).get(_RESIDENCE)
    if residence is None or (call and residence.passing):
        return
    residence.depth += 1
    comes = residence.depth == 1
    if comes:
        # After a call alone its weights go, which its backward pass may need as they were in it.
        residence.converts = residence.rounded is not None and not (call and torch.is_grad_enabled())
    for parameter in block.parameters():  # also those that were exchanged meanwhile, or went home with another block
        dtype = torch.float32 if residence.converts and parameter.dtype == residence.rounded else parameter.dtype
        if parameter.dtype != dtype or (comes and parameter.device != residence.device):
            residence.home.append((parameter, parameter.data))
            parameter.data = parameter.data.to(residence.device, dtype)


def _give(block: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
    residence: _Residence = vars(block)[_RESIDENCE]
    if not residence.converts or residence.passing:
        return None
    return _cast((arguments, keywords), residence.rounded, torch.float32)


def _return(block: nn.Module, arguments: tuple[Any, ...], output: Any) -> Any:
    residence: _Residence = vars(block)[_RESIDENCE]
    return None if not residence.converts or residence.passing else _cast(output, torch.float32, residence.rounded)


def _cast(given: Any, old: torch.dtype | None, new: torch.dtype | None) -> Any:
    """The same with tensors of one dtype in another, in tuples, lists and dictionaries alone."""
    match given:
        case Tensor() if given.dtype == old and new is torch.float16:
            # Models that clamp what their blocks give if they are in fp16 (T5, BART) do not do so here.
            largest = torch.finfo(torch.float16).max
            return given.clamp(-largest, largest).where(given.isfinite(), given).to(new)
        case Tensor() if given.dtype == old:
            return given.to(new)
        case tuple() | list() if type(given) in (tuple, list):
            return type(given)(_cast(each, old, new) for each in given)
        case dict() if type(given) is dict:
            return {name: _cast(each, old, new) for name, each in given.items()}
        case _:
            return given


def _leave(block: nn.Module, *call: Any) -> None:
    residence: _Residence | None = vars(block).get(_RESIDENCE)
    if residence is None or (call and residence.passing):
        return
    residence.depth -= 1
    if residence.depth:
        return
    # Of a weight that went home and came again, the first is its home.
    for parameter, data in reversed(residence.home):
        parameter.data = data
    residence.home.clear()
    release(block.parameters())
