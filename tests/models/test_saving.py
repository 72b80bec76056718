from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

from bs_exp import SharedLinear, save_model, to_dense
from bs_exp.errors import ConfigError
from bs_exp.layout.plain import PlainLayout
from bs_exp.models import modeling_basis_sharing
from bs_exp.models.surgery import replace_matrices, twin
from bs_exp.models.tiny import FAMILIES, MIXTURES, TinyRandom, byte_tokenizer
from bs_exp.testing.models import updated
from bs_exp.types import LoadedModel
from bs_exp.update.none import NoUpdate
from tests.support.factorised import compressed_twin, logits_of, random_factors

Dense = Callable[[str], LoadedModel]
REPOSITORY = Path(modeling_basis_sharing.__file__).parents[2]


@pytest.fixture(scope="module")
def saved(dense: Dense, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every family compressed and made dense again, saved, with the logits of both."""
    folder = tmp_path_factory.mktemp("saved")
    logits: dict[str, dict[str, torch.Tensor]] = {"compressed": {}, "dense": {}}
    for family in FAMILIES:
        compressed = compressed_twin(dense(family))
        for kind, module in (("compressed", compressed), ("dense", to_dense(compressed))):
            save_model(module, dense(family).tokenizer, folder / kind / family)
            logits[kind][family] = logits_of(module)
    for family in MIXTURES:
        loaded = dense(family)
        found = updated(loaded, NoUpdate()).module
        for kind, module in (("compressed", found), ("dense", to_dense(found))):
            save_model(module, loaded.tokenizer, folder / kind / f"{family}-experts")
            logits[kind][f"{family}-experts"] = logits_of(module)
    AutoModelForCausalLM.from_pretrained(folder / "compressed" / "llama").save_pretrained(folder / "resaved" / "llama")
    torch.save(logits, folder / "logits.pt")
    return folder


def run_fresh(script: str, folder: Path, *flags: str, **environment: str) -> Any:
    """What a script prints in a process of its own, away from the repository and without a network."""
    environment |= {
        "HF_HOME": str(folder / "home"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }
    done = subprocess.run(
        [sys.executable, *flags, str(Path(__file__).parents[1] / "support" / script), str(folder)],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def with_plugin(saved: Path) -> Any:
    return run_fresh("load_with_plugin.py", saved, PYTHONPATH=str(REPOSITORY))


@pytest.fixture(scope="module")
def without_plugin(saved: Path) -> Any:
    return run_fresh("load_without_plugin.py", saved, "-I")


@pytest.mark.parametrize("family", FAMILIES)
def test_fresh_process_with_bs_exp_gives_the_same_logits(dense: Dense, with_plugin: Any, family: str) -> None:
    architecture = dense(family).architecture
    assert with_plugin[family] == {
        "equal": True,
        "prompt": "A word",
        "generated": 3,
        "layers": len(architecture.matrices),
        "bases": len(list(random_factors(architecture))),
    }


@pytest.mark.parametrize("family", MIXTURES)
def test_fresh_process_with_bs_exp_runs_experts_one_by_one(with_plugin: Any, family: str) -> None:
    seen = with_plugin[f"{family}-experts"]
    assert seen["equal"] and seen["generated"] == 3 and seen["layers"] >= 3 * (4 + 3 * 4)


@pytest.mark.parametrize("family", [*FAMILIES, *(f"{family}-experts" for family in MIXTURES)])
def test_fresh_process_without_bs_exp(without_plugin: Any, family: str) -> None:
    assert without_plugin["trusted"][family], "trust_remote_code=True must give the same logits bit for bit"
    assert without_plugin["dense"][family], "the dense export must load as an ordinary checkpoint"
    assert "AutoModelForCausalLM.from_pretrained(..., trust_remote_code=True)" in without_plugin["refusals"][family]


def test_native_class_without_bs_exp_is_told_before_it_reads_weights(without_plugin: Any) -> None:
    """Never random layers without a word, not even where Transformers would put up with other shapes."""
    for case in ("native class", "sizes ignored"):
        assert "trust_remote_code=True), or install bs_exp" in without_plugin["refusals"][case]


def test_word_for_others_stays_in_the_folder(saved: Path) -> None:
    folder = saved / "compressed" / "llama"
    assert "install bs_exp" in json.loads((folder / "config.json").read_text())["transformers_weights"]
    assert not hasattr(AutoModelForCausalLM.from_pretrained(folder).config, "transformers_weights")


def test_peft_adapts_matrices_by_their_usual_names(dense: Dense, with_plugin: Any, without_plugin: Any) -> None:
    """Imported after the model was loaded; and where bs_exp is not installed."""
    assert with_plugin["adapters"] == len(dense("llama").architecture.of_type("q"))
    assert without_plugin["adapters"]


def test_harness_needs_the_plugin_or_trust_remote_code(without_plugin: Any) -> None:
    assert float(without_plugin["harness"]) < 0
    assert "basis_sharing" in without_plugin["harness_without"]


@pytest.mark.parametrize("family", FAMILIES)
def test_basis_is_stored_once(dense: Dense, saved: Path, family: str) -> None:
    architecture = dense(family).architecture
    with safe_open(saved / "compressed" / family / "model.safetensors", framework="pt") as file:
        names: list[str] = file.keys()
        shapes = {name: file.get_slice(name).get_shape() for name in names}
    bases = sorted(shape for name, shape in shapes.items() if name.endswith(".basis"))
    assert bases == sorted([shared.rank, shared.group.d_in] for shared in random_factors(architecture))
    model = compressed_twin(dense(family))
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_second_round_trip_in_shards(saved: Path, tmp_path: Path, family: str) -> None:
    first = AutoModelForCausalLM.from_pretrained(saved / "compressed" / family)
    first.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    groups = first.config.quantization_config.groups
    assert sum(name.endswith(".basis") for name in index["weight_map"]) == len(groups)
    second = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits_of(second), logits_of(first))
    for group in groups:
        assert len({id(second.get_submodule(name).basis) for name in group["members"]}) == 1


def test_native_save_writes_what_our_own_does(saved: Path, without_plugin: Any) -> None:
    ours, native = (
        {path.name: path.read_bytes() for path in (saved / kind / "llama").iterdir() if "token" not in path.name}
        for kind in ("compressed", "resaved")
    )
    assert native == ours
    assert without_plugin["resaved"]


def test_saved_model_keeps_no_reference_to_the_code_file(saved: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(saved / "compressed" / "llama")
    model.save_pretrained(tmp_path)
    assert getattr(model.config, "auto_map", None) is None
    (tmp_path / "full" / "model.safetensors").mkdir(parents=True)  # no weights can be written there
    with pytest.raises(SafetensorError, match="Is a directory"):
        model.save_pretrained(tmp_path / "full")
    assert getattr(model.config, "auto_map", None) is None
    dense = to_dense(model)
    dense.save_pretrained(tmp_path / "dense")
    assert not list((tmp_path / "dense").glob("*.py"))
    assert "auto_map" not in json.loads((tmp_path / "dense" / "config.json").read_text())


def test_files_follow_the_umask(dense: Dense, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        folder = save_model(compressed_twin(dense("llama")), dense("llama").tokenizer, tmp_path / "model")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o640}


def test_folder_says_how_it_was_made(saved: Path) -> None:
    config = json.loads((saved / "compressed" / "llama" / "config.json").read_text())
    assert config["auto_map"].keys() == {"AutoConfig", "AutoModelForCausalLM"}
    declared = config["quantization_config"]
    assert declared["crc32"].keys() == {"model.safetensors", "config.json"}
    assert {k: v for k, v in declared.items() if k not in ("groups", "crc32")} == {
        "quant_method": "basis_sharing",
        "format_version": 2,
        "layout": "plain",
    }
    assert declared["groups"][0] == {
        "members": ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"],
        "rank": 4,
    }
    plain = json.loads((saved / "dense" / "llama" / "config.json").read_text())
    assert plain.keys().isdisjoint({"quantization_config", "auto_map"})
    assert not list((saved / "dense" / "llama").glob("*.py"))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_loaded_model_becomes_dense(saved: Path, family: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(saved / "compressed" / family)
    logits = logits_of(model)
    expected = torch.load(saved / "logits.pt")["dense"][family]
    assert torch.equal(logits_of(to_dense(model)), expected)
    assert torch.equal(logits_of(model), logits)
    assert torch.equal(logits_of(model.dequantize()), expected)
    assert not any(isinstance(module, SharedLinear) for module in model.modules())


def test_half_precision_round_trip(tmp_path: Path) -> None:
    model = compressed_twin(TinyRandom(family="llama", dtype="bfloat16").load())
    save_model(model, byte_tokenizer(), tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert torch.equal(logits_of(loaded), logits_of(model))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "opt"])
def test_loads_without_head_and_with_a_device_map(saved: Path, family: str) -> None:
    path = saved / "compressed" / family
    whole = AutoModelForCausalLM.from_pretrained(path, device_map="auto")
    assert torch.equal(logits_of(whole).cpu(), torch.load(saved / "logits.pt")["compressed"][family])
    trunk = AutoModel.from_pretrained(path)
    ids = torch.arange(12).view(1, 12)
    with torch.no_grad():
        expected = whole.base_model(ids.to(whole.device)).last_hidden_state
        assert torch.equal(trunk(ids).last_hidden_state, expected.cpu())


def test_tie_weights_keeps_the_bases(saved: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(saved / "compressed" / "gemma")  # ties its embeddings too
    logits = logits_of(model)
    model.tie_weights()
    model.resize_token_embeddings(model.config.vocab_size + 3)
    assert torch.equal(logits_of(model)[..., : logits.shape[-1]], logits)
    first, second = (model.model.layers[i].mlp.up_proj for i in (0, 1))
    assert first.basis is second.basis


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks for it
def test_lora_on_matrices_left_dense(dense: Dense, tmp_path: Path) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model

    loaded = dense("llama")
    model = twin(loaded.module)
    attention = (shared for shared in random_factors(loaded.architecture) if shared.group.matrix in ("q", "k", "v"))
    replace_matrices(model, loaded.architecture, attention, PlainLayout())
    save_model(model, loaded.tokenizer, tmp_path / "model")
    settings = LoraConfig(target_modules=["down_proj"], r=2, task_type="CAUSAL_LM", init_lora_weights=False)
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "model"), settings).eval()
    with adapted.disable_adapter():
        assert torch.equal(logits_of(adapted), logits_of(model))
    ids = torch.arange(12).view(1, 12)
    adapted(ids, labels=ids).loss.backward()
    trained = [name for name, p in adapted.named_parameters() if p.grad is not None]
    assert trained
    assert all("down_proj.lora_" in name for name in trained)
    adapted.save_pretrained(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert torch.equal(logits_of(PeftModel.from_pretrained(base, tmp_path / "adapter")), logits_of(adapted))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 1}, "format version 1"),
        ({"layout": "woven"}, "layout must be one of plain, pivoted, got 'woven'"),
        ({"group": []}, "unknown keys: group"),
        ({"groups": [{"members": [], "rank": 2}]}, "needs `members`"),
        ({"groups": [{"members": ["model.norm"], "rank": 0}]}, "needs `members`"),
        ({"groups": [{"members": ["model.norm"], "rank": True}]}, "needs `members`"),
        ({"groups": [{"members": ["lm_head"], "rank": 2, "pivots": [2]}]}, "may have a `correction`"),
        ({"groups": [{"members": ["model.norm"], "rank": 2}]}, "model.norm is a LlamaRMSNorm"),
        (
            {"groups": [{"members": ["model.layers.7.mlp.up_proj"], "rank": 2}]},
            "no module 'model.layers.7.mlp.up_proj'",
        ),
        ({"groups": [{"members": ["lm_head", "lm_head"], "rank": 2}]}, "names 'lm_head' twice"),
        (
            {"groups": [{"members": ["model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"], "rank": 2}]},
            "inputs of one size",
        ),
    ],
)
def test_a_folder_that_cannot_be_read_says_why(
    saved: Path, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    config = json.loads((saved / "compressed" / "llama" / "config.json").read_text())
    config["quantization_config"] |= change
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").symlink_to(saved / "compressed" / "llama" / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_factors_cannot_be_made_while_loading(tmp_path: Path, dense: Dense) -> None:
    """Nothing to quantize on the fly: a dense checkpoint has no factors."""
    dense("llama").module.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="pre-quantized"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=modeling_basis_sharing.BasisSharingConfig())


def test_the_first_copy_of_the_plugin_stays_unless_another_reads_more(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = saved / "compressed" / "llama" / "modeling_basis_sharing.py"
    assert source.read_bytes() == Path(modeling_basis_sharing.__file__).read_bytes()
    spec = importlib.util.spec_from_file_location("another_copy", source)
    assert spec is not None
    assert spec.loader is not None
    another = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(another)
    assert AUTO_QUANTIZER_MAPPING["basis_sharing"] is modeling_basis_sharing.BasisSharingQuantizer
    monkeypatch.setattr(modeling_basis_sharing.BasisSharingQuantizer, "format_version", 0)
    another.register()
    assert AUTO_QUANTIZER_MAPPING["basis_sharing"] is another.BasisSharingQuantizer
    modeling_basis_sharing.register()
    assert AUTO_QUANTIZER_MAPPING["basis_sharing"] is another.BasisSharingQuantizer
    monkeypatch.undo()
    monkeypatch.setattr(another.BasisSharingQuantizer, "format_version", 0)
    modeling_basis_sharing.register()
    assert AUTO_QUANTIZER_MAPPING["basis_sharing"] is modeling_basis_sharing.BasisSharingQuantizer


def test_config_alone_loads(saved: Path) -> None:
    path = saved / "compressed" / "llama"
    config = AutoConfig.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, config=config)
    assert torch.equal(logits_of(model), torch.load(saved / "logits.pt")["compressed"]["llama"])


def test_saving_again_replaces_the_model(dense: Dense, tmp_path: Path) -> None:
    tokenizer = dense("llama").tokenizer
    target = save_model(compressed_twin(dense("llama")), tokenizer, tmp_path / "runs" / "model")
    (target / "left_over.txt").write_text("from the first save")
    save_model(dense("llama").module, tokenizer, target)
    assert not (target / "left_over.txt").exists()
    assert not (target / "modeling_basis_sharing.py").exists()
    assert [path.name for path in target.parent.iterdir()] == ["model"]
    assert AutoTokenizer.from_pretrained(target)("ab").input_ids == tokenizer("ab").input_ids


def test_a_save_that_fails_leaves_what_was_there(dense: Dense, tmp_path: Path) -> None:
    class FullDisk:
        def save_pretrained(self, folder: Path) -> None:
            raise OSError(28, "No space left on device", str(folder))

    tokenizer = dense("llama").tokenizer
    target = save_model(dense("llama").module, tokenizer, tmp_path / "model")
    before = {path.name: path.read_bytes() for path in target.iterdir()}
    with pytest.raises(OSError, match="No space left"):
        save_model(compressed_twin(dense("llama")), FullDisk(), target)  # type: ignore[arg-type]
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_what_a_killed_save_left_is_removed_by_the_next(dense: Dense, tmp_path: Path) -> None:
    left = tmp_path / ".model-0abc_xyz"
    (left / "new").mkdir(parents=True)
    os.utime(left, (0, 0))
    save_model(dense("llama").module, dense("llama").tokenizer, tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_folder_that_is_no_model_is_not_overwritten(dense: Dense, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="no model folder"):
        save_model(dense("llama").module, dense("llama").tokenizer, tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"
