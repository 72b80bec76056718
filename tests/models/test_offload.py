"""Models whose weights stay in the checkpoint's files: the same results, and nothing of them kept in memory."""

from __future__ import annotations

import copy
import ctypes
import gc
import json
import math
import mmap
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from bs_exp.cache import Cache
from bs_exp.calibration.gather import ACCUMULATORS, gather
from bs_exp.errors import ConfigError, ModelError
from bs_exp.evaluation.throughput import Throughput
from bs_exp.models import blocks, mapped
from bs_exp.models import offload as offloading
from bs_exp.models.blocks import Blocks
from bs_exp.models.checkpoint import Checkpoint
from bs_exp.models.loading import HubModel, LocalModel
from bs_exp.models.model_inputs import feeder, hidden_states
from bs_exp.models.offload import check_offload, is_offloaded, lies_in_files, place, resident
from bs_exp.models.outputs import hidden_states_of, logits_of
from bs_exp.models.saving import save_model
from bs_exp.models.surgery import find_factors
from bs_exp.models.tiny import ENCODER_DECODERS, ENCODERS, FAMILIES, tiny_random
from bs_exp.pipeline import compress
from bs_exp.progress import Progress
from bs_exp.testing.models import recipe, same, values
from bs_exp.types import CalibrationData, LoadedModel, Statistic, TokenWindows
from bs_exp.update.none import NoUpdate
from bs_exp.update.refit import Refit
from bs_exp.workspace import Workspace
from tests.support.gathered import gathered

WINDOWS = TokenWindows(
    ids=torch.randint(0, 256, (5, 24), generator=torch.Generator().manual_seed(0)), provenance={"sha256": "x"}
)
DATA = CalibrationData(WINDOWS, 2)
QUIET = Progress(quiet=True)
# Its experts are held in another form than its files hold them.
IN_PLACE = tuple(family for family in (*FAMILIES, *ENCODERS, *ENCODER_DECODERS) if family != "mixtral")
REFIT = Refit(mode="sequential", inputs="compressed", target="mixed", beta=None, gram="layer", ridge=1e-6, below=None)
SHARDED = "model.safetensors.index.json"


def saved(folder: Path, family: str = "llama", *, dtype: torch.dtype = torch.float32, shard: str = "20KB") -> Path:
    model = tiny_random(family)
    model.module.to(dtype).save_pretrained(folder, max_shard_size=shard)
    model.tokenizer.save_pretrained(folder)
    return folder


def loaded(folder: Path, offload: str = "disk") -> LoadedModel:
    return LocalModel(path=str(folder), device="cpu", offload=offload).load()


def statistics(model: LoadedModel, data: CalibrationData = DATA) -> dict[str, Tensor]:
    found = gathered(model, data, *ACCUMULATORS)
    return {f"{s}/{name}/{k}": t for s, by in found.items() for name, ts in by.items() for k, t in ts.items()}


@pytest.mark.parametrize("family", IN_PLACE)
def test_the_same_model_and_the_same_statistics(family: str, tmp_path: Path) -> None:
    """In fp64, to 1e-12 of their norm: all six statistics, forward and backward."""
    saved(tmp_path, family, dtype=torch.float64)
    here, there = loaded(tmp_path, "none"), loaded(tmp_path)
    assert is_offloaded(there.module) and lies_in_files(there.module) and not is_offloaded(here.module)
    assert there.provenance == here.provenance
    expected, found = statistics(here), statistics(there)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name] - tensor).double().norm() <= 1e-12 * tensor.double().norm(), name


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_hidden_states_on_disk_change_nothing(family: str, tmp_path: Path) -> None:
    model = loaded(saved(tmp_path, family))
    on_disk = statistics(model, CalibrationData(WINDOWS, 2, "disk"))
    in_memory = statistics(model, CalibrationData(WINDOWS, 2, "memory"))
    assert all(torch.equal(on_disk[name], in_memory[name]) for name in in_memory)


