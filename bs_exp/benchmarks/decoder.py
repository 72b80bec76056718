"""How fast a Llama reads and writes, dense and factorised: `python -m bs_exp.benchmarks.decoder --help`.

Random weights in the shapes of LLaMA-7B, a few of its blocks, and a head as small in proportion. Every matrix of the
blocks keeps the same share of its parameters. All variants are timed in turn, several times over. Where products of
factors are rearranged (on CPUs), there is a dense model whose products are, too: what is left of a speed-up against it
is due to the factors alone.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from itertools import product

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from bs_exp.benchmarks.comparison import (
    FACTORISED,
    Measurement,
    Variant,
    add_arguments,
    check_arguments,
    compared,
    device,
    factorised,
    move,
    report,
)
from bs_exp.evaluation.in_turns import in_turn
from bs_exp.evaluation.throughput import read_and_write
from bs_exp.models.modeling_basis_sharing import arrangement, linear
from bs_exp.models.surgery import twin


def variants(
    config: LlamaConfig, ratio: float, *, dtype: torch.dtype, device: torch.device, multiple: int = 1, group: int = 1
) -> tuple[Variant, ...]:
    """The dense model, and three twins with all block matrices factorised: one for each name in `FACTORISED`.

    Embeddings, norms and head are shared by all four; `group` consecutive blocks share their bases. Raises ValueError
    if the ratio leaves no room for a rank of `multiple`.
    """
    with device:
        dense = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    blocks = dense.model.layers
    matrices = [name for name, m in blocks[0].named_modules() if isinstance(m, nn.Linear)]
    head = dense.lm_head.weight.numel()
    total = sum(blocks[0].get_submodule(name).weight.numel() for name in matrices) * len(blocks)
    rest = sum(p.numel() for p in dense.parameters()) - total
    found = [Variant(name="dense", module=dense, rank=None, parameters=rest + total, multiply_adds=head + total)]
    for name in FACTORISED:
        model, parameters, operations = twin(dense), rest, head
        for matrix, first in product(matrices, range(0, len(blocks), group)):
            members = model.model.layers[first : first + group]
            made = factorised([b.get_submodule(matrix) for b in members], name, ratio, multiple=multiple)
            for block, layer in zip(members, made.layers, strict=True):
                block.set_submodule(matrix, layer)
            parameters, operations = parameters + made.parameters, operations + made.multiply_adds
        found.append(Variant(name=name, module=model, rank=None, parameters=parameters, multiply_adds=operations))
    return tuple(found)


class DenseRearranged(nn.Module):
    """A dense layer without bias, computed as factors are."""

    def __init__(self, layer: nn.Linear):
        super().__init__()
        self.weight = layer.weight

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight)


@torch.no_grad()
def dense_rearranged(dense: Variant) -> tuple[Variant, ...]:
    """The dense model with the products of its blocks arranged as those of factors are; none where these are as usual.

    It holds the same parameters.
    """
    model = twin(dense.module)
    blocks = model.get_submodule("model.layers")
    layers = [(name, m) for name, m in blocks.named_modules() if isinstance(m, nn.Linear)]
    if not any(arrangement(m.weight.new_empty(1, m.in_features), m.weight) for _, m in layers):
        return ()
    for name, layer in layers:
        blocks.set_submodule(name, DenseRearranged(layer))
    return (replace(dense, name="dense, rearranged", module=model),)


def measure(
    found: Sequence[Variant], batch: int, *, prompt_length: int, generated_length: int, rounds: int
) -> Sequence[Measurement]:
    """Times of prefill and of a decoding step, for all variants on `batch` prompts, measured round by round."""
    reading: list[list[float]] = [[] for _ in found]
    writing: list[list[float]] = [[] for _ in found]
    for count, i in enumerate(in_turn(len(found), rounds + 1)):
        model = found[i].module
        assert isinstance(model, PreTrainedModel)
        prompt = torch.randint(model.config.vocab_size, (batch, prompt_length), device=model.device)
        move(model)
        prefill, decode = read_and_write(model, prompt, generated_length)
        if count >= len(found):  # the first round fills caches
            reading[i].append(prefill)
            writing[i].append(decode / generated_length)
    return (
        *compared(f"read {batch} x {prompt_length}", found, reading),
        *compared(f"write {batch} x 1", found, writing),
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints a table; `--json` also writes it with versions and hardware."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--intermediate", type=int, default=11008)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--blocks", type=int, default=2, help="LLaMA-7B has 32")
    parser.add_argument("--vocabulary", type=int, help="1000 per block if left out, as in LLaMA-7B")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16], help="prompts at a time")
    parser.add_argument("--prompt-length", type=int, default=32)
    parser.add_argument("--generated-length", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    add_arguments(parser)
    options = parser.parse_args(arguments)
    names = ("hidden", "intermediate", "heads", "blocks", "prompt_length", "generated_length", "rounds")
    at_least_one = {name: getattr(options, name) for name in names}
    vocabulary = 1000 * options.blocks if options.vocabulary is None else options.vocabulary
    check_arguments(parser, options, **at_least_one, batch=min(options.batch), vocabulary=vocabulary)
    if options.hidden % (2 * options.heads):  # rotary embeddings turn pairs
        parser.error(f"--hidden must be a multiple of twice --heads, got {options.hidden} and {options.heads}")
    config = LlamaConfig(
        hidden_size=options.hidden,
        intermediate_size=options.intermediate,
        num_attention_heads=options.heads,
        num_hidden_layers=options.blocks,
        vocab_size=vocabulary,
    )
    where = {"dtype": getattr(torch, options.dtype), "device": device(parser, options)}
    sizes = {"multiple": options.multiple, "group": options.group}
    try:
        dense, *others = variants(config, options.ratio, **sizes, **where)
    except (ValueError, RuntimeError) as error:
        parser.error(str(error))
    found = (dense, *dense_rearranged(dense), *others)
    lengths = {"prompt_length": options.prompt_length, "generated_length": options.generated_length}
    measurements = [m for batch in options.batch for m in measure(found, batch, rounds=options.rounds, **lengths)]
    report(measurements, options, f"{options.blocks} blocks, {options.hidden} and {options.intermediate} wide, eager")


if __name__ == "__main__":
    main()
