"""Encoders and encoder-decoders go the way of all models: found, loaded, calibrated, compressed, saved."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    BartConfig,
    BartModel,
    BertConfig,
    BertLMHeadModel,
    BertModel,
    PreTrainedModel,
    T5Config,
    T5EncoderModel,
)

from bs_exp import save_model, to_dense
from bs_exp.allocation.uniform import UniformAllocation
from bs_exp.cache import Cache
from bs_exp.calibration.group_statistics import calibrate
from bs_exp.calibration.profile import profile_blocks
from bs_exp.corpora.windows import check_fits, max_positions
from bs_exp.errors import ConfigError, DataError, ModelError
from bs_exp.importance.none import NoImportance
from bs_exp.layout.pivoted import PivotedLayout
from bs_exp.layout.plain import PlainLayout
from bs_exp.models.architecture import module_of, trunks, weight_of
from bs_exp.models.auto_classes import find_auto_class
from bs_exp.models.loading import LocalModel, assemble
from bs_exp.models.model_inputs import feeder, hidden_states
from bs_exp.models.surgery import replace_matrices, twin
from bs_exp.models.tiny import ENCODER_DECODERS, ENCODERS, byte_tokenizer, tiny_random
from bs_exp.pipeline import Recipe, compress, prepare
from bs_exp.progress import Progress
from bs_exp.schedule.single import SingleRound
from bs_exp.sharing.adjacent import AdjacentSharing
from bs_exp.types import (
    CalibrationData,
    Feeding,
    LoadedModel,
    SharedFactors,
    Statistic,
    Task,
    TokenWindows,
    WeightGroup,
)
from bs_exp.update.none import NoUpdate
from bs_exp.whitening.fisher_rows import FisherRowsWhitening
from bs_exp.whitening.gram import GramWhitening
from bs_exp.whitening.two_sided import TwoSidedWhitening
from bs_exp.workspace import Workspace
from tests.support.gathered import gathered

ALL = (*ENCODERS, *ENCODER_DECODERS)
QUIET = Progress(quiet=True)
DEFAULT = Feeding()
REPOSITORY = Path(__file__).parents[2]
SMALL = {"vocab_size": 258, "bos_token_id": 257, "eos_token_id": 256, "pad_token_id": 256}
BERT = {**SMALL, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}

SELF = {"q": ("attn_in", "q"), "k": ("attn_in", "k"), "v": ("attn_in", "v"), "o": ("attn_out", "o")}
# Family -> for each stack: path of the blocks, first layer, and matrix type -> (site, name in the block).
EXPECTED: dict[str, tuple[tuple[str, int, dict[str, tuple[str, str]]], ...]] = {
    "bert": (
        (
            "bert.encoder.layer",
            0,
            {
                "q": ("attn_in", "attention.self.query"),
                "k": ("attn_in", "attention.self.key"),
                "v": ("attn_in", "attention.self.value"),
                "o": ("attn_out", "attention.output.dense"),
                "up": ("mlp_in", "intermediate.dense"),
                "down": ("mlp_hidden", "output.dense"),
            },
        ),
    ),
    "t5": (
        (
            "encoder.block",
            0,
            {
                **{matrix: (site, f"layer.0.SelfAttention.{name}") for matrix, (site, name) in SELF.items()},
                "up": ("mlp_in", "layer.1.DenseReluDense.wi"),
                "down": ("mlp_hidden", "layer.1.DenseReluDense.wo"),
            },
        ),
        (
            "decoder.block",
            3,
            {
                **{matrix: (site, f"layer.0.SelfAttention.{name}") for matrix, (site, name) in SELF.items()},
                "up": ("mlp_in", "layer.2.DenseReluDense.wi"),
                "down": ("mlp_hidden", "layer.2.DenseReluDense.wo"),
                "cross_q": ("cross_in", "layer.1.EncDecAttention.q"),
                "cross_k": ("memory", "layer.1.EncDecAttention.k"),
                "cross_v": ("memory", "layer.1.EncDecAttention.v"),
                "cross_o": ("cross_out", "layer.1.EncDecAttention.o"),
            },
        ),
    ),
}


@dataclass(frozen=True, kw_only=True)
class RandomTokens:
    """Calibration on random tokens."""

    feeding: Feeding = DEFAULT
    batch_size: int = 4

    def windows(self, tokenizer: object = None) -> TokenWindows:
        ids = torch.randint(0, 256, (12, 24), generator=torch.Generator().manual_seed(0))
        return TokenWindows(ids=ids, provenance={"sha256": "random"}, feeding=self.feeding)


RECIPE = Recipe(
    calibration=RandomTokens(),
    sharing=AdjacentSharing(matrices=("q", "k", "v", "up", "cross_k", "cross_v"), group_size=2),
    whitening=GramWhitening(ridge=1e-9),
    importance=NoImportance(),
    allocation=UniformAllocation(),
    layout=PlainLayout(),
    schedule=SingleRound(),
    update=NoUpdate(),
    retain_ratio=0.6,
)


def bare_encoder() -> LoadedModel:
    """BERT without its head."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = BertModel(BertConfig(**BERT))
    return assemble(module, byte_tokenizer(Task.MASKED_LM), None, source="test", name="bare", task=Task.ENCODER)