def test_backward_layers_come_one_by_one(tmp_path: Path) -> None:
    model = loaded(saved(tmp_path))
    found = gather(model, DATA, {Statistic.OUTPUT_GRAM}, progress=QUIET)
    layers = [int(name.split(".")[2]) for _, name, _ in found]
    assert layers == sorted(layers, reverse=True)
    only = gather(model, DATA, {Statistic.OUTPUT_GRAM}, progress=QUIET, layers={1})
    assert {name.split(".")[2] for _, name, _ in only} == {"1"}


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gemma2", "bert", "t5"])
def test_compressed_and_saved_as_in_memory(family: str, tmp_path: Path) -> None:
    """The compressed model lies in files, too; what is saved of it holds the same bits as that of a model in memory."""
    saved(tmp_path / "dense", family)
    weights = {}
    for offload in ("none", "disk"):
        dense = loaded(tmp_path / "dense", offload)
        workspace = Workspace(Cache(tmp_path / offload), QUIET)
        compressed = compress(dense, recipe(NoUpdate()), workspace)
        assert lies_in_files(compressed.module) is (offload == "disk")
        folder = save_model(compressed.module, dense.tokenizer, tmp_path / f"{offload}-saved")
        weights[offload] = load_file(folder / "model.safetensors")
        assert [file.name for file in folder.glob("*.safetensors")] == ["model.safetensors"]
        assert json.loads((folder / "config.json").read_text())["quantization_config"]["groups"]
    assert weights["none"].keys() == weights["disk"].keys()
    assert all(torch.equal(weights["none"][name], weights["disk"][name]) for name in weights["none"])


def test_a_large_model_is_saved_in_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bs_exp.models.saving._SHARD", "20KB")
    dense = loaded(saved(tmp_path / "dense"))
    save_model(dense.module, dense.tokenizer, tmp_path / "saved")
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) > 2
    for offload in ("none", "disk"):
        assert loaded(tmp_path / "saved", offload).fingerprint == dense.fingerprint


def test_a_large_compressed_model_is_saved_in_shards_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor once, and no file with all of them beside: each with its checksum."""
    monkeypatch.setattr("bs_exp.models.saving._SHARD", "20KB")
    dense = loaded(saved(tmp_path / "dense"))
    compressed = compress(dense, recipe(NoUpdate()), Workspace(Cache(tmp_path / "cache"), QUIET)).module
    folder = save_model(compressed, dense.tokenizer, tmp_path / "saved")
    files = {file.name: load_file(file) for file in folder.glob("*.safetensors")}
    names = [name for held in files.values() for name in held]
    assert len(files) > 2 and all(re.fullmatch(r"model-\d+-of-\d+\.safetensors", name) for name in files)
    assert len(names) == len(set(names))
    kept = json.loads((folder / "config.json").read_text())["quantization_config"]["crc32"]
    assert set(kept) == {"config.json", *files}
    again = AutoModelForCausalLM.from_pretrained(folder)
    assert same(values(again), values(compressed))


_FREED = """
from pathlib import Path
import torch
from bs_exp.models.mapped import release, write_tensors

def anonymous():
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) // 1024

[stored] = write_tensors([torch.ones(9)], None)
first = torch.ones(6 * 2**20)  # so that tensors of its size no longer have mappings of their own
del first
large, small = [], []
for _ in range(60):
    large.append(torch.ones(2**20))
    small.append(torch.ones(2**14))
