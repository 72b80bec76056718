"""The refit finds the least squares, never raises the loss that it minimises, and touches nothing but the factors."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from bs_exp.cache import Cache
from bs_exp.errors import ConfigError, ModelError
from bs_exp.linalg.least_squares import InputPairs, closed_form_beta, refit_coefficients, squared_loss
from bs_exp.models.architecture import weight_of
from bs_exp.models.blocks import Blocks
from bs_exp.models.saving import save_model
from bs_exp.models.surgery import exchange_factors, factors_of, replace_matrices, to_dense, twin
from bs_exp.models.tiny import TinyRandom, tiny_random
from bs_exp.pipeline import compress
from bs_exp.progress import Progress
from bs_exp.protocols import Layout
from bs_exp.records.record import read_record
from bs_exp.sharing.none import NoSharing
from bs_exp.sharing.residual import ResidualSharing
from bs_exp.testing.models import LAYOUTS, QUIET, Tokens, recipe, same, updated, values
from bs_exp.types import CompressedModel, LoadedModel, WeightGroup, WeightMatrix
from bs_exp.update.none import NoUpdate
from bs_exp.update.refit import Refit
from bs_exp.workspace import Workspace

OFFICIAL = Refit(
    mode="one_shot",
    inputs="compressed",
    target="compressed_inputs",
    beta=None,
    gram="group",
    ridge=1e-6,
    below=None,
)
OWN_GRAM = replace(OFFICIAL, inputs="original", target="dense_outputs", gram="layer")
KINDS = {
    "official": OFFICIAL,
    "own_gram": OWN_GRAM,
    "one_shot, outputs": replace(OFFICIAL, target="dense_outputs"),
    "one_shot, mixed": replace(OFFICIAL, target="mixed"),
    "sequential": replace(OFFICIAL, mode="sequential", gram="layer"),
    "sequential, outputs": replace(OFFICIAL, mode="sequential", gram="layer", target="dense_outputs"),
}
ALL = pytest.mark.parametrize("update", KINDS.values(), ids=KINDS.keys())


def in_fp64(layers: int = 3) -> LoadedModel:
    dense = tiny_random(layers=layers)
    dense.module.double()
    return dense


def product(module: PreTrainedModel, matrix: WeightMatrix) -> Tensor:
    """`W [d_in, d_out]` of a dense model, in fp64."""
    return weight_of(module, matrix).detach().double()


def inputs_of(module: PreTrainedModel, names: list[str]) -> dict[str, Tensor]:
    """What each module reads on the calibration tokens, as rows, by the model's own forward pass."""
    seen: dict[str, Tensor] = {}
    with ExitStack() as stack, torch.no_grad():
        for name in names:

            def see(layer: Any, arguments: Any, name: str = name) -> None:
                seen[name] = arguments[0].flatten(0, -2).double()

            stack.callback(module.get_submodule(name).register_forward_pre_hook(see).remove)
        module(Tokens().windows(None).ids)
    return seen


def divergence(dense: LoadedModel, made: CompressedModel) -> float:
    ids = Tokens().windows(None).ids
    with torch.no_grad():
        ours, theirs = (torch.distributions.Categorical(logits=m(ids).logits) for m in (dense.module, made.module))
    return float(torch.distributions.kl_divergence(ours, theirs).mean())


class Sample:
    """Explicit matrices: 60 tokens of 8 channels and their drift, a basis of rank 3, 10 columns."""

    def __init__(self, seed: int = 0) -> None:
        random = torch.Generator().manual_seed(seed)
        self.x, noise = (torch.randn(60, 8, generator=random, dtype=torch.float64) for _ in range(2))
        self.x = self.x @ torch.diag(torch.linspace(0.1, 3.0, 8).double())
        self.dense = self.x + 0.3 * noise
        self.weight = torch.randn(8, 10, generator=random, dtype=torch.float64)
        self.basis = torch.randn(8, 3, generator=random, dtype=torch.float64)
        self.coefficients = torch.randn(3, 10, generator=random, dtype=torch.float64)

    @property
    def pairs(self) -> InputPairs:
        return InputPairs.of(self.x, self.dense)

    def target(self, beta: float) -> Tensor:
        return ((1.0 - beta) * self.x + beta * self.dense) @ self.weight

    def refit(self, beta: float, ridge: float = 0.0) -> Tensor:
        return refit_coefficients(self.basis, self.coefficients, self.weight, self.pairs, beta=beta, ridge=ridge)