def watched(model: LoadedModel, ids: Tensor, feeding: Feeding = DEFAULT) -> tuple[dict[str, Tensor], ...]:
    """Inputs and outputs of every matrix while the blocks run."""
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}
    handles = []
    for matrix in model.architecture.matrices:

        def keep(_: nn.Module, args: tuple[Tensor, ...], output: Tensor, name: str = matrix.module) -> None:
            inputs[name], outputs[name] = args[0].clone(), output.clone()

        handles.append(module_of(model.module, matrix).register_forward_hook(keep))
    with torch.no_grad():
        hidden_states(model.module, feeder(model, feeding).inputs(ids))
    for handle in handles:
        handle.remove()
    return inputs, outputs


# --- found


@pytest.mark.parametrize("family", EXPECTED)
def test_matrices_are_found_with_type_site_and_layer(family: str) -> None:
    architecture = tiny_random(family).architecture
    found = [(m.layer, m.stack, m.matrix, m.site, m.module) for m in architecture.matrices]
    assert found == [
        (first + block, stack, matrix, site, f"{path}.{block}.{name}")
        for stack, (path, first, matrices) in enumerate(EXPECTED[family])
        for block in range(3)
        for matrix, (site, name) in matrices.items()
    ]
    assert len(architecture.by_position) == len(architecture.matrices)


@pytest.mark.parametrize("family", ALL)
def test_every_linear_layer_of_the_blocks_is_a_matrix(family: str) -> None:
    model = tiny_random(family)
    linear = {id(part) for trunk in trunks(model.module) for part in trunk.modules() if isinstance(part, nn.Linear)}
    assert {id(module_of(model.module, m)) for m in model.architecture.matrices} == linear


@pytest.mark.parametrize("family", ALL)
def test_matrices_of_a_site_read_the_same_and_weights_are_what_runs(family: str) -> None:
    model = tiny_random(family)
    inputs, outputs = watched(model, RandomTokens().windows().ids, Feeding(source_share=0.75))
    fed: dict[str, Tensor] = {}
    for matrix in model.architecture.matrices:
        x = inputs[matrix.module]
        assert torch.equal(fed.setdefault(matrix.input_site, x), x), matrix.module
        bias = module_of(model.module, matrix).bias
        y = x @ weight_of(model.module, matrix).detach() + (0 if bias is None else bias.detach())
        torch.testing.assert_close(y, outputs[matrix.module], rtol=1e-4, atol=1e-5)


