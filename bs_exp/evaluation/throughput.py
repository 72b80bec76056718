"""Tokens per second of reading a prompt (prefill), and of writing its continuation (decode)."""

from __future__ import annotations

import inspect
import platform
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from bs_exp.corpora.windows import max_positions, vocabulary_size
from bs_exp.errors import ConfigError
from bs_exp.models.model_inputs import check_task
from bs_exp.models.offload import is_offloaded
from bs_exp.records import metrics
from bs_exp.types import LoadedModel, Task
from bs_exp.validation import check_at_least, check_seed


@dataclass(frozen=True, kw_only=True)
class Throughput:
    """Median over `repeats` of prefill and of greedy decoding with a key-value cache, after `warmup` unmeasured runs.

    The prompt is `batch_size` sequences of random tokens, since the time does not depend on which tokens they are.
    Only numbers of the same device, dtype, batch size and lengths can be compared.
    """

    batch_size: int
    prompt_length: int
    generated_length: int
    repeats: int
    warmup: int
    seed: int

    def __post_init__(self) -> None:
        check_at_least(
            1,
            batch_size=self.batch_size,
            prompt_length=self.prompt_length,
            generated_length=self.generated_length,
            repeats=self.repeats,
        )
        check_at_least(0, warmup=self.warmup)
        check_seed(self.seed)

    def evaluate(self, model: LoadedModel) -> Mapping[str, float | str]:
        """`throughput/prefill_tok_s` and `throughput/decode_tok_s` with their `_min` and `_max`, peak memory, settings.

        Rates are in tokens per second. Peak memory, in bytes, is what the accelerator allocated during the runs. On a
        CPU it is left out: the process' peak cannot be reset, so it would include all that ran before (the record has
        the peak of the whole run).
        """
        self.check(model)
        module = model.module
        generator = torch.Generator().manual_seed(self.seed)
        prompt = torch.randint(vocabulary_size(model), (self.batch_size, self.prompt_length), generator=generator)
        prompt = prompt.to(module.device)
        for _ in range(self.warmup):
            read_and_write(module, prompt, self.generated_length)
        on_accelerator = module.device.type != "cpu"
        if on_accelerator:
            torch.accelerator.reset_peak_memory_stats(module.device)
        runs = [read_and_write(module, prompt, self.generated_length) for _ in range(self.repeats)]
        prefill = [prompt.numel() / seconds for seconds, _ in runs]
        decode = [self.batch_size * self.generated_length / seconds for _, seconds in runs]
        settings: dict[str, float | str] = {
            "device": _device_name(module.device),
            "dtype": str(module.dtype).removeprefix("torch."),
            "batch_size": self.batch_size,
            "prompt_length": self.prompt_length,
            "generated_length": self.generated_length,
            "repeats": self.repeats,
            "warmup": self.warmup,
        }
        return {
            **_spread(metrics.PREFILL, prefill),
            **_spread(metrics.DECODE, decode),
            **({metrics.PEAK_MEMORY: _peak_memory(module.device)} if on_accelerator else {}),
            **{metrics.metric(metrics.THROUGHPUT, name): value for name, value in settings.items()},
        }

    def check(self, model: LoadedModel) -> None:
        """ConfigError for a model that is not a causal language model, is offloaded, or has too few positions."""
        check_task(model, "Throughput of reading and writing", Task.CAUSAL_LM)
        if is_offloaded(model.module):
            raise ConfigError(
                "throughput cannot be measured with model.offload=cpu or disk: its weights would be read from the host "
                "or the disk for every token, and that is what would be timed. Use evaluation=perplexity, leave the "
                "evaluator out (~evaluation.evaluators.throughput), or set model.offload=none for the saved model."
            )
        length, limit = self.prompt_length + self.generated_length, max_positions(model)
        if limit is not None and length > limit:
            raise ConfigError(
                f"prompt_length {self.prompt_length} and generated_length {self.generated_length} add up to {length} "
                f"tokens, but the model has {limit} positions; make them shorter."
            )


def read_and_write(
    module: PreTrainedModel, prompt: Int[Tensor, "batch length"], generated_length: int
) -> tuple[float, float]:
    """Seconds of the prefill, and of `generated_length` greedy decoding steps with a key-value cache."""
    # As in generate(): of the prompt only the last logits are needed, and most models can leave the others out.
    last_only = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(module.forward).parameters else {}
    with torch.inference_mode():
        start = _now(module.device)
        output = module(input_ids=prompt, use_cache=True, **last_only)
        token = output.logits[:, -1:].argmax(-1)
        prefilled = _now(module.device)
        for _ in range(generated_length):
            output = module(input_ids=token, past_key_values=output.past_key_values, use_cache=True)
            token = output.logits[:, -1:].argmax(-1)
        return prefilled - start, _now(module.device) - prefilled


def _now(device: torch.device) -> float:
    """A clock in seconds, read after the device has finished all work given to it."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def _spread(name: str, values: Sequence[float]) -> dict[str, float]:
    return {name: statistics.median(values), name + metrics.SLOWEST: min(values), name + metrics.FASTEST: max(values)}


def _peak_memory(device: torch.device) -> int:
    return int(torch.accelerator.max_memory_allocated(device))


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.machine()}, {torch.get_num_threads()} threads)"
