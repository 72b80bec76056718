"""A folder is loaded whole or refused by name: tensors missing, moved or declared otherwise, hostile configurations."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from bs_exp.layout.pivoted import PivotedLayout
from bs_exp.layout.plain import PlainLayout
from bs_exp.models.head_blocks import cut_heads
from bs_exp.models.modeling_basis_sharing import MOST_LAYERS, MOST_MODULES, BasisSharingConfig, pack_bits, unpack_bits
from bs_exp.models.surgery import replace_matrices, twin
from bs_exp.models.tiny import tiny_random
from bs_exp.types import LoadedModel
from tests.support.factorised import compressed_twin, random_factors

Dense = Callable[[str], LoadedModel]
CHECKPOINTS = Path(__file__).parents[1] / "support" / "checkpoints"
UP = "model.layers.0.mlp.up_proj"


@pytest.fixture
def folder(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A copy of an old checkpoint, which has no checksums."""
    return Path(shutil.copytree(CHECKPOINTS / request.param, tmp_path / "model"))


def in_folder(*names: str) -> Any:
    return pytest.mark.parametrize("folder", names, indirect=True)


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def change_config(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder)


@in_folder("plain", "pivoted", "plain_residual", "pivoted_residual")
def test_every_tensor_of_every_group_must_be_there(folder: Path) -> None:
    whole = load_file(folder / "model.safetensors")
    members = [name for group in load(folder).config.quantization_config.groups for name in group["members"]]
    needed = [key for key in whole if any(key.startswith(f"{name}.") for name in members)]
    assert len(needed) > 2 * 7
    for key in needed:
        change_weights(folder, lambda tensors, key=key: tensors.pop(key))  # type: ignore[misc]
        with pytest.raises(ValueError, match=f"holds no tensor {key} that fits"):
            load(folder)
        save_file(whole, folder / "model.safetensors", {"format": "pt"})
    load(folder)


@in_folder("plain", "pivoted")
def test_a_trunk_needs_them_as_well(folder: Path) -> None:
    AutoModel.from_pretrained(folder)
    change_weights(folder, lambda tensors: tensors.pop(f"{UP}.basis"))
    with pytest.raises(ValueError, match=r"holds no tensor layers\.0\.mlp\.up_proj\.basis"):
        AutoModel.from_pretrained(folder)


@in_folder("plain")
def test_a_shape_that_does_not_fit_is_refused_even_if_that_is_to_be_ignored(folder: Path) -> None:
    change_weights(folder, lambda tensors: tensors.update({f"{UP}.basis": torch.ones(3, 8)}))
    with pytest.raises(RuntimeError, match="mismatch"):
        load(folder)
    with pytest.raises(ValueError, match=f"holds no tensor {UP}.basis that fits"):
        AutoModelForCausalLM.from_pretrained(folder, ignore_mismatched_sizes=True)


def groups_of(config: dict[str, Any]) -> list[dict[str, Any]]:
    groups: list[dict[str, Any]] = config["quantization_config"]["groups"]
    return groups


def split_group(config: dict[str, Any]) -> None:
    """The first pair as two groups of one."""
    groups = groups_of(config)
    pair = groups.pop(0)
    groups.extend({**pair, "members": [name]} for name in pair["members"])


def join_groups(config: dict[str, Any]) -> None:
    """Both groups of `o` as one."""
    groups = groups_of(config)
    first, second = (group for group in groups if "o_proj" in group["members"][0])
    first["members"] += second["members"]
    groups.remove(second)


@in_folder("plain")
@pytest.mark.parametrize(
    ("declare", "message"),
    [
        (split_group, r"holds no tensor model.layers.1.self_attn.q_proj.basis"),
        (join_groups, r"different bases for .*o_proj.*declares as one group"),
        (lambda config: groups_of(config)[0].update(correction=2), r"holds no tensor .*q_proj\.(down|shared)"),
    ],
)
def test_groups_that_are_declared_otherwise_are_refused(folder: Path, declare: Any, message: str) -> None:
    change_config(folder, declare)
    with pytest.raises(ValueError, match=message):
        load(folder)