@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])
def test_coefficients_are_those_of_least_squares(beta: float) -> None:
    """Oracle: torch.linalg.lstsq on the tokens themselves."""
    sample = Sample()
    expected = torch.linalg.lstsq(sample.x @ sample.basis, sample.target(beta)).solution
    torch.testing.assert_close(sample.refit(beta), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])
def test_the_loss_is_that_of_the_tokens(beta: float) -> None:
    sample = Sample()
    expected = (sample.x @ sample.basis @ sample.coefficients - sample.target(beta)).square().sum()
    found = squared_loss(sample.basis @ sample.coefficients, sample.weight, sample.pairs, beta)
    assert found == pytest.approx(float(expected), rel=1e-10)


def test_the_ridge_holds_the_product_near_where_it_is() -> None:
    """Oracle: the ridge as more rows of the least squares, on the change of the product."""
    sample, ridge = Sample(), 0.3
    scale = (ridge * sample.x.square().sum(0).mean()).sqrt()
    rows = torch.cat((sample.x, scale * torch.eye(8, dtype=torch.float64))) @ sample.basis
    wanted = torch.cat((sample.target(0.4), scale * sample.basis @ sample.coefficients))
    expected = torch.linalg.lstsq(rows, wanted).solution
    torch.testing.assert_close(sample.refit(0.4, ridge), expected, rtol=1e-9, atol=1e-9)


def test_directions_without_inputs_do_not_move() -> None:
    """Oracle: the least change of the product among all least squares, by lstsq's minimum norm."""
    sample = Sample()
    sample.x[:, 2:] = 0.0
    sample.dense = sample.x
    orthonormal = torch.linalg.qr(sample.basis).Q
    present = sample.basis @ sample.coefficients
    change = torch.linalg.lstsq(
        sample.x @ orthonormal, sample.target(0.0) - sample.x @ present, driver="gelsd"
    ).solution
    found = sample.basis @ sample.refit(0.0)
    torch.testing.assert_close(found, present + orthonormal @ change, rtol=1e-8, atol=1e-8)
    assert torch.linalg.matrix_rank(found - present) == 2


def test_without_any_input_nothing_moves() -> None:
    sample = Sample()
    sample.x = sample.dense = torch.zeros(60, 8, dtype=torch.float64)
    torch.testing.assert_close(sample.refit(0.0, 1e-6), sample.coefficients)


