"""Reading a checkpoint through `from_pretrained`; every failure becomes a ModelError that says what to do.

A weight that the checkpoint lacks is an error, never a randomly initialised layer. So is a weight of another shape, and
a weight of the blocks that the model has no place for.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import (
    CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
)
from transformers.utils.hub import cached_file, extract_commit_hash

from bs_exp.errors import ModelError
from bs_exp.models.architecture import Roles
from bs_exp.models.auto_classes import AutoClass, find_auto_class
from bs_exp.models.in_place import check_shards, read_in_place
from bs_exp.models.mapped import read_header
from bs_exp.models.shapes import known_config, on_meta
from bs_exp.types import LoadedModel, Task

_WEIGHT_FILES = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME)

_ATTENTION = re.compile(r"attn_implementation|attention implementation|flash.?att|flex.?att", re.IGNORECASE)


class ReadCheckpoint(NamedTuple):
    """What a checkpoint holds; `unused` names the weights that the model has no place for, `odd` says what is wrong
    about its files and does no harm."""

    module: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    task: Task
    unused: tuple[str, ...]
    odd: str | None = None


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A folder or a name on the hub, and how to read it; `hint` says what to do when that fails.

    `in_place` leaves the weights in their files (`bs_exp.models.mapped`), which must be safetensors.
    """

    place: str
    dtype: torch.dtype | str
    hint: str
    revision: str | None = None
    attn_implementation: str | None = None
    trust_remote_code: bool = False
    allow_unused: bool = False
    in_place: bool = False

    def pinned(self) -> Checkpoint:
        """The checkpoint at the commit that its revision names now, so that all its files are of one commit."""
        with self._reading("configuration"):
            file = cached_file(self.place, CONFIG_NAME, revision=self.revision)
        return replace(self, revision=extract_commit_hash(file, None) or self.revision)

    def read(self) -> ReadCheckpoint:
        """The model on the CPU, its tokenizer, its task, and the weights that were not used.

        Raises ModelError if the checkpoint cannot be read, is quantised or of no supported kind, or does not fit the
        model: the message then has names and shapes of weights.
        """
        config = self._read_config()
        self._require_dense(config)
        auto = self._find_auto_class(config)
        tokenizer = self._read_tokenizer()
        with self._reading("weights"):
            local = not self.in_place and Path(self.place).is_dir()
            odd = check_shards(Path(self.place), self.hint) if local else None
        module, unused = self._read_model(config, auto)
        return ReadCheckpoint(module, tokenizer, auto.task, unused, odd)

    def shapes(self, roles: Roles | None) -> LoadedModel:
        """The model on the meta device, from its configuration: no weight is read, and none needs to be there.

        A model on the hub is looked for in the machine's own cache, then among the known ones (`known_shapes.yaml`),
        and on the hub last. Raises ModelError as `read` does.
        """
        config = self._config_at_hand()
        self._require_dense(config)
        auto = self._find_auto_class(config)
        dtype = self.dtype if isinstance(self.dtype, torch.dtype) else self._stored_dtype(config)
        options: dict[str, Any] = {"trust_remote_code": self.trust_remote_code}
        if self.attn_implementation is not None:
            options["attn_implementation"] = self.attn_implementation
        with self._reading("shapes"):
            return on_meta(
                config, auto, self._tokenizer_at_hand(auto.task), roles, dtype=dtype, name=self.place, options=options
            )

    def _config_at_hand(self) -> PreTrainedConfig:
        if not Path(self.place).is_dir():
            try:
                at_hand: PreTrainedConfig = AutoConfig.from_pretrained(
                    self.place,
                    revision=self.revision,
                    trust_remote_code=self.trust_remote_code,
                    local_files_only=True,
                )
                return at_hand
            except (OSError, ValueError):
                if (known := known_config(self.place)) is not None:
                    return known
        return self._read_config()

    def _stored_dtype(self, config: PreTrainedConfig) -> torch.dtype:
        """That of the configuration, or else of the weights, as far as a file of them is there."""
        given = getattr(config, "dtype", None)
        if isinstance(given, str):
            given = getattr(torch, given)
        if given is None and (files := sorted(Path(self.place).glob("*.safetensors"))):
            with self._reading("weights"):
                given = next((tensor.dtype for tensor in read_header(files[0]).values()), None)
        return given if isinstance(given, torch.dtype) else torch.float32

    def _tokenizer_at_hand(self, task: Task) -> PreTrainedTokenizerBase:
        """The tokenizer of a folder that has one; else one of bytes, with the special tokens that feeding takes."""
        if Path(self.place).is_dir():
            with suppress(ModelError):
                return self._read_tokenizer()
        from bs_exp.models.tiny import byte_tokenizer  # which imports this file

        return byte_tokenizer(task)

    def _read_config(self) -> PreTrainedConfig:
        with self._reading("configuration"):
            config: PreTrainedConfig = AutoConfig.from_pretrained(
                self.place, revision=self.revision, trust_remote_code=self.trust_remote_code
            )
        return config

    def _read_tokenizer(self) -> PreTrainedTokenizerBase:
        with self._reading("tokenizer"):
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                self.place, revision=self.revision, trust_remote_code=self.trust_remote_code
            )
        # Without files some tokenizer classes come up empty instead of failing.
        if tokenizer.vocab_size == 0:
            raise ModelError(f"{self.place} has no tokenizer files (tokenizer.json, ...). {self.hint}")
        return tokenizer

    def _read_model(self, config: PreTrainedConfig, auto: AutoClass) -> tuple[PreTrainedModel, tuple[str, ...]]:
        options = {} if self.attn_implementation is None else {"attn_implementation": self.attn_implementation}
        with self._reading("weights"):
            loaded: Any
            if self.in_place:
                loaded = read_in_place(self, config, auto, options)
            else:
                loaded = auto.loader.from_pretrained(
                    self.place,
                    config=config,
                    revision=self.revision,
                    dtype=self.dtype,
                    trust_remote_code=self.trust_remote_code,
                    output_loading_info=True,
                    # Told below, with names and shapes: Transformers' own report goes to its log.
                    ignore_mismatched_sizes=True,
                    **options,
                )
        module: PreTrainedModel
        module, info = loaded
        model = type(module).__name__
        if mismatched := sorted(info["mismatched_keys"]):
            shapes = [f"{name} is {_shape(stored)}, needed is {_shape(needed)}" for name, stored, needed in mismatched]
            raise ModelError(
                f"{len(mismatched)} weights of the checkpoint {self.place} do not have the shapes of {model}: "
                f"{_some(shapes)}. config.json and weights do not belong together: check its sizes (hidden_size, "
                f"num_attention_heads, num_key_value_heads, ...). {self.hint}"
            )
        if missing := sorted(info["missing_keys"]):
            raise ModelError(
                f"The checkpoint {self.place} lacks {len(missing)} weights of {model}: {_some(missing)}. "
                f"They would be random. {self.hint}"
            )
        unused = tuple(sorted(info["unexpected_keys"]))
        foreign = [name for name in unused if _belongs_to_blocks(name, module)]
        if foreign and not self.allow_unused:
            raise ModelError(
                f"{model} has no place for {len(foreign)} weights of the checkpoint {self.place}: {_some(foreign)}. "
                "Without them it computes something else: config.json describes another model (fewer layers, no "
                "biases, ...). Correct it, or set model.allow_unused=true if these weights are meant to be left out."
            )
        return module, unused

    def _require_dense(self, config: PreTrainedConfig) -> None:
        quantization = getattr(config, "quantization_config", None)
        if quantization is not None:
            method = quantization.get("quant_method") if isinstance(quantization, dict) else type(quantization).__name__
            raise ModelError(
                f"{self.place} is already compressed or quantised (quant_method {method!r}); compression starts from "
                "a dense checkpoint. Name the model that it was made from; a model saved by bs_exp can be turned back "
                "into a dense one with bs_exp.to_dense(model)."
            )

    def _find_auto_class(self, config: PreTrainedConfig) -> AutoClass:
        auto = find_auto_class(config, own_code=self.trust_remote_code)
        if auto is None:
            raise ModelError(
                f"{self.place} is of no kind that can be compressed: model type {config.model_type!r}, architectures "
                f"{', '.join(config.architectures or ()) or 'not given'}. Name a checkpoint of a causal language "
                "model (LlamaForCausalLM), of an encoder with or without its masked-token head (BertForMaskedLM, "
                "BertModel), or of an encoder-decoder with its head (T5ForConditionalGeneration)."
            )
        return auto

    def _reading(self, what: str) -> AbstractContextManager[None]:
        return reading(what, self.place, self._remedy)

    def _remedy(self, error: Exception) -> str:
        """What to do about an error: another kind of attention where that is what fails, else the checkpoint's hint."""
        if self.attn_implementation is not None and _ATTENTION.search(str(error)):
            return (
                f"model.attn_implementation is {self.attn_implementation!r}: install what it needs, or set it to "
                "null, sdpa or eager."
            )
        return self.hint


