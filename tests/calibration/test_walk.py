"""Block by block or as a whole: the same statistics bit for bit, in less memory, and nothing left behind."""

from __future__ import annotations

import weakref
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from bs_exp.calibration import walk
from bs_exp.calibration.gather import ACCUMULATORS, gather
from bs_exp.models.block_stream import BlockStream
from bs_exp.models.blocks import Blocks, recorded
from bs_exp.models.model_inputs import feeder, hidden_states
from bs_exp.models.tiny import ENCODER_DECODERS, ENCODERS, FAMILIES, tiny_random
from bs_exp.progress import Progress
from bs_exp.types import CalibrationData, LoadedModel, Probes, Statistic, TokenWindows
from tests.support.gathered import gathered

WINDOWS = TokenWindows(
    ids=torch.randint(0, 256, (5, 24), generator=torch.Generator().manual_seed(0)), provenance={"sha256": "x"}
)
DATA = CalibrationData(WINDOWS, 2, probes=Probes(count=2))  # the last batch is smaller
ALL = tuple(ACCUMULATORS)


@pytest.fixture
def everything_is_large(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    monkeypatch.setattr(walk, "LARGE", 0)
    yield monkeypatch


def statistics(model: LoadedModel) -> dict[str, Tensor]:
    found = gathered(model, DATA, *ALL)
    return {f"{s}/{name}/{k}": t for s, by in found.items() for name, ts in by.items() for k, t in ts.items()}


@pytest.mark.parametrize("wave", [1, 2])
@pytest.mark.parametrize("family", (*FAMILIES, *ENCODERS, *ENCODER_DECODERS))
def test_the_same_statistics_bit_for_bit(family: str, wave: int, everything_is_large: pytest.MonkeyPatch) -> None:
    """Whether a model is large or not, and however many of its batches go backward together."""
    everything_is_large.setattr(walk, "WAVE", wave)
    model = tiny_random(family)
    by_blocks = statistics(model)
    everything_is_large.undo()
    as_a_whole = statistics(model)
    assert by_blocks.keys() == as_a_whole.keys()
    assert all(torch.equal(by_blocks[name], as_a_whole[name]) for name in as_a_whole)


@pytest.mark.parametrize("family", (*FAMILIES, *ENCODERS, *ENCODER_DECODERS))
def test_all_families_walk_but_encoder_decoders(family: str, everything_is_large: pytest.MonkeyPatch) -> None:
    """A note says who does not; the others give the statistics of a layer before the next layer runs."""
    model, progress, order = tiny_random(family), Progress(quiet=True), []
    for layer, path in enumerate(model.architecture.blocks):
        block = model.module.get_submodule(path)
        block.register_forward_hook(lambda module, arguments, output, layer=layer: order.append(layer))
    found = gather(model, DATA, {Statistic.BLOCK_OUTPUTS}, progress=progress)
    first = next(found)
    after_first = [layer for layer in order[-3:]]
    assert first[1] == "0"
    assert [name for _, name, _ in found] == [str(layer) for layer in range(1, len(model.architecture.blocks))]
    if family in ENCODER_DECODERS:
        [note] = progress.notes
        assert "cannot be run one at a time" in note and note.endswith("It runs as a whole.")
    else:
        assert progress.notes == []
        assert after_first == [0, 0, 0]  # three batches
        assert order[-9:] == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def peak_of_saved_activations(model: LoadedModel, statistic: Statistic) -> int:
    """The most bytes that autograd holds at once for backward passes."""
    held = peak = 0

    class Saved:
        def __init__(self, tensor: Tensor) -> None:
            self.tensor = tensor

    def release(size: int) -> None:
        nonlocal held
        held -= size

    def pack(tensor: Tensor) -> Saved:
        nonlocal held, peak
        saved, size = Saved(tensor), tensor.numel() * tensor.element_size()
        held += size
        peak = max(peak, held)
        weakref.finalize(saved, release, size)
        return saved

    with saved_tensors_hooks(pack, lambda saved: saved.tensor):
        gathered(model, DATA, statistic)
    return peak


@pytest.mark.parametrize("statistic", [Statistic.OUTPUT_GRAM, Statistic.SENSITIVITY])
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_activations_are_not_kept(family: str, statistic: Statistic, everything_is_large: pytest.MonkeyPatch) -> None:
    """Neither where blocks are walked (llama) nor where they are not."""
    model = tiny_random(family)
    recomputed = peak_of_saved_activations(model, statistic)
    everything_is_large.undo()
    assert 0 < recomputed < 0.5 * peak_of_saved_activations(model, statistic)


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("statistic", ALL)
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_nothing_is_left_behind(
    family: str, statistic: Statistic, large: bool, everything_is_large: pytest.MonkeyPatch
) -> None:
    """After the end, after an error on the way, and after a reader who stops early."""
    if not large:
        everything_is_large.undo()
    model = tiny_random(family)
    module = model.module
    embeddings = module.get_input_embeddings().weight
    embeddings.requires_grad_(False)
    embeddings.grad = kept = torch.ones_like(embeddings)

    def check() -> None:
        for part in module.modules():
            assert not part._forward_hooks and not part._forward_pre_hooks and "forward" not in part.__dict__
        for parameter in module.parameters():
            assert parameter.requires_grad is (parameter is not embeddings)
            assert parameter.grad is (kept if parameter is embeddings else None)
            assert not parameter._post_accumulate_grad_hooks and not parameter._backward_hooks
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()

    gathered(model, DATA, statistic)
    check()

    last = module.get_submodule(model.architecture.matrices[-1].module)
    own, calls = last.forward, 0

    def fail_later(*arguments: object) -> Tensor:
        nonlocal calls
        calls += 1
        if calls > 6:
            raise RuntimeError("stop")
        result: Tensor = own(*arguments)
        return result

    last.forward = fail_later
    progress = Progress(quiet=True)
    twice = CalibrationData(TokenWindows(ids=WINDOWS.ids.repeat(4, 1), provenance={}), 2)
    with pytest.raises(RuntimeError, match="stop"):
        list(gather(model, twice, {statistic}, progress=progress))
    del last.forward
    check()

    reader = gather(model, DATA, {statistic}, progress=progress)
    next(reader)
    check()
    reader.close()
    check()


@pytest.mark.parametrize("family", (*FAMILIES, *ENCODERS))
def test_a_stream_is_the_model(family: str) -> None:
    model = tiny_random(family)
    paths, feed, batches = model.architecture.blocks, feeder(model), WINDOWS.ids.split(2)
    stream = BlockStream(Blocks(model), map(feed.inputs, batches))
    assert len(stream) == 3
    for batch, ids in enumerate(batches):
        with torch.no_grad(), recorded(model.module, paths) as calls:
            hidden_states(model.module, feed.inputs(ids))
        for layer, path in enumerate(paths):
            states = stream.run(layer, batch)
            torch.testing.assert_close(states, calls[path].output, rtol=1e-4, atol=1e-5)
            stream.advance(batch, states)
