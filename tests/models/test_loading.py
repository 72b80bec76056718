"""Loading: real folders, real `from_pretrained`, and a message for everything that can be wrong with them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import huggingface_hub.constants
import pytest
import sentencepiece
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForSequenceClassification, LlamaModel

from bs_exp.errors import BsExpError, ConfigError, ModelError
from bs_exp.models.loading import DemoModel, HubModel, LocalModel
from bs_exp.models.tiny import FAMILIES, byte_tokenizer, tiny_random

WEIGHTS = "model.safetensors"
BIAS = {"model.layers.0.self_attn.q_proj.bias": torch.zeros(32)}


def _save(folder: Path, family: str = "llama") -> Path:
    model = tiny_random(family)
    model.module.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    return folder


def _edit_weights(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(folder / WEIGHTS)
    edit(weights)
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})


def _edit_config(folder: Path, **values: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_model_comes_back_bit_for_bit(family: str, tmp_path: Path) -> None:
    original = tiny_random(family)
    loaded = LocalModel(path=str(_save(tmp_path, family)), device="cpu").load()
    assert loaded.fingerprint == original.fingerprint
    assert loaded.architecture == original.architecture
    assert not loaded.module.training
    ids = loaded.tokenizer("def f(x):", return_tensors="pt").input_ids
    assert torch.equal(ids, original.tokenizer("def f(x):", return_tensors="pt").input_ids)
    assert torch.equal(loaded.module(ids).logits, original.module(ids).logits)


def test_provenance_is_plain_data(tmp_path: Path) -> None:
    loaded = LocalModel(path=str(_save(tmp_path)), dtype="bfloat16", device="cpu").load()
    assert json.loads(json.dumps(loaded.provenance)) == {
        "source": "local",
        "name": str(tmp_path),
        "revision": None,
        "dtype": "bfloat16",
        "device": "cpu",
        "family": "llama",
        "task": "causal_lm",
        "parameters": sum(p.numel() for p in loaded.module.parameters()),
        "fingerprint": loaded.fingerprint,
    }
    assert loaded.module.dtype == torch.bfloat16


def test_dtype_auto_is_the_stored_one(tmp_path: Path) -> None:
    tiny_random().module.to(torch.float16).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    assert LocalModel(path=str(tmp_path), device="cpu").load().provenance["dtype"] == "float16"


def test_roles_and_attention_reach_the_model(tmp_path: Path) -> None:
    source = LocalModel(
        path=str(_save(tmp_path)), device="cpu", roles={"down_proj": "dense"}, attn_implementation="eager"
    )
    loaded = source.load()
    assert "down" not in loaded.architecture.matrix_types
    assert loaded.module.config._attn_implementation == "eager"


def _remove(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).unlink()


def _write(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content)


def _cut(folder: Path) -> None:
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[: len(content) // 2])


def _lose_a_shard(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _rewrite(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_remove("config.json"), r"holds no configuration: looked for config\.json, found generation_config\.json, .*"),
        (_remove(WEIGHTS), r"holds no weights: looked for model\.safetensors or .*pytorch_model\.bin"),
        (_remove("tokenizer.json"), r"Cannot read the tokenizer of "),
        (_write("config.json", b"{"), r"Cannot read the configuration of .*not a valid JSON file"),
        (_write("config.json", b'{"model_type": "lama"}'), r"Cannot read the configuration of .*`lama`"),
        (lambda folder: _edit_config(folder, dtype="vloat32"), r"Cannot read the configuration of .*AttributeError"),
        (  # tokenizers raises bare Exceptions
            lambda folder: _rewrite(folder / "tokenizer.json", '"type": "ByteLevel"', '"type": "BiteLevel"'),
            r"Cannot read the tokenizer of .*: Exception: data did not match",
        ),
        (_write(WEIGHTS, b""), r"Cannot read the weights of .*SafetensorError"),
        (_write(WEIGHTS, b"no weights at all"), r"Cannot read the weights of .*SafetensorError"),
        (_cut, r"Cannot read the weights of .*SafetensorError"),
        (_lose_a_shard, r"lacks 1 of 1 shards that its index names: model-00001-of-00002\.safetensors"),
        (
            lambda folder: _edit_weights(folder, lambda w: w.pop("model.layers.1.mlp.up_proj.weight")),
            r"lacks 1 weights of LlamaForCausalLM: model\.layers\.1\.mlp\.up_proj\.weight\. They would be random",
        ),
        (
            lambda folder: _edit_weights(folder, lambda w: w.update({"model.norm.weight": torch.ones(31)})),
            r"1 weights of .* not have the shapes of LlamaForCausalLM: model\.norm\.weight is 31, needed is 32\.",
        ),
        (
            lambda folder: _edit_config(folder, num_key_value_heads=1),
            r"6 weights .*layers\.0\.self_attn\.k_proj\.weight is 16 x 32, needed is 8 x 32, .*num_key_value_heads",
        ),
        (
            lambda folder: _edit_weights(folder, lambda w: w.update(BIAS)),
            r"no place for 1 weights of .*: model\.layers\.0\.self_attn\.q_proj\.bias\. .*model\.allow_unused=true",
        ),
        (
            lambda folder: _edit_config(folder, num_hidden_layers=1),
            r"no place for 18 weights of .*model\.layers\.1\.input_layernorm\.weight, .* and 13 more\.",
        ),
        (
            lambda folder: _edit_weights(folder, lambda w: w["model.layers.1.mlp.up_proj.weight"].fill_(torch.nan)),
            r"Weight model\.layers\.1\.mlp\.up_proj\.weight .*1536 values that are NaN",
        ),
        (
            lambda folder: _edit_config(folder, quantization_config={"quant_method": "basis_sharing"}),
            r"already compressed or quantised \(quant_method 'basis_sharing'\).*to_dense",
        ),
        (
            lambda folder: _edit_config(
                folder, model_type="own", auto_map={"AutoConfig": "c.C", "AutoModelForCausalLM": "c.M"}
            ),
            r"Cannot read the configuration of (.|\n)*trust_remote_code",
        ),
    ],
)
def test_a_damaged_folder_is_explained(damage: Callable[[Path], object], message: str, tmp_path: Path) -> None:
    damage(_save(tmp_path))
    with pytest.raises(ModelError, match=message) as caught:
        LocalModel(path=str(tmp_path), device="cpu").load()
    assert "model.layers" in str(caught.value) or str(tmp_path) in str(caught.value)


def test_a_gpt2_without_tokenizer_files_is_refused(tmp_path: Path) -> None:
    tiny_random("gpt2").module.save_pretrained(tmp_path)  # its tokenizer class would come up with no vocabulary
    with pytest.raises(ModelError, match="has no tokenizer files"):
        LocalModel(path=str(tmp_path), device="cpu").load()


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"Model folder .*nowhere does not exist"):
        LocalModel(path=str(tmp_path / "nowhere")).load()
    (tmp_path / "file").touch()
    with pytest.raises(ModelError, match="is a file, not a folder"):
        LocalModel(path=str(tmp_path / "file")).load()
    with pytest.raises(ModelError, match=r"holds no configuration: .* found file"):
        LocalModel(path=str(tmp_path)).load()


def test_models_of_other_kinds_are_refused(tmp_path: Path) -> None:
    config = BertConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48, vocab_size=258
    )
    classifier = BertForSequenceClassification(config)
    for name, model in [("classifier", classifier), ("headless", tiny_random().module.model)]:
        model.save_pretrained(tmp_path / name)
        byte_tokenizer().save_pretrained(tmp_path / name)
    for name, architecture in [("classifier", BertForSequenceClassification), ("headless", LlamaModel)]:
        with pytest.raises(ModelError, match=f"no kind that can be compressed: .*{architecture.__name__}"):
            LocalModel(path=str(tmp_path / name), device="cpu").load()


def test_a_hub_model_without_network_names_the_alternatives(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match=r"of bs-exp/no-such-model: (.|\n)*model=demo, model=local model\.path=DIR"):
        HubModel(name="bs-exp/no-such-model").load()


def test_a_hub_model_comes_from_the_cache_and_records_its_commit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    commit, repository = "0123456789abcdef0123456789abcdef01234567", tmp_path / "models--org--name"
    _save(repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    loaded = HubModel(name="org/name", device="cpu").load()
    assert (loaded.provenance["source"], loaded.provenance["name"]) == ("hub", "org/name")
    assert loaded.provenance["revision"] == commit
    assert loaded.fingerprint == tiny_random().fingerprint
    with pytest.raises(ModelError, match="Cannot read the configuration of org/name"):
        HubModel(name="org/name", revision="v2").load()


def test_a_hub_name_that_is_a_folder_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"Use model=local model\.path=org/name"):
        HubModel(name="org/name").load()


@pytest.mark.parametrize("source", [DemoModel, lambda **dials: LocalModel(path="x", **dials),
                                    lambda **dials: HubModel(name="x/y", **dials)])  # fmt: skip
def test_wrong_dials_are_refused_before_anything_is_read(source: Callable[..., object]) -> None:
    with pytest.raises(ConfigError, match="dtype must be one of float32, float16, bfloat16, auto, got 'half'"):
        source(dtype="half")
    for device in ("tpu9", "meta", ""):
        with pytest.raises(ConfigError, match=f"device must be .*, got '{device}'"):
            source(device=device)
    with pytest.raises(BsExpError, match=r"model\.roles"):
        source(roles={"q_proj": "p"})


def test_unused_weights_are_allowed_on_request_and_heads_are_told(tmp_path: Path) -> None:
    (tmp_path / "llama").mkdir()
    _edit_weights(_save(tmp_path / "llama"), lambda w: w.update(BIAS))
    loaded = LocalModel(path=str(tmp_path / "llama"), device="cpu", allow_unused=True).load()
    assert loaded.fingerprint == tiny_random().fingerprint
    assert loaded.provenance["unused_weights"] == list(BIAS)
    (tmp_path / "bert").mkdir()
    head = {"cls.seq_relationship.weight": torch.zeros(2, 32)}
    _edit_weights(_save(tmp_path / "bert", "bert"), lambda w: w.update(head))
    assert LocalModel(path=str(tmp_path / "bert"), device="cpu").load().provenance["unused_weights"] == list(head)


def test_a_tokenizer_of_sentencepiece_alone(tmp_path: Path) -> None:
    """As Llama 1 and 2 come: `tokenizer.model`, and no `tokenizer.json`."""
    tiny_random().module.save_pretrained(tmp_path)
    lines = iter([f"the model reads text number {i} and learns which word may follow" for i in range(200)])
    with (tmp_path / "tokenizer.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines, model_writer=file, vocab_size=60, model_type="bpe", minloglevel=2
        )
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    tokenizer = LocalModel(path=str(tmp_path), device="cpu").load().tokenizer
    ids = tokenizer("the model reads", add_special_tokens=False).input_ids
    assert tokenizer.decode(ids) == "the model reads"


def test_attention_that_is_not_installed_blames_its_setting(tmp_path: Path) -> None:
    source = LocalModel(path=str(_save(tmp_path)), device="cpu", attn_implementation="flash_attention_2")
    with pytest.raises(
        ModelError, match=r"model\.attn_implementation is 'flash_attention_2': install .* sdpa or eager"
    ):
        source.load()


@pytest.mark.parametrize("device", ["mps", "xpu"])
def test_other_accelerators_are_taken_where_torch_has_them(device: str) -> None:
    if getattr(torch, device).is_available():
        assert DemoModel(device=device).device == device
    else:
        with pytest.raises(ConfigError, match=f"device is '{device}', which torch .* does not have here"):
            DemoModel(device=device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"device is 'cuda', but torch .* sees 0 CUDA devices"):
        DemoModel(device="cuda")


def test_devices_beyond_the_last_are_refused() -> None:
    with pytest.raises(ConfigError, match="device is 'cuda:99'"):
        DemoModel(device="cuda:99")
