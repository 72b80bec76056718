"""Experts that few calibration tokens are sent to, and none: average tokens of their layer make up for them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from bs_exp.cache import Cache
from bs_exp.calibration import walk
from bs_exp.calibration.group_statistics import calibrate
from bs_exp.calibration.rare_experts import filled_moments, lacking, mean_gram, mean_rows, wanted_tokens
from bs_exp.errors import CalibrationError
from bs_exp.importance.channel import ChannelImportance
from bs_exp.models.experts import unfused
from bs_exp.models.tiny import tiny_random
from bs_exp.pipeline import compress
from bs_exp.progress import Progress
from bs_exp.sharing.none import NoSharing, singles
from bs_exp.types import CalibrationData, ExpertPlace, InputMoments, LoadedModel, Statistic, TokenWindows, WeightMatrix
from bs_exp.whitening.diagonal import DiagonalWhitening
from bs_exp.whitening.fisher_rows import FisherRowsWhitening
from bs_exp.whitening.gram import GramWhitening
from bs_exp.whitening.two_sided import TwoSidedWhitening
from bs_exp.workspace import Workspace
from tests.support.recipes import RECIPE, RandomTokens

IDLE = 2


def starved() -> LoadedModel:
    """A model whose router of layer 0 never chooses expert 2."""
    dense = tiny_random("mixtral", layers=2)
    parameter = dense.module.get_parameter
    with torch.no_grad():
        # Channel 0 of the residual stream is 0.25 for every token, and the expert's row of the router reads it alone.
        parameter("model.embed_tokens.weight")[:, 0] = 0.25
        parameter("model.layers.0.self_attn.o_proj.weight")[0] = 0.0
        parameter("model.layers.0.post_attention_layernorm.weight")[0] = 1.0
        router = parameter("model.layers.0.mlp.gate.weight")
        router[:, 0] = 0.0
        router[IDLE, 0] = -1000.0
    return replace(dense, provenance={**dense.provenance, "fingerprint": "starved"})


def windows(count: int, length: int = 32) -> CalibrationData:
    ids = torch.randint(0, 256, (count, length), generator=torch.Generator().manual_seed(3))
    return CalibrationData(TokenWindows(ids, {"sha256": f"windows-{count}-{length}"}), batch_size=2)


def inputs_of_experts(model: LoadedModel, data: CalibrationData) -> dict[str, Tensor]:
    """What every expert's matrix reads, by module, straight from the model."""
    seen: dict[str, list[Tensor]] = {}
    routed = [m for m in model.architecture.matrices if m.expert is not None]
    handles = [
        model.module.get_submodule(m.module).register_forward_pre_hook(
            lambda module, given, name=m.module: seen.setdefault(name, []).append(given[0].detach().double())
        )
        for m in routed
    ]
    with torch.no_grad():
        for batch in data.batches:
            model.module(batch)
    for handle in handles:
        handle.remove()
    return {m.module: torch.cat(seen[m.module]) if m.module in seen else torch.zeros(0, m.d_in) for m in routed}


def workspace() -> Workspace:
    return Workspace(Cache(None), Progress(quiet=True))


def test_grams_of_rare_experts_have_average_tokens_besides_their_own() -> None:
    model, data = unfused(starved()), windows(1, 24)
    stats = calibrate(model, data, needs={Statistic.GRAM}, workspace=workspace())
    read = inputs_of_experts(model, data)
    checked = set()
    for group in singles(model.architecture):
        if not group.is_routed:
            continue
        matrix = model.architecture.by_position[group.matrix, group.layers[0]]
        own = read[matrix.module]
        experts = [m for m in model.architecture.of_type(group.matrix) if m.layer == matrix.layer]
        whole = torch.cat([read[m.module] for m in experts]).double()
        mean = whole.mT @ whole / len(whole)
        if group.matrix == "expert_down":
            mean = mean.trace() / len(mean) * torch.eye(len(mean), dtype=torch.float64)
        missing = max(0, 48 - len(own))
        found = stats.of(group, torch.device("cpu"))
        assert found.gram is not None
        torch.testing.assert_close(found.gram, own.double().mT @ own.double() + missing * mean, rtol=1e-9, atol=1e-9)
        assert found.tokens == len(own) + missing
        checked.add((len(own) == 0, missing == 0))
    assert (True, False) in checked and (False, False) in checked


def test_an_expert_with_enough_tokens_has_its_own_gram_to_the_bit() -> None:
    model, data = unfused(tiny_random("mixtral", layers=1)), windows(16)
    stats = calibrate(model, data, needs={Statistic.GRAM}, workspace=workspace())
    sites = stats.entries[Statistic.GRAM]
    counts = {m.expert: int(sites[m.input_site].tensor("tokens")) for m in model.architecture.of_type("expert_up")}
    assert sum(counts.values()) == 2 * data.windows.ids.numel() and min(counts.values()) >= 48
    read = inputs_of_experts(model, data)
    for matrix in model.architecture.of_type("expert_up"):
        group = next(g for g in singles(model.architecture) if g.matrix == "expert_up" and g.layers == (matrix.place,))
        own = read[matrix.module]
        assert len(own) == counts[matrix.expert]
        torch.testing.assert_close(stats.of(group, torch.device("cpu")).gram, own.mT @ own, rtol=1e-12, atol=1e-9)