large.clear()
before = anonymous()
release([stored])
print(before - anonymous())
"""


@pytest.mark.skipif(mapped._malloc_trim is None, reason="this C library keeps what is freed, or gives it back itself")
def test_what_was_freed_goes_back_with_the_pages() -> None:
    """Between small tensors that live on, glibc keeps the room of freed ones of up to 32 MB: here 240 MB.

    In a process of its own, whose heap holds nothing of other tests.
    """
    done = subprocess.run([sys.executable, "-c", _FREED], check=True, capture_output=True, text=True)
    assert int(done.stdout) > 100


def test_files_are_let_go_with_the_model(tmp_path: Path) -> None:
    model = loaded(saved(tmp_path))
    assert any(reference() for _, reference in mapped._mappings)
    del model
    gc.collect()
    assert not any(reference() for _, reference in mapped._mappings)


def resident_bytes(weight: Tensor) -> int:
    """Memory that the pages of a mapped file take in this process, by /proc/self/smaps; those around it may count."""
    address, found = weight.data_ptr(), False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if "-" in first and not first.endswith(":"):
            start, end = (int(side, 16) for side in first.split("-"))
            found = start <= address < end
        elif found and first == "Rss:":
            return int(line.split()[1]) * 1024
    raise AssertionError("not mapped")


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs /proc")
def test_pages_come_and_go(tmp_path: Path) -> None:
    values = torch.randn(1 << 20)
    save_file({"w": values}, tmp_path / "w.safetensors")
    weight = mapped.map_tensors(mapped.read_header(tmp_path / "w.safetensors"))["w"]
    before = resident_bytes(weight)
    assert torch.equal(weight, values)
    assert resident_bytes(weight) >= before + values.nbytes - (1 << 16)
    mapped.release([weight])
    assert resident_bytes(weight) < 1 << 17
    assert torch.equal(weight, values)


def cached_pages(weight: Tensor) -> float:
    """The share of a mapped tensor's pages that the system holds in memory, by mincore."""
    first = weight.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    pages = -(-(weight.data_ptr() + weight.nbytes - first) // mmap.PAGESIZE)
    found = (ctypes.c_ubyte * pages)()
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mincore(ctypes.c_void_p(first), ctypes.c_size_t(pages * mmap.PAGESIZE), found) == 0
    return sum(page & 1 for page in found) / pages


@pytest.mark.skipif(sys.platform != "linux", reason="needs mincore")
def test_announced_pages_are_read_in_the_background(tmp_path: Path) -> None:
    save_file({"w": torch.randn(1 << 22)}, tmp_path / "w.safetensors")
    with (tmp_path / "w.safetensors").open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    weight = mapped.map_tensors(mapped.read_header(tmp_path / "w.safetensors"))["w"]
    if cached_pages(weight) > 0.5:
        pytest.skip("this file system keeps its pages")
    mapped.announce([weight])
    deadline = time.monotonic() + 60
    while cached_pages(weight) < 1.0:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_next_block_on_the_way_is_announced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind each on the way forward, and in front of it on the way back."""
    model = loaded(saved(tmp_path))
    owner = {
        id(parameter): layer
        for layer, path in enumerate(model.architecture.blocks)
        for parameter in model.module.get_submodule(path).parameters()
    }
    walked = Blocks(model)
    told: list[set[int]] = []
    monkeypatch.setattr(blocks, "announce", lambda tensors: told.append({owner[id(tensor)] for tensor in tensors}))
    layers = range(len(walked))
    for layer in (*layers, *reversed(layers)):
        with walked.resident(layer):
            pass
    assert told == [{layer} for layer in (*layers[1:], *reversed(layers[:-1]))]
    told.clear()
    walked = Blocks(model)
    for layer in (0, 0, 1, 1, 1, 2):  # several times in a row
        with walked.resident(layer):
            pass
    assert told == [{1}, {2}]


def test_what_is_written_into_a_scratch_file_stays() -> None:
    [stored] = mapped.write_tensors([torch.arange(9.0)], None)
    stored += 1.0
    mapped.release([stored])
    assert torch.equal(stored, torch.arange(1.0, 10.0))


def test_blocks_visit_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parameters stay the same objects while their values go to the device and come back: a call moves one block."""
    model = tiny_random()
    home = {name: parameter.data_ptr() for name, parameter in model.module.named_parameters()}
    block = model.module.get_submodule(model.architecture.blocks[0])
    weight = next(block.parameters())
    place(model.module, model.architecture.blocks, torch.device("cpu"))
    moved: list[nn.Parameter] = []

    class Elsewhere:
        """Unequal to any device; what is moved there is copied on the CPU."""

    for path in model.architecture.blocks:
        vars(model.module.get_submodule(path))["_bs_exp_residence"].device = Elsewhere()
    own = Tensor.to

    def to(tensor: Tensor, *target: object, **options: object) -> Tensor:
        if target and isinstance(target[0], Elsewhere):
            moved.append(tensor)
            return tensor.clone()
        return own(tensor, *target, **options)

    monkeypatch.setattr(Tensor, "to", to)
    with resident(block):
        assert weight.data_ptr() != home["model.layers.0.self_attn.q_proj.weight"]
        block_parameters = len(list(block.parameters()))
        assert len(moved) == block_parameters
        with torch.no_grad():
            model.module(WINDOWS.ids)
        assert len(moved) == len(model.architecture.blocks) * block_parameters
    assert {name: parameter.data_ptr() for name, parameter in model.module.named_parameters()} == home
    with pytest.raises(RuntimeError):  # a call that fails leaves nothing behind
        block(torch.zeros(1, 2, 3))
    assert {name: parameter.data_ptr() for name, parameter in model.module.named_parameters()} == home


def test_places_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match=r"offload must be one of none, cpu, disk, got 'ram'"):
        LocalModel(path="x", device="cpu", offload="ram")
    with pytest.raises(ConfigError, match=r"none or disk with device=cpu, got 'cpu'.*model\.offload=disk"):
        HubModel(name="x", device="cpu", offload="cpu")
    with pytest.raises(ConfigError, match=r"offload must be none with device=mps, got 'disk'"):
        check_offload("disk", torch.device("mps"))


