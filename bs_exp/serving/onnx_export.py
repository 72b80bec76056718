"""A saved compressed model as an ONNX file whose graph multiplies by both factors, and holds a shared basis once.

By PyTorch's own exporter (`torch.onnx.export` with `dynamo=True`), which needs packages of the extra `bs-exp[onnx]`.
"""

from __future__ import annotations

import copy
import importlib.util
import logging
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bs_exp.errors import ConfigError, ModelError, SaveError
from bs_exp.files import file_sizes, remove_scratch, scratch_prefix
from bs_exp.models.auto_classes import find_auto_class
from bs_exp.types import Task

FILE = "model.onnx"
_PACKAGES = ("onnx", "onnx_ir", "onnxruntime", "onnxscript")
_INPUTS = ("input_ids", "attention_mask")
# A file of protobuf ends at 2 GiB: weights of more than this lie in a second one (`model.onnx.data`).
_MOST_INSIDE = 3 * 2**29
# Batch and tokens on which the file is compared with the model, other sizes than those that it was traced with.
_TRACED, _COMPARED = (2, 11), ((1, 7), (3, 16))
# Largest difference of outputs that may come from rounding, over the largest output.
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 3e-2}


@dataclass(frozen=True)
class OnnxExport:
    """What was written: the folder, bytes of graph and weights, names and dtype of the outputs.

    `difference` is the largest one between outputs of onnxruntime and PyTorch, over the largest output.
    """

    folder: Path
    bytes: int
    output: str
    dtype: str
    task: Task
    difference: float


def check_exportable(folder: Path) -> None:
    """ConfigError without the packages, ModelError for a kind of model that has no such file; nothing is loaded."""
    if missing := [name for name in _PACKAGES if importlib.util.find_spec(name) is None]:
        raise ConfigError(
            f"export --to onnx needs {', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed: "
            "pip install 'bs-exp[onnx]' (in a checkout: pip install '.[onnx]')."
        )
    _task(folder)


def export_onnx(folder: Path, out: Path) -> OnnxExport:
    """Writes `out`, whole or not at all: the graph, the configuration of the model's kind, and its tokenizer.

    Inputs are `input_ids` and `attention_mask` `[batch, sequence]`, int64; the output is `logits` `[batch, sequence,
    vocabulary]`, or `last_hidden_state` of an encoder without a head. Both axes are free. A decoder has no cache of
    keys and values, so each step reads the whole text. fp16 stays fp16; bfloat16, which onnxruntime has no products for
    on a CPU, becomes fp32. What was written is compared with the model in onnxruntime.

    Raises ModelError if the exporter cannot say a part of the model in ONNX, or the file computes something else.
    """
    check_exportable(folder)
    task = _task(folder)
    auto: Any = find_auto_class(transformers.AutoConfig.from_pretrained(folder), own_code=False)
    model: PreTrainedModel = auto.loader.from_pretrained(folder)
    if model.dtype not in _TOLERANCE:
        model.float()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    out = out.absolute()
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        remove_scratch(out)
        with tempfile.TemporaryDirectory(
            dir=out.parent, prefix=scratch_prefix(out), ignore_cleanup_errors=True
        ) as scratch:
            written = Path(scratch, "new")
            written.mkdir()
            output = "last_hidden_state" if task is Task.ENCODER else "logits"
            _trace(model, output, written / FILE)
            difference = _compare(model, output, written / FILE)
            _write_around(model, tokenizer, written)
            written.rename(out)
    except OSError as error:
        raise SaveError(
            f"Cannot write the export to {out}: {error}. Nothing half-written is left. Free some space, or name "
            "another folder with --out."
        ) from error
    sizes = file_sizes(out)
    return OnnxExport(
        folder=out,
        bytes=sum(size for name, size in sizes.items() if name.startswith(FILE)),
        output=output,
        dtype=str(model.dtype).removeprefix("torch."),
        task=task,
        difference=difference,
    )


def _task(folder: Path) -> Task:
    config = transformers.AutoConfig.from_pretrained(folder)
    auto = find_auto_class(config, own_code=False)
    if auto is None:
        raise ModelError(f"{folder} is of no kind that bs_exp knows: model type {config.model_type!r}.")
    if auto.task is Task.SEQ2SEQ_LM:
        raise ModelError(
            f"{folder} is an encoder-decoder ({config.model_type}), which export --to onnx does not write: it would "
            "need a graph each for encoder and decoder. Use --to dense, and a tool that exports these from there."
        )
    if (getattr(config, "quantization_config", None) or {}).get("experts"):
        raise ModelError(
            f"{folder} holds routed experts ({config.model_type}), which export --to onnx does not write: which ones "
            "run depends on the tokens. Use --to dense, and a tool that exports these from there."
        )
    return auto.task