@in_folder("plain_residual")
def test_a_correction_that_is_not_declared_is_refused(folder: Path) -> None:
    """Of rank 1, as the shared factors of k: shapes alone would not tell."""
    change_config(folder, lambda config: groups_of(config)[0].update(rank=1) or groups_of(config)[0].pop("correction"))
    with pytest.raises(ValueError, match=r"holds no tensor .*q_proj.basis"):
        load(folder)


def test_a_group_that_is_not_declared_is_refused(dense: Dense, tmp_path: Path) -> None:
    """At the full rank of d_in the coefficients have the shape of the dense weight."""
    loaded = dense("llama")
    first = next(random_factors(loaded.architecture))
    group = first.group
    eye = torch.eye(group.d_in, dtype=torch.float64)
    full = type(first)(group, eye, {layer: eye[:, : group.d_out] for layer in group.layers})
    made = twin(loaded.module)
    replace_matrices(made, loaded.architecture, [full], PlainLayout())
    made.save_pretrained(tmp_path)
    load(tmp_path)
    change_config(tmp_path, lambda config: config["quantization_config"].update(groups=[]))
    with pytest.raises(ValueError, match=r"holds model.layers.0.self_attn.q_proj.basis, of which .* says nothing"):
        load(tmp_path)


def move_one_pivot(packed: torch.Tensor, length: int) -> torch.Tensor:
    bits = unpack_bits(packed, length)
    gone, new = int(bits.nonzero()[0]), int((~bits).nonzero()[0])
    bits[gone], bits[new] = False, True
    return pack_bits(bits)


def test_one_moved_pivot_is_found(dense: Dense, tmp_path: Path) -> None:
    made = compressed_twin(dense("llama"), PivotedLayout())
    made.save_pretrained(tmp_path)
    entry = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["groups"][0]
    assert len(entry["kept_crc32"]) == 8
    model = load(tmp_path)
    assert "kept_crc32" not in str(model.config) and "kept_crc32" not in str(made.config)

    def move(tensors: dict[str, torch.Tensor]) -> None:
        for name in entry["members"]:  # in all layers alike, so they agree
            tensors[f"{name}.pivots"] = move_one_pivot(tensors[f"{name}.pivots"], 32)

    change_weights(tmp_path, move)
    with pytest.raises(ValueError, match=r"`pivots` of the layers .*q_proj.*checksum is .*, in config.json it is"):
        load(tmp_path)
    change_config(tmp_path, lambda config: groups_of(config)[0].pop("kept_crc32"))
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged, or was changed"):
        load(tmp_path)
    change_config(tmp_path, lambda config: config["quantization_config"].pop("crc32"))
    load(tmp_path)  # as a folder that was written before there were checksums


def test_checksums_are_those_of_what_is_saved(dense: Dense, tmp_path: Path) -> None:
    """Not of what was there when the model was made."""
    made = compressed_twin(dense("llama"), PivotedLayout())
    state = {
        k: move_one_pivot(v, 8 * len(v)) if k.endswith("q_proj.pivots") else v for k, v in made.state_dict().items()
    }
    made.load_state_dict(state)
    made.save_pretrained(tmp_path)
    found = load(tmp_path).state_dict()
    assert all(torch.equal(found[name], value) for name, value in state.items())


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def sums_of(folder: Path) -> dict[str, str]:
    sums: dict[str, str] = json.loads((folder / "config.json").read_text())["quantization_config"]["crc32"]
    return sums