def lose_a_shard(folder: Path) -> None:
    next(folder.glob("model-00002-*")).unlink()


def edit_index(edit: Callable[[dict[str, dict[str, object]]], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        index = json.loads((folder / SHARDED).read_text())
        edit(index)
        (folder / SHARDED).write_text(json.dumps(index))

    return damage


def cut_a_shard(folder: Path) -> None:
    shard = next(folder.glob("model-00002-*"))
    shard.write_bytes(shard.read_bytes()[:-100])


def convert(folder: Path) -> None:
    for shard in folder.glob("*.safetensors"):
        save_file({name: value.half() for name, value in load_file(shard).items()}, shard, {"format": "pt"})
    edit_index(lambda index: index["metadata"].pop("total_size"))(folder)


def lose_a_weight(folder: Path) -> None:
    shard = next(folder.glob("model-00002-*"))
    weights = load_file(shard)
    name = next(iter(weights))
    del weights[name]
    save_file(weights, shard, {"format": "pt"})
    edit_index(lambda index: (index["weight_map"].pop(name), index["metadata"].pop("total_size")))(folder)


def reshape(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 40}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lose_a_shard, r"lacks 1 of \d+ shards that its index names: model-00002-"),
        (edit_index(lambda index: index["metadata"].update(total_size=1)), r"says that they hold 1 bytes .*they hold"),
        (
            edit_index(
                lambda index: index["weight_map"].update({"model.norm.weight": "model-00001-of-00009.safetensors"})
            ),
            r"lacks 1 of|does not fit its shards: \d+ weights, such as ",
        ),
        (edit_index(lambda index: index["weight_map"].pop("model.norm.weight")), r"such as model\.norm\.weight"),
        (cut_a_shard, r"Cannot read the weights of .*SafetensorError"),
        (convert, r"stores its weights as torch\.float16, asked for is torch\.float32 .*model\.dtype to float16"),
        (lose_a_weight, r"lacks 1 weights of LlamaForCausalLM"),
        (reshape, r"do not have the shapes of LlamaForCausalLM"),
    ],
)
def test_damaged_checkpoints(damage: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    damage(saved(tmp_path))
    with pytest.raises(ModelError, match=message):
        loaded(tmp_path)


@pytest.mark.parametrize("damage", [lose_a_shard, lose_a_weight, cut_a_shard])
def test_damaged_shards_are_found_before_any_weight_is_read(
    damage: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without offloading, too: Transformers is not reached."""
    damage(saved(tmp_path))
    if damage is lose_a_weight:  # but the index still names it
        edit_index(lambda index: index["weight_map"].update({"model.norm.weight": "model-00002-of-00007.safetensors"}))(
            tmp_path
        )
    monkeypatch.setattr(Checkpoint, "_read_model", None)
    with pytest.raises(ModelError, match=r"lacks 1 of|does not fit its shards|SafetensorError"):
        loaded(tmp_path, "none")


def test_a_wrong_total_in_the_index_does_no_harm_in_memory(tmp_path: Path) -> None:
    edit_index(lambda index: index["metadata"].update(total_size=1))(saved(tmp_path))
    assert "says that they hold 1 bytes" in str(loaded(tmp_path, "none").provenance["odd_files"])


def test_what_cannot_be_used_in_place(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"in another form than its files.*experts.*model\.offload=none"):
        loaded(saved(tmp_path / "mixtral", "mixtral"))
    model = tiny_random()
    folder = saved(tmp_path / "pickled", shard="1GB")
    (folder / "model.safetensors").unlink()
    torch.save(model.module.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"holds no safetensors .*save_pretrained.*model\.offload=none"):
        loaded(folder)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "bert", "t5"])
def test_outputs_block_by_block(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of several sizes and lengths, more than are in memory at once; an encoder-decoder runs as a whole."""
    monkeypatch.setattr("bs_exp.models.outputs._TOKENS", 60)
    saved(tmp_path, family)
    here, there = loaded(tmp_path, "none"), loaded(tmp_path)
    reader = feeder(here)
    ids = [*WINDOWS.ids.split(2), WINDOWS.ids[:1, :9], WINDOWS.ids[:3]]
    batches = [reader.inputs(each) for each in ids]
    for outputs in (logits_of, hidden_states_of):
        expected, found = list(outputs(here, batches)), list(outputs(there, batches))
        assert [tensor.shape[:1] for tensor in found] == [each.shape[:1] for each in ids]
        for one, other in zip(expected, found, strict=True):
            torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-6)


def test_weights_are_read_once_for_all_windows(tmp_path: Path) -> None:
    """All batches go through a block before the next one comes."""
    model = loaded(saved(tmp_path))
    batches = [feeder(model).inputs(ids) for ids in WINDOWS.ids.split(1)]
    outputs = logits_of(model, batches)
    order: list[int] = []
    for layer, path in enumerate(model.architecture.blocks):
        block = model.module.get_submodule(path)
        block.register_forward_hook(lambda module, arguments, output, layer=layer: order.append(layer))
    next(outputs)
    count = len(batches)
    runs = [layer for layer in (0, 1, 2) for _ in range(count)]
    # In front of the last pass, in which blocks pass on what they are given.
    assert order[-len(runs) - 3 : -3] == runs


def test_throughput_would_time_the_disk(tmp_path: Path) -> None:
    evaluator = Throughput(batch_size=1, prompt_length=4, generated_length=2, repeats=1, warmup=0, seed=0)
    with pytest.raises(ConfigError, match=r"model\.offload=cpu or disk.*evaluation=perplexity"):
        evaluator.check(loaded(saved(tmp_path)))


@pytest.mark.parametrize("mode", ["one_shot", "sequential"])
def test_refitted_as_in_memory(mode: str, tmp_path: Path) -> None:
    saved(tmp_path / "dense")
    update = Refit(
        mode=mode, inputs="compressed", target="dense_outputs", beta=None, gram="layer", ridge=1e-6, below=None
    )
    found = {}
    for offload in ("none", "disk"):
        workspace = Workspace(Cache(tmp_path / offload), QUIET)
        found[offload] = compress(loaded(tmp_path / "dense", offload), recipe(update), workspace)
    assert lies_in_files(found["disk"].module)
    factors = {offload: find_factors(compressed.module) for offload, compressed in found.items()}
    assert all(mapped.is_mapped(factor) for factor in factors["disk"].values())
    assert all(torch.equal(factors["none"][name], factor) for name, factor in factors["disk"].items())
    assert found["none"].update["loss_after"] == found["disk"].update["loss_after"]
    assert found["none"].update["left_as_they_were"] == found["disk"].update["left_as_they_were"]


@pytest.mark.gpu
@pytest.mark.parametrize("offload", ["cpu", "disk"])
def test_on_a_cuda_device(offload: str, tmp_path: Path) -> None:
    """Weights come to the device block by block, forward and backward, and go back; the statistics are the same."""
    saved(tmp_path)
    there = LocalModel(path=str(tmp_path), device="cuda", offload=offload).load()
    assert there.device.type == "cuda"
    waiting = [there.module.get_submodule(m.module).weight for m in there.architecture.matrices]
    expected = statistics(LocalModel(path=str(tmp_path), device="cuda").load())
    found = statistics(there)
    assert all(weight.device.type == "cpu" for weight in waiting)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-6)