def test_a_group_of_experts_has_the_sum_of_their_grams() -> None:
    model = unfused(starved())
    stats = calibrate(model, windows(1), needs={Statistic.GRAM, Statistic.OUTPUT_GRAM}, workspace=workspace())
    alone = [g for g in singles(model.architecture) if g.matrix == "expert_gate" and g.blocks == (0,)]
    whole = replace(alone[0], layers=tuple(g.layers[0] for g in alone))
    parts = [stats.of(group, torch.device("cpu")) for group in alone]
    found = stats.of(whole, torch.device("cpu"))
    assert found.gram is not None and found.output_grams is not None
    torch.testing.assert_close(found.gram, torch.stack([p.gram for p in parts if p.gram is not None]).sum(0))
    assert list(found.output_grams) == list(whole.layers) == [ExpertPlace(0, expert) for expert in range(4)]
    idle = found.output_grams[ExpertPlace(0, IDLE)]
    assert torch.equal(idle, idle[0, 0] * torch.eye(48, dtype=torch.float64)) and idle[0, 0] > 0.0


STRATEGIES: dict[str, dict[str, Any]] = {
    "gram": {"whitening": GramWhitening(ridge=0.0)},
    "two_sided": {"whitening": TwoSidedWhitening(ridge=1e-6, damping=1e-6, temper=1.0)},
    "fisher_rows": {"whitening": FisherRowsWhitening(ridge=1e-6)},
    "diagonal": {"whitening": DiagonalWhitening(alpha=0.5, size="mean", epsilon=1e-6)},
    "importance": {"importance": ChannelImportance(p=0.2, a=None, form="one_sided")},
}


@pytest.mark.parametrize("name", STRATEGIES)
def test_experts_without_tokens_are_named_before_anything_is_decomposed(name: str) -> None:
    progress = Progress(quiet=True)
    recipe = replace(RECIPE, sharing=NoSharing(), calibration=RandomTokens(count=4), **STRATEGIES[name])
    found = compress(starved(), recipe, Workspace(Cache(None), progress))
    assert found.plan.retain_ratio <= 0.6
    assert all(torch.isfinite(p).all() for p in found.module.parameters())
    named = [note for note in progress.notes if "no calibration token was sent" in note]
    assert len(named) == 1 and "to 1 of 8 experts (layer 0: 2)" in named[0]


def test_moments_and_rows_of_an_expert_without_tokens_are_those_of_its_layer() -> None:
    gate = WeightMatrix("expert_gate", 0, "expert_in.0", "a", 2, 3, expert=0)
    own = InputMoments(*(torch.zeros(2, dtype=torch.float64) for _ in range(3)))
    others = [
        (own, 0),
        (InputMoments(*(torch.tensor(v, dtype=torch.float64) for v in ([1.0, 2.0], [3.0, 4.0], [5.0, 6.0]))), 7),
        (InputMoments(*(torch.tensor(v, dtype=torch.float64) for v in ([3.0, 4.0], [1.0, 9.0], [7.0, 8.0]))), 7),
    ]
    found = filled_moments(own, others, gate, 0)
    assert [m.tolist() for m in (found.absolute, found.peak, found.fourth)] == [[2.0, 3.0], [3.0, 9.0], [6.0, 7.0]]
    down = replace(gate, matrix="expert_down")
    hidden = filled_moments(own, others, down, 0)
    assert hidden.absolute.tolist() == [2.5, 2.5] and hidden.peak.tolist() == [6.0, 6.0]
    assert filled_moments(own, others, gate, 3) is own
    assert mean_rows([torch.tensor([1.0, 2.0]), torch.tensor([3.0, 6.0])], gate).tolist() == [2.0, 4.0]
    assert mean_rows([torch.tensor([1.0, 2.0]), torch.tensor([3.0, 6.0])], down).tolist() == [3.0, 3.0]


def test_hidden_channels_of_experts_are_not_compared() -> None:
    """The multiple of the identity is the mean over all orders of the channels, but for a constant off the diagonal."""
    gate = WeightMatrix("expert_gate", 0, "expert_in.0", "a", 3, 3, expert=0)
    gram = torch.diag(torch.tensor([1.0, 2.0, 6.0], dtype=torch.float64))
    gram[0, 1] = gram[1, 0] = 1.0
    assert torch.equal(mean_gram([(gram, 2)], gate), gram / 2)
    assert torch.equal(mean_gram([(gram, 2)], gate, outputs=True), 1.5 * torch.eye(3, dtype=torch.float64))
    down = replace(gate, matrix="expert_down")
    assert torch.equal(mean_gram([(gram, 2)], down), 1.5 * torch.eye(3, dtype=torch.float64))
    assert torch.equal(mean_gram([(gram, 2)], down, outputs=True), gram / 2)


def test_what_no_expert_read_is_an_error_and_others_lack_nothing() -> None:
    gate = WeightMatrix("expert_gate", 5, "expert_in.0", "blocks.5.gate", 3, 4, expert=0)
    assert wanted_tokens(gate) == 4 and lacking(gate, 1) == 3 and lacking(gate, 9) == 0
    assert lacking(replace(gate, expert=None), 0) == 0
    with pytest.raises(CalibrationError, match=r"any expert of layer 5 \(blocks.5.gate\).*experts: dense"):
        mean_gram([(torch.zeros(3, 3), 0)], gate)


@pytest.mark.parametrize("backward", [False, True])
def test_block_by_block_the_statistics_of_experts_are_the_same(backward: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = unfused(starved()), windows(4)
    needs = {Statistic.GRAM, Statistic.OUTPUT_GRAM} if backward else {Statistic.GRAM, Statistic.INPUT_MOMENTS}
    whole = calibrate(model, data, needs=needs, workspace=workspace())
    monkeypatch.setattr(walk, "LARGE", 1)
    blocks = calibrate(model, data, needs=needs, workspace=workspace())
    for statistic, entries in whole.entries.items():
        for name, entry in entries.items():
            other = blocks.entries[statistic][name]
            for tensor in ("gram",) if statistic is not Statistic.INPUT_MOMENTS else ("absolute", "peak", "fourth"):
                assert torch.equal(entry.tensor(tensor), other.tensor(tensor)), (statistic, name)
