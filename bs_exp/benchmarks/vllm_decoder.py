"""How fast vLLM reads and writes with a Llama, dense and factorised: `python -m bs_exp.benchmarks.vllm_decoder --help`.

The models of `bs_exp.benchmarks.decoder`, saved and served; all engines stand in one process and are timed in turn. On
a machine with other work, `--processor-time` on one thread (OMP_NUM_THREADS=1, VLLM_CPU_OMP_THREADS_BIND=0) leaves out
the time in which others have the processor.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, PreTrainedModel

from bs_exp.benchmarks.comparison import (
    PLAIN,
    Measurement,
    Variant,
    add_arguments,
    check_arguments,
    compared,
    report,
)
from bs_exp.benchmarks.decoder import variants
from bs_exp.evaluation.in_turns import in_turn
from bs_exp.layout.pivoted import PivotedLayout
from bs_exp.layout.plain import PlainLayout
from bs_exp.models.modeling_basis_sharing import BasisSharingConfig, BasisSharingQuantizer, FactorisedLinear


def save(found: Variant, folder: Path) -> Path:
    """Saves a variant as `save_model` would, without a tokenizer."""
    model = found.module
    assert isinstance(model, PreTrainedModel)
    groups: dict[int, dict[str, Any]] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, FactorisedLinear):
            group = groups.setdefault(id(layer.basis), {"members": [], "rank": layer.rank})
            group["members"].append(name)
    if groups:
        layout = PlainLayout() if found.name == PLAIN else PivotedLayout()
        config = BasisSharingConfig(groups=list(groups.values()), layout=layout.name)
        BasisSharingQuantizer(config).attach(model)
    model.save_pretrained(folder)
    return folder


def engine(folder: Path, options: argparse.Namespace) -> Any:
    """vLLM with the model of a folder, in this process."""
    # Read when vLLM is imported: one process, and memory for few tokens.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    from vllm import LLM

    return LLM(
        str(folder),
        dtype=options.dtype,
        enforce_eager=options.eager,
        max_model_len=options.prompt_length + options.generated_length,
        max_num_seqs=max(options.batch),
        enable_prefix_caching=False,
        gpu_memory_utilization=0.1,  # four engines share the memory
        skip_tokenizer_init=True,
    )


def seconds(served: Any, prompts: Sequence[Sequence[int]], tokens: int, clock: Callable[[], float]) -> float:
    """Time by a clock for so many greedy tokens after each prompt."""
    from vllm import SamplingParams

    wanted = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    start = clock()
    served.generate([{"prompt_token_ids": list(prompt)} for prompt in prompts], wanted, use_tqdm=False)
    return clock() - start


def measure(
    found: Sequence[Variant], engines: Sequence[Any], batch: int, options: argparse.Namespace
) -> list[Measurement]:
    """Times until the first token of a batch, and of each further step, for all variants, round by round."""
    reading: list[list[float]] = [[] for _ in found]
    writing: list[list[float]] = [[] for _ in found]
    clock = time.process_time if options.processor_time else time.perf_counter
    random = torch.Generator().manual_seed(0)
    for count, i in enumerate(in_turn(len(found), options.rounds + 1)):
        prompts = torch.randint(options.vocabulary, (batch, options.prompt_length), generator=random).tolist()
        first = seconds(engines[i], prompts, 1, clock)
        whole = seconds(engines[i], prompts, options.generated_length, clock)
        if count >= len(found):  # the first round fills caches
            reading[i].append(first)
            writing[i].append((whole - first) / (options.generated_length - 1))
    return [
        *compared(f"read {batch} x {options.prompt_length}", found, reading),
        *compared(f"write {batch} x 1", found, writing),
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints a table; `--json` also writes it with versions and hardware."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--intermediate", type=int, default=5504)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--vocabulary", type=int, default=2000)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16], help="prompts at a time")
    parser.add_argument("--prompt-length", type=int, default=32)
    parser.add_argument("--generated-length", type=int, default=17)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--eager", action="store_true", help="do not have vLLM compile the models")
    parser.add_argument("--processor-time", action="store_true", help="of all threads, not time by the clock")
    add_arguments(parser)
    options = parser.parse_args(arguments)
    names = ("hidden", "intermediate", "heads", "blocks", "prompt_length", "rounds", "vocabulary")
    check_arguments(parser, options, **{name: getattr(options, name) for name in names}, batch=min(options.batch))
    if options.generated_length < 2:
        parser.error(f"--generated-length must be at least 2, got {options.generated_length}")
    config = LlamaConfig(
        hidden_size=options.hidden,
        intermediate_size=options.intermediate,
        num_attention_heads=options.heads,
        num_hidden_layers=options.blocks,
        vocab_size=options.vocabulary,
    )
    sizes = {"multiple": options.multiple, "group": options.group}
    try:
        found = variants(
            config, options.ratio, dtype=getattr(torch, options.dtype), device=torch.device("cpu"), **sizes
        )
    except ValueError as error:
        parser.error(str(error))
    with tempfile.TemporaryDirectory() as root:
        engines = [engine(save(one, Path(root, str(i))), options) for i, one in enumerate(found)]
        measurements = [m for batch in options.batch for m in measure(found, engines, batch, options)]
    how = "eager" if options.eager else "compiled"
    how += ", processor time" if options.processor_time else ""
    report(measurements, options, f"vLLM: {options.blocks} blocks, {options.hidden} wide, {how}")


if __name__ == "__main__":
    main()