def slow_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a CPU that cannot multiply numbers of 16 bits, on whatever CPU this is."""
    monkeypatch.setattr(offloading, "computes", lambda dtype, device: dtype not in (torch.bfloat16, torch.float16))


def fast_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offloading, "computes", lambda dtype, device: True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "bert"])
def test_blocks_compute_in_fp32_where_16_bits_are_slow(
    family: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the model in fp32 with the same weights, whose blocks' outputs are rounded. Alone and in a walk."""
    slow_halves(monkeypatch)
    model = tiny_random(family)
    expected = copy.deepcopy(model.module.to(dtype)).float()
    for path in model.architecture.blocks:
        expected.get_submodule(path).register_forward_hook(lambda block, given, found: rounded(found, dtype))
    place(model.module, model.architecture.blocks, torch.device("cpu"))
    before = values(model.module)
    inputs = feeder(model, WINDOWS.feeding).inputs(WINDOWS.ids)
    with torch.inference_mode():
        wanted = hidden_states(expected, inputs)
        whole = hidden_states(model.module, inputs)
    [walked] = hidden_states_of(model, [inputs])
    assert whole.dtype == walked.dtype == dtype
    scale = float(wanted.abs().max())
    for found in (whole, walked):
        assert float((found.float() - wanted).abs().max()) < 4 * torch.finfo(dtype).eps * scale
    assert same(before, values(model.module))