@contextmanager
def reading(what: str, place: str, remedy: Callable[[Exception], str]) -> Iterator[None]:
    """Has every error of the libraries that read a checkpoint become a ModelError, which ends with the `remedy` for it.

    These build what files say, so a damaged one can make them raise anything (tokenizers raises bare Exceptions).
    """
    try:
        yield
    except ModelError:
        raise
    except Exception as error:
        message = f"Cannot read the {what} of {place}: {type(error).__name__}: {error}\n{remedy(error)}"
        raise ModelError(message) from error


def _belongs_to_blocks(name: str, module: nn.Module) -> bool:
    """Whether an unused weight would change what the model computes.

    So does one of a layer that the model has (a bias), and one of a block beyond its last. Heads and poolers are not
    used by every task.
    """
    parent = dict(module.named_modules()).get(name.rpartition(".")[0])
    if parent is not None and any(True for _ in parent.parameters(recurse=False)):
        return True
    stacks = [path for path, part in module.named_modules() if isinstance(part, nn.ModuleList)]
    return any(re.match(rf"{re.escape(path)}\.\d+\.", name) for path in stacks)


def _shape(size: Sequence[int]) -> str:
    return " x ".join(map(str, size))


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def require_checkpoint(folder: Path, hint: str) -> None:
    """ModelError unless the folder holds a configuration and weights; `hint` is added to the message."""
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.exists() else "does not exist"
        raise ModelError(f"Model folder {folder} {what}. {hint}")
    present = sorted(entry.name for entry in folder.iterdir())
    for what, names in (("configuration", (CONFIG_NAME,)), ("weights", _WEIGHT_FILES)):
        if not set(names) & set(present):
            raise ModelError(
                f"Model folder {folder} holds no {what}: looked for {' or '.join(names)}, found "
                f"{', '.join(present[:10]) or 'nothing'}. {hint}"
            )