def test_a_decoders_layers_count_on_and_its_cross_attention_reads_the_memory() -> None:
    model = tiny_random("t5")
    inputs, _ = watched(model, RandomTokens().windows().ids, Feeding(source_share=0.75))
    encoder, _ = trunks(model.module)
    with torch.no_grad():
        memory = encoder(input_ids=RandomTokens().windows().ids[:, :18]).last_hidden_state
    for matrix in model.architecture.of_type("cross_k"):
        assert matrix.layer in (3, 4, 5)
        assert torch.equal(inputs[matrix.module], memory)


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("electra", {**BERT, "embedding_size": 32}),
        ("deberta-v2", BERT),
        ("modernbert", {**BERT, "cls_token_id": 1, "sep_token_id": 2}),
        ("mpnet", {**BERT, "pad_token_id": 1}),
        ("albert", {**BERT, "embedding_size": 16, "num_hidden_layers": 3}),
        ("mt5", {**SMALL, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}),
    ],
)
def test_other_families_are_known_by_their_names(family: str, settings: dict[str, Any]) -> None:
    config = AutoConfig.for_model(family, **settings)
    auto = find_auto_class(config, own_code=False)
    assert auto is not None
    model = assemble(auto.loader.from_config(config), byte_tokenizer(), None, source="", name="", task=auto.task)
    found = gathered(model, CalibrationData(RandomTokens().windows(), 4), Statistic.GRAM)
    assert found[Statistic.GRAM].keys() == {m.input_site for m in model.architecture.matrices}
    assert {"o", "down"} <= set(model.architecture.matrix_types)


# --- loaded


@pytest.mark.parametrize("family", ALL)
def test_a_saved_model_comes_back_bit_for_bit(family: str, tmp_path: Path) -> None:
    original = tiny_random(family)
    original.module.save_pretrained(tmp_path)
    original.tokenizer.save_pretrained(tmp_path)
    loaded = LocalModel(path=str(tmp_path), device="cpu").load()
    assert loaded.fingerprint == original.fingerprint
    assert loaded.architecture == original.architecture
    assert loaded.task is original.task
    assert loaded.provenance["task"] == original.task.value
    ids = RandomTokens().windows().ids
    assert torch.equal(logits_of(loaded, ids), logits_of(original, ids))


