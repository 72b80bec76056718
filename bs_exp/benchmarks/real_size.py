"""What a model of a real size costs, with random weights: `python -m bs_exp.benchmarks.real_size --help`.

A Llama in bfloat16 is written to a folder, one block at a time. Each run then compresses it in a process of its own, by
the command line of every user, with very little text, and its record says what it took: peak resident memory, with the
pages of files that the process had in memory, the size of the cache, and seconds by stage.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from bs_exp.files import file_sizes
from bs_exp.models.tiny import byte_tokenizer
from bs_exp.records.record import RunRecord, read_record
from bs_exp.validation import check_at_least

_HEADS = 16
_GB = 1e9


def write_model(folder: Path, *, layers: int, width: int, d_ff: int, vocabulary: int = 32_000, seed: int = 0) -> None:
    """A checkpoint of random weights (standard deviation 0.02; norms 1), one shard for each block, with a byte
    tokenizer."""
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=d_ff,
        num_hidden_layers=layers,
        num_attention_heads=_HEADS,
        num_key_value_heads=_HEADS,
        vocab_size=vocabulary,
        max_position_embeddings=2048,
        dtype="bfloat16",
    )
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config)
    config.architectures = [type(empty).__name__]
    config.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    generator = torch.Generator().manual_seed(seed)
    shards: dict[str, dict[str, Tensor]] = {}
    for name, weight in empty.state_dict().items():
        parts = name.split(".")
        shards.setdefault(f"block-{int(parts[2]):03}" if parts[1] == "layers" else "others", {})[name] = weight
    weight_map: dict[str, str] = {}
    total = 0
    for shard, weights in shards.items():
        file = f"{shard}.safetensors"
        made = {name: _random(weight, generator) for name, weight in weights.items()}
        save_file(made, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(made, file)
        total += sum(weight.nbytes for weight in made.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _random(weight: Tensor, generator: torch.Generator) -> Tensor:
    if weight.ndim == 1:
        return torch.ones(weight.shape, dtype=torch.bfloat16)
    return (0.02 * torch.randn(weight.shape, generator=generator)).bfloat16()


def run(model: Path, folder: Path, overrides: Sequence[str], *, offload: str, windows: int, length: int) -> RunRecord:
    """The record of a run in a process of its own; its results lie below `folder`. RuntimeError if it fails."""
    text = folder.with_suffix(".txt")
    letters = torch.randint(97, 123, (4 * windows * length,), generator=torch.Generator().manual_seed(0))
    text.write_bytes(bytes(letters.tolist()))
    command = [
        *(sys.executable, "-m", "bs_exp", "model=local", f"model.path={model}", "model.device=cpu"),
        *(
            f"model.offload={offload}",
            "calibration=text",
            f"calibration.files=[{text}]",
            f"calibration.num_sequences={windows}",
            f"calibration.sequence_length={length}",
        ),
        *(
            "calibration.batch_size=1",
            "evaluation=text",
            f"evaluation.files=[{text}]",
            f"evaluation.sequence_length={length}",
        ),
        *(f"evaluation.max_windows={windows}", "evaluation.batch_size=1", "tracking=none", "save_model=true"),
        *(f"cache.dir={folder / 'cache'}", f"hydra.run.dir={folder / 'run'}", *overrides),
    ]
    done = subprocess.run(command, check=False)
    if done.returncode:
        raise RuntimeError(f"The run ended with status {done.returncode}; the command was {' '.join(command)}")
    return read_record(folder / "run")


def lines(record: RunRecord, layers: int, offload: str, folder: Path) -> Iterator[str]:
    """The figures of a run, for people."""
    peak, parameters = record.memory["process_bytes"], record.provenance["model"]["parameters"]
    cache = sum(file_sizes(folder / "cache").values())
    yield f"{layers} layers, {parameters / 1e6:,.0f} M parameters, offload={offload}"
    hits = sum(record.cache["hits"].values())
    earlier = f"; {hits} entries are of an interrupted run, whose seconds are not counted" if hits else ""
    yield f"  peak resident memory {peak / _GB:.2f} GB, cache {cache / _GB:.2f} GB{earlier}"
    yield "  seconds: " + ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in record.timings.items())
    for label, metrics in record.metrics.items():
        yield f"  {label}: " + ", ".join(f"{k} {v:.6g}" for k, v in metrics.items() if isinstance(v, float))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bs_exp.benchmarks.real_size", description=__doc__)
    parser.add_argument("--layers", type=int, nargs="+", default=[4], help="numbers of blocks, a model for each")
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--d-ff", type=int, default=5632)
    parser.add_argument("--offload", nargs="+", default=["disk"], choices=["none", "disk"])
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--length", type=int, default=128, help="tokens per window")
    parser.add_argument("--folder", help="keeps models and caches, to go on after an interruption")
    parser.add_argument("overrides", nargs="*", default=["experiment=svd_llm"], help="as for python -m bs_exp")
    given = parser.parse_args(arguments)
    check_at_least(1, layers=min(given.layers), width=given.width, d_ff=given.d_ff, windows=given.windows)
    check_at_least(2, length=given.length)
    if given.width % _HEADS:
        parser.error(f"--width must be a multiple of {_HEADS}, the number of heads, got {given.width}")
    print(f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, torch {torch.__version__}")
    for layers in given.layers:
        with contextlib.ExitStack() as stack:
            scratch = given.folder and Path(given.folder, f"{layers}-layers-{given.width}-{given.d_ff}")
            scratch = scratch or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bs-exp-real-size-")))
            model = scratch / "model"
            if not model.exists():
                model.mkdir(parents=True)
                write_model(model, layers=layers, width=given.width, d_ff=given.d_ff)
            for offload in given.offload:
                folder = scratch / offload
                record = run(
                    model, folder, given.overrides, offload=offload, windows=given.windows, length=given.length
                )
                print("\n".join(lines(record, layers, offload, folder)), flush=True)


if __name__ == "__main__":
    main()
