"""Keys of what a dense model was found to be, and of tokenised windows: hashes of all that these depend on.

Settings name things, and keys must hold the things: weights, text, tokenizer, code. What cannot be known (a hook on a
module, an evaluator that does not say what it reads) has no key, and is never taken from a cache.
"""

from __future__ import annotations

import hashlib
import platform
import tempfile
from collections.abc import Mapping
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from bs_exp.cache import content_key
from bs_exp.errors import BsExpError
from bs_exp.identity import class_name, code_of, identity
from bs_exp.protocols import Calibration, Evaluator, ReadsContent, WindowSource
from bs_exp.source_code import is_foreign
from bs_exp.types import LoadedModel

# A new version of one of these can change numbers, token ids, or items of tasks.
_LIBRARIES = ("torch", "transformers", "tokenizers", "datasets", "lm-eval", "numpy")
_PACKAGE = Path(__file__).resolve().parents[1]


def content_read(reader: object) -> Mapping[str, str] | None:
    """By name the hashes of what an evaluator or a calibration reads; None if that cannot be known."""
    if not isinstance(reader, ReadsContent):
        return None
    try:
        return dict(reader.content())
    except BsExpError:  # reading it raises it too, where it is expected
        return None


def evaluation_key(evaluator: Evaluator, content: Mapping[str, str] | None, model: LoadedModel) -> str | None:
    """Under which the metrics of a model are kept; None if something that they depend on cannot be known."""
    if content is None or _is_hooked(model.module):
        return None
    return content_key(
        evaluator=identity(evaluator),
        content=dict(content),
        model={
            "weights": model.fingerprint,
            "task": str(model.task),
            "dtype": str(model.module.dtype),
            "attention": str(model.module.config._attn_implementation),
            "code": module_code(model.module),
        },
        tokenizer=tokenizer_hash(model.tokenizer),
        machine=machine(model.device),
        **_code(),
    )


def windows_key(calibration: Calibration, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Under which the windows of a calibration are kept; None if something that they depend on cannot be known."""
    content = content_read(calibration)
    if content is None:
        return None
    return content_key(
        calibration=identity(calibration), content=dict(content), tokenizer=tokenizer_hash(tokenizer), **_code()
    )


def evaluated_windows_key(text: WindowSource, content: str, tokenizer: str) -> str:
    """Under which the windows of an evaluated text are kept, from the hashes of the text and of the tokenizer."""
    return content_key(evaluated=identity(text), content=content, tokenizer=tokenizer, **_code())


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of what `save_pretrained` writes, and of the class; with code of others also of that."""
    digest = hashlib.sha256(repr((class_name(tokenizer), _code_if_foreign(type(tokenizer)))).encode())
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for path in sorted(p for p in Path(folder).rglob("*") if p.is_file()):
            digest.update(f"{path.relative_to(folder)} {path.stat().st_size}\n".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


def module_code(module: nn.Module) -> dict[str, Any]:
    """Every class of a model's parts, with the hashes of its source if it is code of others."""
    return {class_name(part): _code_if_foreign(part) for part in {type(m) for m in module.modules()}}


def machine(device: torch.device) -> dict[str, Any]:
    """What rounding depends on: the processor, its vector instructions, threads and precision of products."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "processor": platform.machine(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "precision": torch.get_float32_matmul_precision(),
    }


def versions() -> dict[str, str]:
    """Versions of the libraries that models, tokenizers and tasks come from."""
    return {name: metadata.version(name) for name in _LIBRARIES}


@cache
def package_hash() -> str:
    """SHA-256 of all of this package's own source and task files, as this process found them first."""
    digest = hashlib.sha256()
    for path in sorted(p for end in ("*.py", "*.yaml") for p in _PACKAGE.rglob(end)):
        digest.update(f"{path.relative_to(_PACKAGE)}\0".encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def _code() -> dict[str, Any]:
    return {"package": package_hash(), "versions": versions()}


def _code_if_foreign(found: type) -> dict[str, str]:
    return code_of(found) if is_foreign(found.__module__) else {}


def _is_hooked(module: nn.Module) -> bool:
    return any(m.training or m._forward_hooks or m._forward_pre_hooks for m in module.modules())