@pytest.mark.parametrize("shard_size", ["5GB", "20KB"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_one_flipped_bit_of_the_weights_is_found(
    dense: Dense, tmp_path: Path, shard_size: str, dtype: torch.dtype | None
) -> None:
    """Whatever the tensor is, in one file and in several, and whatever dtype the weights become."""
    compressed_twin(dense("llama"), PlainLayout()).save_pretrained(tmp_path, max_shard_size=shard_size)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert sums_of(tmp_path).keys() == {"config.json", *(file.name for file in files)}
    load_as = {} if dtype is None else {"dtype": dtype}
    AutoModelForCausalLM.from_pretrained(tmp_path, **load_as)
    for file in (files[0], files[-1]):
        for place in (-1, -file.stat().st_size // 3):
            flip(file, place)
            with pytest.raises(ValueError, match=rf"{file.name} is damaged.*remove 'crc32' from quantization_config"):
                AutoModelForCausalLM.from_pretrained(tmp_path, **load_as)
            flip(file, place)
    AutoModelForCausalLM.from_pretrained(tmp_path, **load_as)


def test_a_changed_configuration_is_found(dense: Dense, tmp_path: Path) -> None:
    """Not what it looks like: another layout of the same content loads."""
    compressed_twin(dense("llama"), PlainLayout()).save_pretrained(tmp_path)
    change_config(tmp_path, lambda config: None)
    load(tmp_path)
    change_config(tmp_path, lambda config: config.update(rms_norm_eps=1e-2))
    with pytest.raises(ValueError, match=r"config.json is damaged, or was changed.*remove 'crc32'"):
        load(tmp_path)
    change_config(tmp_path, lambda config: config["quantization_config"].pop("crc32"))
    assert load(tmp_path).config.rms_norm_eps == 1e-2


def test_a_model_that_is_saved_again_has_new_checksums(dense: Dense, tmp_path: Path) -> None:
    """In another dtype, with changed weights, into the same folder; by Transformers' own method without any."""
    compressed_twin(dense("llama"), PivotedLayout()).save_pretrained(tmp_path)
    first, model = sums_of(tmp_path), load(tmp_path)
    model.half().save_pretrained(tmp_path)
    half = sums_of(tmp_path)
    assert half.keys() == first.keys() and not set(half.values()) & set(first.values())
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight += 1.0
    model.save_pretrained(tmp_path)
    assert sums_of(tmp_path)["model.safetensors"] != half["model.safetensors"]
    again = load(tmp_path)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    assert not hasattr(again.config.quantization_config, "crc32")
    type(model).save_pretrained(again, tmp_path)
    assert "crc32" not in json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    load(tmp_path)


def test_blocks_of_other_sizes_are_refused(tmp_path: Path) -> None:
    dense = cut_heads(tiny_random("llama"), {"q", "k", "v", "o"}, "kv")
    made = twin(dense.module)
    replace_matrices(made, dense.architecture, [], PlainLayout())
    made.save_pretrained(tmp_path)
    load(tmp_path)
    whole = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj"
    for key in (f"{name}.weight", f"{name}.blocks.1.weight"):
        change_weights(tmp_path, lambda tensors, key=key: tensors.pop(key))  # type: ignore[misc]
        with pytest.raises(ValueError, match=f"holds no tensor {key}"):
            load(tmp_path)
        save_file(whole, tmp_path / "model.safetensors", {"format": "pt"})
    change_weights(tmp_path, lambda tensors: tensors[f"{name}.weight"].copy_(torch.tensor([8, 24])))
    with pytest.raises(
        ValueError, match=rf"blocks of {name} have other sizes in the file .*\[8, 24\], than .*\[16, 16\]"
    ):
        load(tmp_path)


GROUP = {"members": [UP], "rank": 2}
SPLIT = {"module": UP, "axis": "out", "sizes": [8, 4]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"groups": None}, "groups must be a list"),
        ({"groups": {"members": [UP]}}, "groups must be a list"),
        ({"groups": [None]}, "needs `members`"),
        ({"groups": [{**GROUP, "members": None}]}, "needs `members`.*got .*None"),
        ({"groups": [{**GROUP, "members": [None]}]}, "needs `members`"),
        ({"groups": [{**GROUP, "members": [[UP]]}]}, "needs `members`"),
        ({"groups": [{**GROUP, "members": {UP: 1}}]}, "needs `members`"),
        ({"groups": [{**GROUP, "rank": 2.0}]}, "needs `members`"),
        ({"groups": [{**GROUP, "rank": None}]}, "needs `members`"),
        ({"groups": [{**GROUP, "correction": -1}]}, "may have a `correction`.*'correction': -1"),
        ({"groups": [{**GROUP, "correction": None}]}, "may have a `correction`"),
        ({"groups": [{**GROUP, "correction": "2"}]}, "may have a `correction`"),
        ({"groups": [{**GROUP, "kept_crc32": 5}]}, "needs `members`"),
        ({"groups": [{**GROUP, "rank": 10**9}]}, r"rank of .*up_proj.* must be at most 8, .*got 1000000000"),
        ({"groups": [{**GROUP, "correction": 10**9}]}, r"correction of layers .* must be at most 8, got 1000000000"),
        ({"crc32": 5}, "crc32 must map names of files to texts, got 5"),
        ({"crc32": {"model.safetensors": None}}, "crc32 must map names of files to texts"),
        ({"crc32": {"model.safetensors": "x"}}, "model.safetensors is damaged"),
        ({"layout": ["plain"]}, "layout must be one of plain, pivoted"),
        ({"layout": None}, "layout must be one of plain, pivoted"),
        ({"splits": 5}, "splits must be a list"),
        ({"splits": [None]}, "splits needs `module`"),
        ({"splits": [{**SPLIT, "sizes": [8, -4]}]}, "splits needs `module`"),
        ({"splits": [{**SPLIT, "sizes": None}]}, "splits needs `module`"),
        ({"splits": [{**SPLIT, "axis": ["out"]}]}, "splits needs `module`"),
        ({"splits": [{**SPLIT, "module": None}]}, "splits needs `module`"),
        ({"splits": [SPLIT, SPLIT]}, "names 'model.layers.0.mlp.up_proj' twice"),
        ({"splits": [{**SPLIT, "sizes": [8, 8]}]}, "cannot be cut into"),
    ],
)
@in_folder("plain")
def test_a_hostile_configuration_is_refused_in_words(folder: Path, change: dict[str, Any], message: str) -> None:
    change_config(folder, lambda config: config["quantization_config"].update(change))
    with pytest.raises(ValueError, match=message):
        load(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"groups": [{"members": [f"m.{i}" for i in range(20_000)], "rank": 2}]}, "has no module 'm.0'"),
        ({"groups": [{"members": [f"m.{i // 2}" for i in range(20_000)], "rank": 2}]}, "names 'm.0' twice"),
        ({"groups": [{"members": [f"m.{i}"], "rank": 2} for i in range(120_000)]}, "groups must name at most 100000"),
        ({"groups": [{"members": [0] * 1_000_000, "rank": 2}]}, "needs `members`"),
        ({"splits": [SPLIT] * 90_000}, "twice"),
        ({"splits": [{**SPLIT, "module": f"m.{i}"} for i in range(120_000)]}, "splits must name at most 100000"),
        ({"splits": [{**SPLIT, "sizes": [1] * 300_000}]}, "cannot be cut into"),
    ],
)
@in_folder("plain")
def test_long_lists_are_refused_in_linear_time(folder: Path, change: dict[str, Any], message: str) -> None:
    change_config(folder, lambda config: config["quantization_config"].update(change))
    start = time.process_time()
    AutoConfig.from_pretrained(folder)  # what Transformers takes by itself: most of it for a text that it may log
    read = time.process_time()
    with pytest.raises(ValueError, match=message) as refusal:
        load(folder)
    assert (time.process_time() - read) - (read - start) < 5.0
    assert len(str(refusal.value)) < 2000


@in_folder("plain")
def test_a_million_layers_are_refused_before_they_are_built(folder: Path) -> None:
    change_config(folder, lambda config: config.update(num_hidden_layers=10**6))
    start = time.process_time()
    with pytest.raises(ValueError, match=f"num_hidden_layers must be at most {MOST_LAYERS}, got 1000000"):
        load(folder)
    assert time.process_time() - start < 10.0


def test_a_configuration_of_many_members_is_read_in_linear_time() -> None:
    start = time.process_time()
    BasisSharingConfig(groups=[{"members": [f"m.{i}" for i in range(MOST_MODULES)], "rank": 1}])
    assert time.process_time() - start < 2.0
