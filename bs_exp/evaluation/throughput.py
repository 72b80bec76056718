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
from bs_exp.evaluation.in_turns import compare_rounds, in_turn
from bs_exp.models.model_inputs import check_task
from bs_exp.models.offload import is_offloaded
from bs_exp.models.parking import held_alone, parked
from bs_exp.records import metrics
from bs_exp.types import LoadedModel, Task
from bs_exp.validation import check_at_least, check_seed


@dataclass(frozen=True)
class _Run:
    """Seconds of one prefill and of the decoding after it, and the bytes allocated meanwhile; None on a CPU."""

    prefill: float
    decode: float
    peak_memory: int | None


@dataclass(frozen=True, kw_only=True)
class Throughput:
    """Median over `repeats` of prefill and of greedy decoding with a key-value cache, after `warmup` unmeasured runs.

    Dense and compressed model are timed in turns, round by round (`compare`).

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

    def compared(self, dense: LoadedModel) -> tuple[str, ...]:
        rates = (metrics.PREFILL, metrics.DECODE)
        names = (rate + end for rate in rates for end in ("", metrics.SLOWEST, metrics.FASTEST))
        return (*names, *(() if dense.device.type == "cpu" else (metrics.PEAK_MEMORY,)))

    def evaluate(self, model: LoadedModel) -> Mapping[str, float | str]:
        """`throughput/prefill_tok_s` and `throughput/decode_tok_s` with their `_min` and `_max`, peak memory, settings.

        Rates are in tokens per second. Peak memory, in bytes, is what the accelerator allocated during the runs. On a
        CPU it is left out: the process' peak cannot be reset, so it would include all that ran before (the record has
        the peak of the whole run).
        """
        self.check(model)
        (runs,) = self._timed([model])
        return self._metrics(model, runs)

    def compare(
        self, dense: LoadedModel, compressed: LoadedModel
    ) -> tuple[Mapping[str, float | str], Mapping[str, float | str]]:
        """The metrics of both models, timed in turns in `repeats` rounds; of the compressed one also its speed-up.

        `_speedup` is the median over rounds of its speed over the dense model's in the same round, `_speedup_low` and
        `_speedup_high` the 95 % interval of that (with 6 rounds or more), `_drift` the change of the machine's own
        speed, and `_difference` says `faster`, `slower` or `no difference measured`. Where an accelerator lacks the
        memory for both, they are timed apart, as `throughput/timed` then says, and no difference is measured.
        """
        for model in (dense, compressed):
            self.check(model)
        try:
            both = self._timed([dense, compressed])
            timed = metrics.IN_TURNS
        except torch.OutOfMemoryError:
            both = []
            for model, other in ((dense, compressed), (compressed, dense)):
                with parked(other.module, beside=model.module):
                    both += self._timed([model])
            timed = metrics.APART
        found = [
            {**self._metrics(m, runs), metrics.TIMED: timed} for m, runs in zip((dense, compressed), both, strict=True)
        ]
        for name, phase in ((metrics.PREFILL, "prefill"), (metrics.DECODE, "decode")):
            seconds = [[getattr(run, phase) for run in runs] for runs in both]
            found[1] |= _compared(name, *seconds) if timed == metrics.IN_TURNS else _no_difference(name)
        return found[0], found[1]

    def _timed(self, models: Sequence[LoadedModel]) -> list[list[_Run]]:
        """The measured runs of every model, made in turns: `warmup` unmeasured rounds, then `repeats` measured ones."""
        runs: list[list[_Run]] = [[] for _ in models]
        prompts = [self._prompt(model) for model in models]
        for count, i in enumerate(in_turn(len(models), self.warmup + self.repeats)):
            run = self._run(models[i].module, prompts[i], [m.module for m in models if m is not models[i]])
            if count >= self.warmup * len(models):
                runs[i].append(run)
        return runs

    def _prompt(self, model: LoadedModel) -> Int[Tensor, "batch length"]:
        generator = torch.Generator().manual_seed(self.seed)
        prompt = torch.randint(vocabulary_size(model), (self.batch_size, self.prompt_length), generator=generator)
        return prompt.to(model.device)

    def _run(self, module: PreTrainedModel, prompt: Tensor, others: Sequence[PreTrainedModel]) -> _Run:
        device = module.device
        if device.type == "cpu":
            return _Run(*read_and_write(module, prompt, self.generated_length), peak_memory=None)
        torch.accelerator.reset_peak_memory_stats(device)
        prefill, decode = read_and_write(module, prompt, self.generated_length)
        # What only the other model holds waits in the same memory, and is none of this one's.
        waiting = sum(held_alone(other, beside=module, device=device) for other in others)
        return _Run(prefill, decode, int(torch.accelerator.max_memory_allocated(device)) - waiting)

    def _metrics(self, model: LoadedModel, runs: Sequence[_Run]) -> dict[str, float | str]:
        settings: dict[str, float | str] = {
            "device": _device_name(model.device),
            "dtype": str(model.module.dtype).removeprefix("torch."),
            "batch_size": self.batch_size,
            "prompt_length": self.prompt_length,
            "generated_length": self.generated_length,
            "repeats": self.repeats,
            "warmup": self.warmup,
        }
        peaks = [run.peak_memory for run in runs if run.peak_memory is not None]
        return {
            **_spread(metrics.PREFILL, [self.batch_size * self.prompt_length / run.prefill for run in runs]),
            **_spread(metrics.DECODE, [self.batch_size * self.generated_length / run.decode for run in runs]),
            **({metrics.PEAK_MEMORY: max(peaks)} if peaks else {}),
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


def _compared(name: str, dense: Sequence[float], compressed: Sequence[float]) -> dict[str, float | str]:
    """What the seconds of both models, by round, say of the compressed one's speed."""
    comparison = compare_rounds(dense, compressed)
    found: dict[str, float | str] = {name + metrics.SPEEDUP: comparison.ratio, name + metrics.DRIFT: comparison.drift}
    if comparison.interval is not None:
        found |= dict(zip((name + metrics.SPEEDUP_LOW, name + metrics.SPEEDUP_HIGH), comparison.interval, strict=True))
    return found | {name + metrics.DIFFERENCE: comparison.in_words}


def _no_difference(name: str) -> dict[str, float | str]:
    return {name + metrics.DIFFERENCE: metrics.NO_DIFFERENCE}


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.machine()}, {torch.get_num_threads()} threads)"