def rounded(found: Any, dtype: torch.dtype) -> Any:
    if isinstance(found, tuple):
        return (rounded(found[0], dtype), *found[1:])
    return found.to(dtype).float()


@pytest.mark.parametrize("family", ["llama", "gemma2", "bert", "t5"])
def test_what_is_made_in_fp32_is_stored_as_the_model_is(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Statistics forward and backward, factors, a refit: close to those of a model whose blocks compute in bf16."""
    saved(tmp_path / "dense", family, dtype=torch.bfloat16)
    found = {}
    for name, set_up in (("fast", fast_halves), ("slow", slow_halves)):
        set_up(monkeypatch)
        dense = loaded(tmp_path / "dense")
        # Labels that are drawn, and the most probable ones, may be others where probabilities differ a little.
        grams = {key: tensor for key, tensor in statistics(dense).items() if key[:3] not in ("sam", "top")}
        compressed = compress(dense, recipe(REFIT), Workspace(Cache(tmp_path / name), QUIET))
        assert {parameter.dtype for parameter in compressed.module.parameters()} == {torch.bfloat16}
        assert {parameter.dtype for parameter in dense.module.parameters()} == {torch.bfloat16}
        [hidden] = hidden_states_of(
            replace(dense, module=compressed.module), [feeder(dense, WINDOWS.feeding).inputs(WINDOWS.ids)]
        )
        found[name] = {**grams, "hidden": hidden}
    assert found["fast"].keys() == found["slow"].keys()
    for name, tensor in found["fast"].items():
        assert (found["slow"][name] - tensor).double().norm() <= 0.1 * tensor.double().norm(), name


def test_a_call_with_gradients_computes_in_the_models_own_dtype(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its backward pass comes when the block's weights are home again."""
    slow_halves(monkeypatch)
    dense = loaded(saved(tmp_path, dtype=torch.bfloat16))
    for parameter in dense.module.parameters():
        parameter.requires_grad_()
    dense.module(input_ids=WINDOWS.ids, labels=WINDOWS.ids).loss.backward()
    assert {parameter.grad.dtype for parameter in dense.module.parameters() if parameter.grad is not None} == {
        torch.bfloat16
    }


def test_matrices_with_a_shared_basis_in_two_resident_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever of them goes first, what the other still computes is right, and all are home in the end."""
    slow_halves(monkeypatch)
    dense = loaded(saved(tmp_path / "dense", dtype=torch.bfloat16))
    module = compress(dense, recipe(NoUpdate()), Workspace(Cache(tmp_path / "cache"), QUIET)).module
    first, second = (module.get_submodule(path) for path in dense.architecture.blocks[:2])
    before = values(module)
    walked = Blocks(replace(dense, module=module))
    states = walked.embedded(feeder(dense, WINDOWS.feeding).inputs(WINDOWS.ids))
    with torch.inference_mode(), resident(second):
        expected = walked.run(1, states)
        with resident(first):
            walked.run(0, states)
        assert torch.equal(walked.run(1, states), expected)
    assert same(before, values(module))


def test_no_block_is_visited_where_none_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In front of the blocks and behind them, the model's own forward calls blocks that pass on what they are given."""
    slow_halves(monkeypatch)
    model = loaded(saved(tmp_path, dtype=torch.bfloat16))
    walked = Blocks(model)
    inputs = feeder(model, WINDOWS.feeding).inputs(WINDOWS.ids)
    states = walked.embedded(inputs)
    visits: list[object] = []
    monkeypatch.setattr(offloading, "release", visits.append)
    with torch.inference_mode():
        again = walked.embedded(inputs)
        assert walked.hidden(inputs, states).dtype == torch.bfloat16
        assert not visits
        walked.logits(inputs, states)
    assert len(visits) == 1  # the head
    assert again.dtype == torch.bfloat16 and torch.equal(again, states)


def test_changes_are_kept_as_they_are_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow_halves(monkeypatch)
    model = loaded(saved(tmp_path, dtype=torch.bfloat16))
    block = model.module.get_submodule(model.architecture.blocks[0])
    weight = next(block.parameters())
    with resident(block):
        assert offloading.dtypes_at_home(block)[weight] == torch.bfloat16
        weight.data.fill_(1.0 + 2**-12)
        offloading.keep_changes(block)
        assert bool((weight == 1.0).all()) and weight.dtype == torch.float32


def test_what_fp16_cannot_hold_is_clamped_as_models_do() -> None:
    given = torch.tensor([1.0, 1e6, -1e6, math.inf, -math.inf, math.nan])
    found = offloading._cast((given, {"kept": given.double()}), torch.float32, torch.float16)
    assert found[0].tolist()[:5] == [1.0, 65504.0, -65504.0, math.inf, -math.inf] and found[0][5].isnan()
    assert found[1]["kept"].dtype == torch.float64


def test_a_block_that_cannot_come_stays_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow_halves(monkeypatch)
    model = loaded(saved(tmp_path, dtype=torch.bfloat16))
    block = model.module.get_submodule(model.architecture.blocks[0])
    own, left = Tensor.to, [3]

    def to(tensor: Tensor, *target: Any, **options: Any) -> Tensor:
        left[0] -= 1
        if left[0] < 0:
            raise MemoryError
        return own(tensor, *target, **options)

    with monkeypatch.context() as patched:
        patched.setattr(Tensor, "to", to)
        with pytest.raises(MemoryError), resident(block):
            pass
    assert {parameter.dtype for parameter in block.parameters()} == {torch.bfloat16}
    with resident(block):
        assert {parameter.dtype for parameter in block.parameters()} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_pytorch_that_cannot_tell_computes_in_the_models_dtype(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """oneDNN, which is asked, is not in every build."""
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    monkeypatch.delattr(torch.ops, "mkldnn", raising=False)
    assert offloading.computes(dtype, torch.device("cpu"))
