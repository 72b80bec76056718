"""Large models compute their blocks twice and keep less: the same statistics, and nothing left behind."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from bs_exp.calibration import checkpointing
from bs_exp.calibration.checkpointing import block_paths, recomputed_blocks
from bs_exp.calibration.gradients import gather_gradients
from bs_exp.calibration.profile import gather_sensitivity
from bs_exp.models.tiny import tiny_random
from bs_exp.progress import Progress
from bs_exp.types import CalibrationData, Statistic, TokenWindows

WINDOWS = TokenWindows(
    ids=torch.randint(0, 256, (4, 24), generator=torch.Generator().manual_seed(0)), provenance={"sha256": "x"}
)
BOTH = frozenset({Statistic.OUTPUT_GRAM, Statistic.WEIGHT_GRADIENT})


@pytest.fixture
def everything_is_large(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    monkeypatch.setattr(checkpointing, "LARGE", 0)
    yield monkeypatch


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "t5", "bert"])
def test_the_same_statistics_bit_for_bit(family: str, everything_is_large: pytest.MonkeyPatch) -> None:
    model = tiny_random(family)

    def statistics() -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        found = gather_gradients(model, CalibrationData(WINDOWS, 2), BOTH, progress=Progress(quiet=True))
        flat = {f"{s}/{m}/{k}": t for s, by in found.items() for m, ts in by.items() for k, t in ts.items()}
        return flat, gather_sensitivity(model, CalibrationData(WINDOWS, 2), progress=Progress(quiet=True))

    recomputed, sensitivity = statistics()
    everything_is_large.undo()
    kept, expected = statistics()
    assert recomputed.keys() == kept.keys()
    assert all(torch.equal(recomputed[name], kept[name]) for name in kept)
    assert torch.equal(sensitivity, expected)


def test_activations_are_not_kept() -> None:
    """Counts the bytes that autograd saves in the forward pass."""
    model = tiny_random("llama")
    saved = 0

    def count(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal saved
        saved += tensor.numel() * tensor.element_size()
        return tensor

    def forward() -> int:
        nonlocal saved
        saved = 0
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            model.module(WINDOWS.ids).logits.sum()
        return saved

    everything = forward()
    with recomputed_blocks(model):
        assert forward() < 0.5 * everything
    assert forward() == everything
    assert all("forward" not in module.__dict__ for module in model.module.modules())


@pytest.mark.parametrize(("family", "first"), [("llama", "model.layers.0"), ("gpt2", "transformer.h.0")])
def test_blocks_hold_all_matrices_of_a_layer(family: str, first: str) -> None:
    architecture = tiny_random(family).architecture
    paths = block_paths(architecture)
    assert len(paths) == architecture.num_layers
    assert paths[0] == first
    assert all(m.module.startswith(f"{paths[m.layer]}.") for m in architecture.matrices)