def test_columns_of_the_basis_may_depend_on_each_other() -> None:
    sample = Sample()
    sample.basis[:, 2] = 2.0 * sample.basis[:, 0]
    span = torch.linalg.svd(sample.basis, full_matrices=False).U[:, :2]
    expected = span @ torch.linalg.lstsq(sample.x @ span, sample.target(0.0)).solution
    torch.testing.assert_close(sample.basis @ sample.refit(0.0), expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("seed", range(8))
def test_the_closed_form_follows_the_target_best(seed: int) -> None:
    """Oracle: a fine grid over the share of the target that the basis can give, on the tokens themselves."""
    sample = Sample(seed)
    span = torch.linalg.qr(sample.x @ sample.basis).Q
    grid = torch.linspace(0.25, 0.75, 2001).tolist()
    shares = [float((span.T @ sample.target(beta)).norm() / sample.target(beta).norm()) for beta in grid]
    best = max(zip(shares, grid, strict=True))[1]
    found = closed_form_beta(sample.basis, sample.weight, sample.pairs, ridge=0.0)
    assert found == pytest.approx(best, abs=3e-4)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@ALL
def test_the_loss_never_rises(update: Refit, dtype: str, layout: Layout) -> None:
    made = updated(TinyRandom(dtype=dtype).load(), update, layout=layout)
    report = made.update
    assert report["applied"] and report["loss_after"] < report["loss_before"]
    assert all(group["loss_after"] <= group["loss_before"] for group in report["groups"])
    assert {g["group"] for g in report["groups"]} == {g.group.name for g in made.plan.groups}


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_corrections_of_single_layers_stay(layout: Layout) -> None:
    """Oracle: least squares on what they leave, by lstsq on the tokens."""
    dense = in_fp64()
    sharing = ResidualSharing(matrices=("q", "up"), group_size=2, residual_rank=2)
    update = replace(OFFICIAL, mode="sequential", gram="layer", target="dense_outputs", ridge=0.0)
    plain, made = (
        compress(dense, replace(recipe(u, layout=layout), sharing=sharing), Workspace(Cache(None), QUIET)).module
        for u in (NoUpdate(), update)
    )
    m = dense.architecture.by_position["q", 0]
    before, after = (module.get_submodule(m.module) for module in (plain, made))
    assert torch.equal(before.down, after.down) and torch.equal(before.weight, after.weight)
    fixed = (before.weight @ before.down).detach().T
    x, wanted = (inputs_of(module, [m.module])[m.module] for module in (plain, dense.module))
    group = WeightGroup("q", (0, 1), m.d_in, m.d_out, correction=2)
    basis = layout.restore(factors_of(plain, dense.architecture, group)).basis
    found = basis @ torch.linalg.lstsq(x @ basis, wanted @ product(dense.module, m) - x @ fixed).solution + fixed
    torch.testing.assert_close(product(to_dense(made), m), found, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_biases_stay_the_parameters_they_are(family: str, layout: Layout) -> None:
    dense = tiny_random(family)
    made = updated(dense, OFFICIAL, layout=layout)
    kept = {id(p) for name, p in dense.module.named_parameters() if name.endswith("bias")}
    assert kept <= {id(p) for p in made.module.parameters()}


def test_the_reported_loss_is_the_measured_one() -> None:
    """Oracle: outputs on the tokens themselves, by forward passes of whole models."""
    dense = in_fp64()
    plain, made = updated(dense, NoUpdate()), updated(dense, replace(OFFICIAL, gram="layer", target="dense_outputs"))
    matrices = [m for m in dense.architecture.matrices if m.matrix == "up"]
    names = [m.module for m in matrices]
    x, target = inputs_of(plain.module, names), inputs_of(dense.module, names)
    for key, model in (("loss_before", plain), ("loss_after", made)):
        outputs = to_dense(model.module)
        losses = [
            float((x[m.module] @ product(outputs, m) - target[m.module] @ product(dense.module, m)).square().sum())
            for m in matrices
        ]
        found = {g["group"]: g[key] for g in made.update["groups"]}
        assert found["up[0,1]"] == pytest.approx((losses[0] + losses[1]) ** 0.5, rel=1e-6)
        assert found["up[2]"] == pytest.approx(losses[2] ** 0.5, rel=1e-6)


@pytest.mark.parametrize("target", ["compressed_inputs", "dense_outputs"])
def test_sequential_is_one_block_after_the_other(target: str) -> None:
    """Oracle: a forward pass of the whole model in front of every block, and lstsq on the tokens."""
    dense = in_fp64()
    made = updated(dense, replace(OFFICIAL, mode="sequential", gram="layer", target=target, ridge=0.0))
    plain = updated(dense, NoUpdate())
    expected = to_dense(plain.module)
    wanted = inputs_of(dense.module, [m.module for m in dense.architecture.matrices])
    for layer in range(3):
        matrices = [m for m in dense.architecture.matrices if m.layer == layer]
        seen = inputs_of(expected, [m.module for m in matrices])
        for m in matrices:
            x = seen[m.module]
            goal = (x if target == "compressed_inputs" else wanted[m.module]) @ product(dense.module, m)
            basis = plain.module.get_submodule(m.module).basis.detach().double().T
            found = basis @ torch.linalg.lstsq(x @ basis, goal).solution
            with torch.no_grad():
                expected.get_submodule(m.module).weight.copy_(found.T)
    refitted = to_dense(made.module)
    for m in dense.architecture.matrices:
        torch.testing.assert_close(product(refitted, m), product(expected, m), rtol=1e-6, atol=1e-7)


def test_the_official_update_in_its_own_words() -> None:
    """Oracle: `C = (B^T G B)^-1 B^T G W` with G summed over the group, of the model as truncation left it."""
    dense = in_fp64()
    plain, made = updated(dense, NoUpdate()), updated(dense, replace(OFFICIAL, ridge=0.0))
    refitted = to_dense(made.module)
    for matrix in ("q", "down"):
        for layers in ((0, 1), (2,)) if matrix == "q" else ((0,), (1,), (2,)):
            members = [dense.architecture.by_position[matrix, layer] for layer in layers]
            x = torch.cat(list(inputs_of(plain.module, [m.module for m in members]).values()))
            gram = x.T @ x
            for m in members:
                basis = plain.module.get_submodule(m.module).basis.detach().double().T
                inverse = torch.linalg.inv(basis.T @ gram @ basis)
                expected = basis @ inverse @ basis.T @ gram @ product(dense.module, m)
                # The calibration stage takes its products in fp32.
                torch.testing.assert_close(product(refitted, m), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("target", ["compressed_inputs", "dense_outputs", "mixed"])
def test_sequential_is_one_shot_for_one_layer(target: str) -> None:
    dense = in_fp64(layers=1)
    one_shot = replace(OFFICIAL, gram="layer", target=target)
    first, second = (
        compress(dense, replace(recipe(update), sharing=NoSharing()), Workspace(Cache(None), QUIET))
        for update in (one_shot, replace(one_shot, mode="sequential"))
    )
    for name, value in values(first.module).items():
        torch.testing.assert_close(values(second.module)[name], value, rtol=1e-4, atol=1e-5)
    assert first.update["loss_after"] == pytest.approx(second.update["loss_after"])


def test_the_gram_that_made_them_changes_nothing() -> None:
    dense = in_fp64()
    plain = updated(dense, NoUpdate())
    same_gram, own_gram = updated(dense, replace(OWN_GRAM, gram="group")), updated(dense, OWN_GRAM)
    assert same_gram.update["loss_after"] == pytest.approx(same_gram.update["loss_before"], rel=1e-9)
    for name, value in values(plain.module).items():
        torch.testing.assert_close(values(same_gram.module)[name], value, rtol=1e-4, atol=1e-6)
    # What shares with nobody was made on its own Gram; shared matrices gain.
    for group in own_gram.update["groups"]:
        gain = 1.0 - group["loss_after"] / group["loss_before"]
        assert gain > 1e-3 if "," in group["group"] else gain < 1e-9


def test_ends_of_mixed_are_the_pure_targets() -> None:
    dense = in_fp64()
    for beta, target in ((0.0, "compressed_inputs"), (1.0, "dense_outputs")):
        mixed = updated(dense, replace(OFFICIAL, target="mixed", beta=beta))
        pure = updated(dense, replace(OFFICIAL, target=target))
        for name, value in values(pure.module).items():
            torch.testing.assert_close(values(mixed.module)[name], value, rtol=1e-4, atol=1e-5)
    betas = [beta for g in updated(dense, replace(OFFICIAL, target="mixed")).update["groups"] for beta in g["beta"]]
    assert all(0.25 <= beta <= 0.75 for beta in betas)


def test_following_the_dense_outputs_pays() -> None:
    """Errors of earlier blocks are made good: the predictions come nearer, which no single loss can promise."""
    dense = tiny_random()
    update = replace(OFFICIAL, mode="sequential", gram="layer", target="dense_outputs")
    assert divergence(dense, updated(dense, update)) < 0.95 * divergence(dense, updated(dense, NoUpdate()))


@pytest.mark.parametrize("update", [KINDS["official"], KINDS["sequential, outputs"]], ids=["official", "sequential"])
def test_pivoted_and_plain_factors_are_refitted_alike(update: Refit) -> None:
    dense = in_fp64()
    plain = updated(dense, NoUpdate())
    plan = plain.plan
    groups = [g.group for g in plan.groups if g.rank is not None]
    stored = [LAYOUTS[0].restore(factors_of(plain.module, dense.architecture, group)) for group in groups]
    pivoted = twin(dense.module)
    replace_matrices(pivoted, dense.architecture, stored, LAYOUTS[1])
    calibration = Tokens()
    for module in (plain.module, pivoted):
        update.apply(module, dense, plan, calibration.data(), Workspace(Cache(None), QUIET))
    ids = calibration.windows(None).ids
    with torch.no_grad():
        torch.testing.assert_close(pivoted(ids).logits, plain.module(ids).logits, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
@pytest.mark.parametrize("update", [KINDS["official"], KINDS["sequential, outputs"]], ids=["official", "sequential"])
def test_the_saved_model_holds_the_refitted_factors(update: Refit, layout: Layout, tmp_path: Path) -> None:
    dense, ids = tiny_random(), torch.arange(20)[None]
    made = updated(dense, update, layout=layout)
    loaded = AutoModelForCausalLM.from_pretrained(save_model(made.module, dense.tokenizer, tmp_path / "model"))
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, made.module(ids).logits)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_what_is_done_keeps_its_bits(layout: Layout) -> None:
    """A layer that is refitted changes neither its basis nor the layers that share it, not even by rounding."""
    dense = TinyRandom(dtype="bfloat16").load()
    update = replace(OFFICIAL, mode="sequential", gram="layer", target="dense_outputs")
    plain, made = (updated(dense, u, layout=layout) for u in (NoUpdate(), update))
    seen = 0
    for group in (planned.group for planned in made.plan.groups if planned.group.size > 1):
        before, after = (factors_of(m.module, dense.architecture, group) for m in (plain, made))
        assert torch.equal(before.basis, after.basis) and before.rank == after.rank
        changed = [not torch.equal(before.coefficients[i], after.coefficients[i]) for i in group.layers]
        seen += sum(changed)
    assert seen


def test_exchanged_factors_are_read_back() -> None:
    dense = tiny_random()
    for layout in LAYOUTS:
        made = updated(dense, NoUpdate(), layout=layout)
        group = next(g.group for g in made.plan.groups if g.group.size == 2)
        stored = factors_of(made.module, dense.architecture, group)
        assert stored.layout is layout and bool(stored.kept) == (layout.name == "pivoted")
        doubled = replace(layout.restore(stored), basis=2.0 * layout.restore(stored).basis)
        exchange_factors(made.module, dense.architecture, layout.arrange(doubled))
        found = layout.restore(factors_of(made.module, dense.architecture, group))
        for layer in group.layers:
            expected = doubled.basis @ doubled.coefficients[layer]
            torch.testing.assert_close(found.basis @ found.coefficients[layer], expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ModelError, match="not stored as factors"):
        factors_of(dense.module, dense.architecture, group)


def test_grams_come_from_the_cache(tmp_path: Path) -> None:
    dense = tiny_random()
    updated(dense, NoUpdate(), Cache(tmp_path))
    cache = Cache(tmp_path)
    updated(dense, OWN_GRAM, cache)
    assert cache.misses["gram"] == 0 < cache.hits["gram"]


@pytest.mark.parametrize(("below", "applied"), [(0.4, False), (0.5, True), (None, True)])
def test_the_rule_of_basis_sharing(below: float | None, applied: bool) -> None:
    dense, progress = tiny_random(), Progress(quiet=True)
    made = compress(dense, recipe(replace(OFFICIAL, below=below)), Workspace(Cache(None), progress))
    assert made.update["applied"] == applied
    assert same(values(made.module), values(updated(dense, NoUpdate()).module)) != applied
    assert any("above update.below=0.4" in note for note in progress.notes) != applied


def test_a_dense_model_has_nothing_to_refit() -> None:
    progress = Progress(quiet=True)
    made = compress(tiny_random(), replace(recipe(OFFICIAL), retain_ratio=1.0), Workspace(Cache(None), progress))
    assert not made.update["applied"] and "refit: there are no factors to refit" in progress.notes


@pytest.mark.parametrize("update", [OFFICIAL, KINDS["sequential, outputs"], KINDS["one_shot, mixed"]], ids=repr)
@pytest.mark.parametrize("family", ["bert", "t5", "bart"])
def test_other_tasks(family: str, update: Refit) -> None:
    """An encoder-decoder, whose blocks are no chain, runs from its beginning for every block, and a note says so."""
    progress = Progress(quiet=True)
    made = compress(tiny_random(family), recipe(update), Workspace(Cache(None), progress))
    assert made.update["loss_after"] < made.update["loss_before"]
    told = any("The refit runs the model from its beginning for each block." in note for note in progress.notes)
    assert told == (family != "bert" and update.streams)


@pytest.mark.parametrize("update", [KINDS["sequential, outputs"], KINDS["one_shot, mixed"]], ids=repr)
def test_both_ways_to_reach_a_block_give_the_same(update: Refit, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks run one at a time, and a model run from its beginning up to each block."""
    dense = tiny_random()
    by_blocks = values(updated(dense, update).module)
    monkeypatch.setattr(Blocks, "check", refuse)
    as_a_whole = values(updated(dense, update).module)
    assert same(by_blocks, as_a_whole)


def refuse(*arguments: object) -> None:
    raise ModelError("The blocks cannot be run one at a time.")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"mode": "twice"}, r"^mode must be one of one_shot, sequential, got 'twice'"),
        ({"inputs": "dense"}, r"^inputs must be one of"),
        ({"target": "outputs"}, r"^target must be one of"),
        ({"gram": "all"}, r"^gram must be one of group, layer"),
        ({"ridge": -1.0}, r"^ridge must be"),
        ({"below": 0.0}, r"^below must be above 0 and at most 1.*got 0\.0"),
        ({"below": 1.5}, r"^below must be"),
        ({"target": "mixed", "beta": 1.5}, r"^beta must be between 0 and 1"),
        ({"beta": 0.5}, r"^beta is only read with target=mixed"),
        ({"mode": "sequential"}, r"^mode=sequential must have gram=layer"),
        ({"mode": "sequential", "gram": "layer", "inputs": "original"}, r"^mode must be one_shot with inputs=original"),
        ({"target": "mixed", "inputs": "original"}, r"^target=mixed needs inputs=compressed"),
    ],
    ids=repr,
)
def test_settings_that_make_no_sense(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(OFFICIAL, **wrong)


@pytest.mark.parametrize(
    "settings",
    [
        ("experiment=basis_sharing_refit", "retain_ratio=0.6"),
        ("experiment=svd", "retain_ratio=0.5", "update=refit", "update.mode=sequential", "update.gram=layer"),
    ],
    ids=["preset", "sequential"],
)
def test_a_run_records_what_the_refit_did(
    cli: Callable[..., Any], tiny: tuple[str, ...], tmp_path: Path, settings: tuple[str, ...]
) -> None:
    done = cli(*tiny, *settings, f"hydra.run.dir={tmp_path}/out")
    assert done.status == 0, done.err
    record = read_record(tmp_path / "out")
    assert record.update["loss_after"] < record.update["loss_before"]
    assert "refit: loss" in done.err and record.timings["update"] > 0