class _Outputs(nn.Module):
    """The model as a function of two tensors that gives one."""

    def __init__(self, model: PreTrainedModel, output: str) -> None:
        super().__init__()
        self.model = model
        self.output = output

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        # Encoders know no cache.
        no_cache = {"use_cache": False} if hasattr(self.model.config, "use_cache") and self.model.can_generate() else {}
        outputs = self.model(input_ids=input_ids, attention_mask=attention_mask, **no_cache)
        found: Tensor = getattr(outputs, self.output)
        return found


def _trace(model: PreTrainedModel, output: str, path: Path) -> None:
    model.eval()
    axes = {name: {0: "batch", 1: "sequence"} for name in _INPUTS}
    try:
        with torch.no_grad(), _quiet():
            program = torch.onnx.export(
                _Outputs(model, output),
                tuple(_given(model, *_TRACED).values()),
                dynamo=True,
                input_names=list(_INPUTS),
                output_names=[output],
                dynamic_shapes=axes,
                verbose=False,
            )
    except (torch.onnx.OnnxExporterError, RuntimeError) as error:
        raise ModelError(
            f"PyTorch's exporter cannot say this {type(model).__name__} in ONNX: {_reason(error)} "
            "Use --to dense, and the tool of your choice from there."
        ) from error
    assert program is not None
    _tidy(program.model)
    weights = sum(tensor.nbytes for tensor in {id(t): t for t in model.state_dict(keep_vars=True).values()}.values())
    program.save(path, external_data=weights > _MOST_INSIDE)


def _tidy(graph: Any) -> None:
    """Stores equal tensors once, and takes out lines and paths of this machine's source code.

    The exporter turns a basis round for every layer that reads it, and puts its own origin beside every node.
    """
    import onnx_ir
    from onnx_ir.passes import common

    for value in graph.graph.initializers.values():  # the pass below reads arrays in their own order alone
        array = value.const_value.numpy()
        if not array.flags.c_contiguous:
            value.const_value = onnx_ir.tensor(np.ascontiguousarray(array), name=value.name)
    common.DeduplicateHashedInitializersPass()(graph)
    common.ClearMetadataAndDocStringPass()(graph)


def _given(model: PreTrainedModel, batch: int, sequence: int) -> dict[str, Tensor]:
    """Random tokens and a mask; of the last sequence the first token is padding."""
    generator = torch.Generator().manual_seed(sequence)
    known: Any = model.get_input_embeddings()
    ids = torch.randint(known.num_embeddings, (batch, sequence), generator=generator)
    mask = torch.ones_like(ids)
    if batch > 1:
        mask[-1, 0] = 0
    return dict(zip(_INPUTS, (ids, mask), strict=True))


def _compare(model: PreTrainedModel, output: str, path: Path) -> float:
    """The largest difference between both, relative to the largest output; ModelError beyond rounding."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    worst = 0.0
    for batch, sequence in _COMPARED:
        given = _given(model, batch, sequence)
        with torch.inference_mode():
            wanted = _Outputs(model, output)(**given)
        (found,) = session.run([output], {name: value.numpy() for name, value in given.items()})
        read = given["attention_mask"].bool()  # what stands at padding is nobody's
        difference = (torch.from_numpy(found).float() - wanted.float())[read].abs().amax()
        worst = max(worst, float(difference / wanted[read].float().abs().amax()))
    if not worst <= _TOLERANCE[model.dtype]:
        raise ModelError(
            f"The ONNX file of this {type(model).__name__} gives other outputs in onnxruntime than the model does: "
            f"they differ by {worst:.1e} of the largest, where rounding allows {_TOLERANCE[model.dtype]:g}. "
            "Nothing was written. Use --to dense."
        )
    return worst


def _write_around(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """What tools look for beside the graph; the configuration says nothing of factors, which the graph holds."""
    config = copy.deepcopy(model.config)
    for name in ("quantization_config", "auto_map"):
        if hasattr(config, name):
            delattr(config, name)
    config.dtype = model.dtype
    config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _reason(error: BaseException) -> str:
    """The innermost cause, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    line = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return f"{line[:200].rstrip('.')}."


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporter says of itself: its own deprecated calls, and packages that it would also know."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def settings_of(export: OnnxExport) -> Mapping[str, str]:
    """What is to be known of an export, in words."""
    cache = ", without a cache of keys and values" if export.task is Task.CAUSAL_LM else ""
    return {
        "size": f"{export.bytes / 2**20:.2f} MiB",
        "graph": f"{' and '.join(_INPUTS)} [batch, sequence] to {export.output}, {export.dtype}{cache}",
        "compared": f"in onnxruntime with the model: outputs differ by {export.difference:.1e} of the largest",
    }