def test_the_head_of_a_checkpoint_decides_its_task(tmp_path: Path) -> None:
    sizes = {**SMALL, "d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 1, "num_heads": 4}
    bart = {
        **SMALL, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
    }  # fmt: skip
    models: dict[str, tuple[PreTrainedModel, Task]] = {
        "encoder": (BertModel(BertConfig(**BERT)), Task.ENCODER),
        "decoder": (BertLMHeadModel(BertConfig(**BERT, is_decoder=True)), Task.CAUSAL_LM),
        "t5 encoder": (T5EncoderModel(T5Config(**sizes)), Task.ENCODER),
        "bart without its tied head": (BartModel(BartConfig(**bart)), Task.SEQ2SEQ_LM),
    }
    for name, (model, task) in models.items():
        model.save_pretrained(tmp_path / name)
        byte_tokenizer().save_pretrained(tmp_path / name)
        assert LocalModel(path=str(tmp_path / name), device="cpu").load().task is task, name


def test_architectures_that_are_not_named() -> None:
    def task(family: str, **settings: Any) -> Task | None:
        auto = find_auto_class(AutoConfig.for_model(family, **settings), own_code=False)
        return auto and auto.task

    assert task("bert") is Task.MASKED_LM
    assert task("bert", is_decoder=True) is Task.CAUSAL_LM
    assert task("bart") is Task.SEQ2SEQ_LM
    assert task("llama") is Task.CAUSAL_LM
    assert task("vit") is None


def test_own_code_is_asked_for_what_its_architecture_names() -> None:
    config = AutoConfig.for_model("bert", architectures=["MineForMaskedLM"])
    config.auto_map = {"AutoModel": "mine.MineModel", "AutoModelForMaskedLM": "mine.MineForMaskedLM"}
    found = find_auto_class(config, own_code=True)
    assert found is not None
    assert (found.task, found.name) == (Task.MASKED_LM, "AutoModelForMaskedLM")
    config.architectures = ["MineModel"]
    assert find_auto_class(config, own_code=True).name == "AutoModel"  # type: ignore[union-attr]
    assert find_auto_class(config, own_code=False) is None


def test_positions_are_those_that_text_can_take() -> None:
    """RoBERTa's table begins behind its padding; an encoder-decoder's parts stand beside each other."""
    roberta, bart = tiny_random("roberta"), tiny_random("bart")
    assert max_positions(roberta) == 1024 - 257
    assert logits_of(roberta, torch.zeros(1, 767, dtype=torch.long)).shape[1] == 767
    with pytest.raises((IndexError, RuntimeError)):
        logits_of(roberta, torch.zeros(1, 768, dtype=torch.long))
    check_fits(TokenWindows(ids=torch.zeros(1, 1024, dtype=torch.long), provenance={}), bart)
    with pytest.raises(ConfigError, match=r"sequence_length is 1,200 and takes 600 positions.* set it to 1024 or less"):
        check_fits(TokenWindows(ids=torch.zeros(1, 1200, dtype=torch.long), provenance={}), bart)
    with pytest.raises(DataError, match="do not belong together"):
        check_fits(TokenWindows(ids=torch.full((1, 8), 999), provenance={}), roberta)


# --- calibrated


@pytest.mark.parametrize("family", ALL)
def test_every_matrix_has_the_gram_of_its_own_input(family: str) -> None:
    """Oracle: the inputs of every matrix in one batch, multiplied in fp64; their number is counted by site."""
    model, calibration = tiny_random(family), RandomTokens(feeding=Feeding(source_share=0.75))
    windows = calibration.windows()
    inputs, _ = watched(model, windows.ids, windows.feeding)
    stats = calibrate(
        model,
        CalibrationData(windows, calibration.batch_size),
        needs={Statistic.GRAM},
        workspace=Workspace(Cache(None), QUIET),
    )
    for matrix in model.architecture.matrices:
        group = WeightGroup(matrix.matrix, (matrix.layer,), matrix.d_in, matrix.d_out)
        found = stats.of(group, torch.device("cpu"))
        rows = inputs[matrix.module].reshape(-1, matrix.d_in).double()
        assert found.gram is not None
        torch.testing.assert_close(found.gram, rows.T @ rows, rtol=1e-5, atol=1e-4)
        assert found.tokens == len(rows)
    if model.task is Task.SEQ2SEQ_LM:
        assert {len(rows.flatten(0, 1)) for rows in inputs.values()} == {12 * 18, 12 * 6}


@pytest.mark.parametrize("target", ["continuation", "spans"])
@pytest.mark.parametrize("family", ["bert", "distilbert", "t5", "bart"])
def test_gradients_are_those_of_the_models_own_loss(family: str, target: str) -> None:
    """Oracle: autograd's own gradients of the summed loss, one window at a time, and of the mean over batches."""
    model = tiny_random(family, layers=2)
    windows = replace(RandomTokens(feeding=Feeding(target=target)).windows(), ids=RandomTokens().windows().ids[:4])
    feed = feeder(model, windows.feeding)
    modules = {m: module_of(model.module, m) for m in model.architecture.matrices}

    def gradients(ids: Tensor, reduction: str) -> dict[Any, Tensor]:
        examples = feed.examples(ids)
        loss = examples.loss(model.module(**examples.inputs).logits, reduction=reduction)
        found = torch.autograd.grad(loss, [module.weight for module in modules.values()])
        return {matrix: g.double() for matrix, g in zip(modules, found, strict=True)}

    found = gathered(model, CalibrationData(windows, 2), Statistic.WEIGHT_GRADIENT)
    expected = {m: torch.zeros(m.d_in).double() for m in modules}
    for window in windows.ids:
        for matrix, gradient in gradients(window[None], "sum").items():
            expected[matrix] += gradient.square().sum(0) / len(windows.ids)
    for matrix, rows in expected.items():
        torch.testing.assert_close(found[Statistic.WEIGHT_GRADIENT][matrix.module]["rows"], rows, rtol=1e-3, atol=1e-8)

    workspace = Workspace(Cache(None), QUIET)
    profile = profile_blocks(model, CalibrationData(windows, 2), needs={Statistic.SENSITIVITY}, workspace=workspace)
    by_layer = torch.zeros(model.architecture.num_layers).double()
    for ids in windows.ids.split(2):
        for matrix, gradient in gradients(ids, "mean").items():
            by_layer[matrix.layer] += gradient.norm() / modules[matrix].weight.double().norm() / 2
    torch.testing.assert_close(profile.sensitivity, by_layer.detach(), rtol=1e-3, atol=1e-8)


def test_block_outputs_cover_encoder_and_decoder() -> None:
    data, workspace = CalibrationData(RandomTokens().windows(), 4), Workspace(Cache(None), QUIET)
    found = profile_blocks(tiny_random("t5"), data, needs={Statistic.BLOCK_OUTPUTS}, workspace=workspace)
    values = torch.stack(list((found.output_singular_values or {}).values()))
    assert values.shape == (6, 32)
    assert (values[:, 0] > 0).all()


def test_nats_are_counted_per_predicted_token() -> None:
    """Oracle: the trace of the Fisher matrix, from the gradient of every predicted token's loss.

    In the last block a token's loss has a gradient at its own position alone: the Kronecker factors are nearly exact.
    """
    model, calibration = tiny_random("bert", layers=1), RandomTokens()
    windows = calibration.windows()
    needs = TwoSidedWhitening(ridge=0.0, damping=0.0, temper=1.0).needs
    stats = calibrate(
        model, CalibrationData(windows, calibration.batch_size), needs=needs, workspace=Workspace(Cache(None), QUIET)
    )
    matrix = model.architecture.by_position["up", 0]
    found = stats.of(WeightGroup("up", (0,), matrix.d_in, matrix.d_out), torch.device("cpu"))
    assert (found.tokens, found.predictions) == (12 * 24, 12 * 4)
    assert found.gram is not None and found.output_grams is not None
    traces = found.gram.trace() / found.tokens * found.output_grams[0].trace() / found.predictions
    weight = module_of(model.module, matrix).weight
    examples = feeder(model).examples(windows.ids)
    losses = examples.loss(model.module(**examples.inputs).logits, reduction="none")
    squares = [torch.autograd.grad(loss, weight, retain_graph=True)[0].double().square().sum() for loss in losses]
    assert float(traces) == pytest.approx(float(torch.stack(squares).mean()), rel=0.1)


def test_statistics_of_other_feedings_are_not_taken_from_the_cache() -> None:
    model, cache = tiny_random("bert"), Cache(None)

    def gradient(feeding: Feeding) -> Tensor:
        data = CalibrationData(RandomTokens(feeding=feeding).windows(), RandomTokens.batch_size)
        stats = calibrate(model, data, needs={Statistic.OUTPUT_GRAM}, workspace=Workspace(cache, QUIET))
        grams = stats.of(WeightGroup("up", (0,), 32, 48), torch.device("cpu")).output_grams
        assert grams is not None
        return grams[0]

    assert torch.equal(gradient(Feeding()), gradient(Feeding()))
    assert not torch.allclose(gradient(Feeding()), gradient(Feeding(seed=1)))


# --- compressed


@pytest.mark.parametrize("family", ALL)
def test_full_rank_changes_nothing(family: str) -> None:
    """All components of every matrix, through factorised layers."""
    model = tiny_random(family)

    def factors() -> Any:
        for m in model.architecture.matrices:
            u, s, vt = torch.linalg.svd(weight_of(model.module, m).detach().double(), full_matrices=False)
            yield SharedFactors(WeightGroup(m.matrix, (m.layer,), m.d_in, m.d_out), u * s, {m.layer: vt})

    module = twin(model.module)
    replace_matrices(module, model.architecture, factors(), PlainLayout())
    ids = RandomTokens().windows().ids
    torch.testing.assert_close(
        logits_of(replace(model, module=module), ids), logits_of(model, ids), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("family", [*ALL, "bare"])
def test_predicted_losses_are_measured_and_encoder_and_decoder_share_nothing(family: str) -> None:
    model = bare_encoder() if family == "bare" else tiny_random(family)
    recipe = replace(RECIPE, sharing=replace(RECIPE.sharing, group_size=1 if family == "bare" else 2))
    compressed = compress(model, recipe, Workspace(Cache(None), QUIET))
    inputs, _ = watched(model, RandomTokens().windows().ids)
    dense = to_dense(compressed.module)
    for planned in compressed.plan.groups:
        group = planned.group
        matrices = [model.architecture.by_position[group.matrix, layer] for layer in group.layers]
        assert len({m.stack for m in matrices}) == 1
        if planned.rank is None:
            continue
        x = torch.cat([inputs[m.module].reshape(-1, m.d_in).double() for m in matrices])
        error = torch.cat(
            [(weight_of(model.module, m) - weight_of(dense, m)).detach().double() for m in matrices], dim=1
        )
        assert planned.predicted_loss == pytest.approx(float((x @ error).norm()), rel=1e-3)
    shared = {g.group.layers for g in compressed.plan.groups if g.group.matrix == "q" and g.group.size > 1}
    assert shared == {"bare": set(), "t5": {(0, 1), (3, 4)}, "bart": {(0, 1), (3, 4)}}.get(family, {(0, 1)})


def test_strategies_that_need_a_loss_refuse_an_encoder_without_a_head_before_any_work() -> None:
    alone = replace(RECIPE.sharing, group_size=1)
    with pytest.raises(ConfigError, match=r"FisherRowsWhitening, made from gradients of the loss, needs logits"):
        prepare(bare_encoder(), replace(RECIPE, sharing=alone, whitening=FisherRowsWhitening(ridge=1e-6)), QUIET)
    model = tiny_random("bert")
    without_mask = replace(model, tokenizer=byte_tokenizer())
    with pytest.raises(ModelError, match="names no mask token"):
        prepare(without_mask, replace(RECIPE, whitening=FisherRowsWhitening(ridge=1e-6)), QUIET)
    prepare(without_mask, RECIPE, QUIET)


# --- saved


def logits_of(model: LoadedModel, ids: Tensor) -> Tensor:
    inputs = feeder(model).inputs(ids)
    with torch.no_grad():
        logits: Tensor = model.module(**inputs).logits
    return logits


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compressed and dense again, with what they say of some inputs."""
    folder = tmp_path_factory.mktemp("encoders")
    expected = {}
    for family, layout in (*((family, PlainLayout()) for family in (*ALL, "bare")), ("t5", PivotedLayout())):
        model = bare_encoder() if family == "bare" else tiny_random(family)
        sharing = replace(RECIPE.sharing, group_size=1 if family == "bare" else 2)
        module = compress(model, replace(RECIPE, sharing=sharing, layout=layout), Workspace(Cache(None), QUIET)).module
        inputs = {k: v for k, v in feeder(model).inputs(torch.arange(24).view(2, 12)).items() if k != "use_cache"}
        for kind, made in (("compressed", module), ("dense", to_dense(module))):
            path = f"{family}-{layout.name}-{kind}"
            save_model(made, model.tokenizer, folder / path)
            with torch.no_grad():
                output = made(**inputs)[0]
            expected[path] = {"auto": AUTO[model.task], "inputs": inputs, "output": output}
    torch.save(expected, folder / "expected.pt")
    return folder


AUTO = {
    Task.MASKED_LM: "AutoModelForMaskedLM",
    Task.SEQ2SEQ_LM: "AutoModelForSeq2SeqLM",
    Task.ENCODER: "AutoModel",
}


@pytest.mark.slow
@pytest.mark.parametrize("with_bs_exp", [True, False])
def test_a_fresh_process_gives_the_same_outputs(saved: Path, with_bs_exp: bool) -> None:
    done = subprocess.run(
        [
            sys.executable,
            str(Path(__file__).parents[1] / "support" / "load_encoders.py"),
            str(saved),
            str(int(with_bs_exp)),
        ],
        cwd=saved,
        env={
            **os.environ,
            "PYTHONPATH": str(REPOSITORY) if with_bs_exp else "",
            "HF_HOME": str(saved / "home"),
            "OMP_NUM_THREADS": str(torch.get_num_threads()),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen == dict.fromkeys(torch.load(saved / "expected.pt"), True)


def test_the_folder_serves_every_auto_class_of_its_model(saved: Path) -> None:
    def served(family: str) -> set[str]:
        config = json.loads((saved / f"{family}-plain-compressed" / "config.json").read_text())
        return set(config["auto_map"]) - {"AutoConfig"}

    assert served("bert") == {"AutoModelForMaskedLM"}
    assert served("t5") == {"AutoModelForSeq2SeqLM"}
    assert served("bart") == {"AutoModelForSeq2SeqLM", "AutoModelForMaskedLM"}
    assert served("bare") == {"AutoModel", "AutoModelForTextEncoding"}


def test_a_loaded_model_becomes_dense(saved: Path) -> None:
    path = saved / "bert-plain-compressed"
    expected = torch.load(saved / "expected.pt")["bert-plain-dense"]
    model = AutoModelForMaskedLM.from_pretrained(path)
    with torch.no_grad():
        assert torch.equal(model.dequantize()(**expected["inputs"])[0], expected["output"])
