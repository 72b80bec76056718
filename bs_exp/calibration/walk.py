"""How a model runs over the calibration windows: as a whole, or block by block; forward, or forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from bs_exp.calibration.drawn_labels import MOST_PROBABLE, drawn_loss
from bs_exp.calibration.probes import probe_losses
from bs_exp.calibration.statistics import Loss
from bs_exp.errors import ModelError
from bs_exp.models.architecture import trunks
from bs_exp.models.block_stream import BlockStream, Waiting
from bs_exp.models.blocks import Blocks
from bs_exp.models.hooks import Hooks
from bs_exp.models.kept_states import KeptStates, kept_states
from bs_exp.models.mapped import release
from bs_exp.models.model_inputs import Examples, Feeder, Inputs, feeder, hidden_states, unlabelled
from bs_exp.models.offload import check_whole_backward, is_offloaded
from bs_exp.models.outputs import logits_of
from bs_exp.progress import Progress
from bs_exp.types import CalibrationData, LoadedModel

# From so many parameters on: the activations of one window of 2048 tokens then take several GB, those of a batch tens.
LARGE = 1_000_000_000
# Batches that go backward together, block by block. With one, the inputs of its blocks stay on the model's device. With
# more, weights of a block are read once for all of them, and the inputs of their blocks wait on the CPU.
WAVE = 1
_LABELS: Mapping[Loss | None, str] = {
    None: "calibrating",
    "sum": "gradients",
    "mean": "sensitivity",
    "sampled": "gradients of drawn labels",
    "top_k": "gradients of drawn labels",
    "probes": "gradients of probes",
}


class Watch(Protocol):
    """What is attached to the model while it runs.

    `loss` is that whose gradients are watched; None runs the model forward alone, without logits; "probes" computes no
    logits either. `weights` are the
    parameters that get gradients, no other does; if there are none, backward runs through activations alone.
    """

    @property
    def loss(self) -> Loss | None: ...

    @property
    def weights(self) -> Collection[Tensor]: ...

    def attach(self, hooks: Hooks, layers: Sequence[int]) -> None:
        """Attaches what watches these layers; may be asked for a layer again once `hooks` are gone."""

    def next_batch(self, shapes: Sequence[torch.Size]) -> None:
        """Told in front of every batch with a loss: the windows and positions that it may consist of."""


def is_large(model: LoadedModel) -> bool:
    """Whether its weights wait elsewhere, or all activations of a batch take more memory than a third pass is worth."""
    return is_offloaded(model.module) or sum(parameter.numel() for parameter in model.module.parameters()) >= LARGE


def states_on_disk(model: LoadedModel, windows: int, *, backward: bool) -> int:
    """Bytes that the hidden states of so many tokens of windows take where they wait, if they wait on disk at all.

    Forward they are there twice; backward through an offloaded model, in front of every block and behind the last.
    """
    width = getattr(model.module.config, "hidden_size", None)
    if not is_large(model) or not isinstance(width, int):
        return 0
    times = len(model.architecture.blocks) + 1 if backward else 2
    return times * windows * width * model.module.dtype.itemsize


def check_room(model: LoadedModel, data: CalibrationData, folder: Path | None, *, backward: bool) -> None:
    """CacheError if the hidden states of a walk are to wait on a disk that has too little space for them."""
    if total := states_on_disk(model, data.windows.ids.numel(), backward=backward):
        Waiting(data.activations, folder).fixed(total)


def check_block_walk(model: LoadedModel, data: CalibrationData, remedy: str) -> None:
    """ModelError, with the remedy, if the blocks of the model cannot be run one at a time on the windows."""
    reader = feeder(model, data.windows.feeding)
    first, *second = (reader.inputs(ids.to(model.device)) for ids in data.windows.ids.split(1)[:2])
    try:
        Blocks(model).check(first, second[0] if second else first)
    except ModelError as error:
        raise ModelError(f"{error} {remedy}") from error


def walk(
    model: LoadedModel,
    data: CalibrationData,
    watch: Watch,
    *,
    progress: Progress,
    folder: Path | None = None,
    layers: Collection[int] | None = None,
    key: str | None = None,
) -> Iterator[Sequence[int]]:
    """Runs the model over all windows with `watch` attached; yields layers as soon as all windows went through them.

    A model that is not large runs as a whole, which is fastest, and yields all layers at the end. A large one runs
    block by block. Forward, all windows go through one block before the next one runs, and each layer is yielded in
    turn. Backward, `WAVE` batches at a time go forward, then from the last block to the first, where each block is
    computed again from its stored input. All batches of an offloaded model go backward together, so that its weights
    are read once, and each layer is yielded in turn, from the last one; hidden states wait as `data.activations` says,
    on disk in `folder`. A large model whose blocks cannot be run alone runs as a whole and a note says so; its blocks
    are computed again in the backward pass, too. Only `layers` are watched and yielded (None: all). With a
    `key`, a hash of model and data, hidden states that wait on disk are kept there, and a forward walk that was
    interrupted goes on at its block. All ways give the
    same tensors in the same order to what is attached, on the CPU bit for bit. Hooks, `requires_grad` flags and
    gradients are as before afterwards, whatever happened.
    """
    wanted = sorted(range(len(model.architecture.blocks)) if layers is None else layers)
    waiting = Waiting(data.activations, folder)
    run = _Run(model, data, watch, feeder(model, data.windows.feeding), progress, waiting, wanted, key)
    large = is_large(model)
    blocks = run.blocks() if large else None
    if watch.loss is None and blocks is not None:
        for layer in run.forward(blocks):
            yield (layer,)
        return
    if watch.loss is None:
        run.whole_forward()
    elif blocks is None:
        check_whole_backward(model.module, model.device, "A statistic of loss gradients")
        run.whole_backward(recompute=large)
    elif is_offloaded(model.module):
        yield from run.backward_at_once(blocks)
        return
    else:
        run.backward(blocks)
    yield wanted


class _Run:
    """One pass of the model over the windows, in one of four ways."""

    def __init__(
        self,
        model: LoadedModel,
        data: CalibrationData,
        watch: Watch,
        reader: Feeder,
        progress: Progress,
        waiting: Waiting,
        layers: Sequence[int],
        key: str | None,
    ) -> None:
        self._model = model
        self._data = data
        self._watch = watch
        self._reader = reader
        self._progress = progress
        self._waiting = waiting
        self._layers = layers
        self._key = key

    def blocks(self) -> Blocks | None:
        """The blocks of the model, each on its own; None if they cannot be run so."""
        blocks = Blocks(self._model)
        first, *second = self._inputs(self._data.windows.ids[:2].split(1))
        try:
            blocks.check(first, second[0] if second else first)
        except ModelError as error:
            note = f"{error} It runs as a whole."
            if note not in self._progress.notes:  # said once, whatever else is gathered
                self._progress.note(note)
            return None
        return blocks

    def whole_forward(self) -> None:
        """The model's own forward pass, without its head."""
        with Hooks() as hooks:
            self._watch.attach(hooks, self._layers)
            for inputs in self._inputs(self._tracked()):
                with torch.inference_mode():
                    hidden_states(self._model.module, inputs)

    def whole_backward(self, *, recompute: bool) -> None:
        """Backward through the whole graph of one batch; `recompute` keeps only the inputs of the blocks in memory."""
        module, paths = self._model.module, self._model.architecture.blocks
        with Hooks() as hooks:
            hooks.only_gradients_of(module, self._watch.weights)
            self._watch.attach(hooks, self._layers)
            if not self._watch.weights:
                # The embeddings' output starts the graph. An encoder and a decoder look up apart, if in one table.
                for embeddings in {table for part in (module, *trunks(module)) for table in _embeddings(part)}:
                    hooks.on_call(embeddings, lambda arguments, keywords, output: output.requires_grad_())
            for block in map(module.get_submodule, paths if recompute else ()):
                # Hooks inside see the first computation and the second; gradients reach the tensors of the first.
                again = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
                hooks.run_instead(block, again)
            for ids in self._tracked():
                examples = self._examples(ids)
                with torch.enable_grad():
                    [target] = self._targets([examples])
                    outputs = self._outputs(examples.inputs)
                    for loss, more in self._losses(examples, outputs, target):
                        loss.backward(retain_graph=more)

    def forward(self, blocks: Blocks) -> Iterator[int]:
        """All batches through one block after the other; yields the layer when its hooks are gone."""
        with self._kept_states(blocks) as kept:
            batches, first = self._inputs(self._data.batches), min(self._layers, default=0)
            stream = BlockStream(blocks, batches, self._waiting, kept, latest=first)
            yield from self._forward(blocks, stream)

    def _forward(self, blocks: Blocks, stream: BlockStream) -> Iterator[int]:
        layers = range(stream.layer, max(self._layers, default=-1) + 1)
        for layer in self._progress.track(layers, label=self._label, total=len(layers)):
            with Hooks() as hooks, blocks.resident(layer):
                if layer in self._layers:
                    self._watch.attach(hooks, [layer])
                for batch in range(len(stream)):
                    with torch.inference_mode():
                        stream.advance(batch, stream.run(layer, batch))
            # Statistics of the layer reach the cache before the states that it leaves behind are kept.
            if layer in self._layers:
                yield layer
            stream.next_layer()

    @contextmanager
    def _kept_states(self, blocks: Blocks) -> Iterator[KeptStates | None]:
        """Where the states of an interrupted walk are kept, if they wait on disk."""
        folder = self._waiting.folder
        if self._key is None or folder is None or self._waiting.where == "memory":
            yield None
            return
        first = blocks.embedded(next(self._inputs(self._data.batches)))
        total = first.nbytes // len(first) * len(self._data.windows.ids)
        if self._waiting.fixed(2 * total).where != "disk":
            yield None
            return
        with kept_states(folder / "hidden_states", self._key) as kept:
            yield kept

    def backward(self, blocks: Blocks) -> None:
        """Forward and backward block by block, one wave of batches after the other."""
        with Hooks() as hooks:
            hooks.only_gradients_of(self._model.module, self._watch.weights)
            batches = self._data.batches
            waves = [batches[start : start + WAVE] for start in range(0, len(batches), WAVE)]
            for wave in self._progress.track(waves, label=self._label, total=len(waves)):
                for _ in self._wave(blocks, wave, self._keep_on(wave)):
                    pass

    def backward_at_once(self, blocks: Blocks) -> Iterator[Sequence[int]]:
        """All batches forward and backward through one block after the other; yields layers from the last one."""
        batches = self._data.batches
        with Hooks() as hooks:
            hooks.only_gradients_of(self._model.module, self._watch.weights)
            layers = self._wave(blocks, batches, None)
            for layer in self._progress.track(layers, label=self._label, total=len(self._layers)):
                yield (layer,)

    def _keep_on(self, batches: Sequence[Tensor]) -> Callable[[Tensor], Tensor]:
        device = self._model.device if len(batches) == 1 else torch.device("cpu")
        return lambda states: states.to(device)

    def _wave(
        self, blocks: Blocks, batches: Sequence[Tensor], keep: Callable[[Tensor], Tensor] | None
    ) -> Iterator[int]:
        """Stores the inputs of all blocks, takes the gradients behind the last one, and goes back block by block.

        States are stored by `keep`; None: as the walk's states wait. Yields watched layers once their hooks are gone.
        """
        examples = [self._examples(ids) for ids in batches]
        with torch.no_grad():
            embedded = [blocks.embedded(each.inputs) for each in examples]
            if keep is None:
                total = (len(blocks) + 1) * sum(states.nbytes for states in embedded)
                keep = self._waiting.fixed(total).put
            states = [[keep(each) for each in embedded]]
            del embedded
            for layer in range(len(blocks)):
                with blocks.resident(layer):
                    states.append([keep(blocks.run(layer, before)) for before in states[-1]])
                release(states[-2])
        gradients = []
        for each, last, target in zip(examples, states.pop(), self._targets(examples), strict=True):
            with blocks.resident_head(), torch.enable_grad():
                last = _leaf(last, self._model.device)
                outputs = blocks.hidden(each.inputs, last) if self._probes else blocks.logits(each.inputs, last)
                gradients.append([_back(last, *pass_) for pass_ in self._losses(each, outputs, target)])
        for layer in reversed(range(min(self._layers, default=len(blocks)), len(blocks))):
            with Hooks() as hooks, blocks.resident(layer):
                if layer in self._layers:
                    self._watch.attach(hooks, [layer])
                for i, before in enumerate(states.pop()):
                    self._watch.next_batch(examples[i].shapes)
                    with torch.enable_grad():
                        before = _leaf(before, self._model.device)
                        after, times = blocks.run(layer, before), len(gradients[i])
                        gradients[i] = [
                            _back(before, after, number < times, gradient)
                            for number, gradient in enumerate(gradients[i], start=1)
                        ]
            if layer in self._layers:
                yield layer

    @property
    def _label(self) -> str:
        return _LABELS[self._watch.loss]

    def _tracked(self) -> Iterator[Tensor]:
        batches = self._data.batches
        return self._progress.track(batches, label=self._label, total=len(batches))

    def _inputs(self, batches: Iterable[Tensor]) -> Iterator[Inputs]:
        return (self._reader.inputs(ids.to(self._model.device)) for ids in batches)

    def _examples(self, ids: Tensor) -> Examples:
        ids = ids.to(self._model.device)
        examples = unlabelled(self._reader, ids) if self._probes else self._reader.examples(ids)
        self._watch.next_batch(examples.shapes)
        return examples

    @property
    def _probes(self) -> bool:
        """Whether last hidden states are probed; else there is a loss of logits."""
        return self._watch.loss == "probes"

    def _outputs(self, inputs: Inputs) -> Tensor:
        module = self._model.module
        return hidden_states(module, inputs) if self._probes else module(**inputs).logits

    def _targets(self, examples: Sequence[Examples]) -> Iterator[Tensor | None]:
        """The logits that the loss compares with, if it is a divergence."""
        towards = self._data.towards
        if towards is None or self._watch.loss != "sum":
            yield from (None for _ in examples)
            return
        yield from logits_of(towards, [each.inputs for each in examples])

    def _losses(self, examples: Examples, outputs: Tensor, target: Tensor | None) -> Iterator[tuple[Tensor, bool]]:
        """What goes backward, and whether the same graph is gone through again after it."""
        loss = self._watch.loss
        assert loss is not None
        match loss:
            case "probes":
                probes = self._data.probes
                for number, each in enumerate(probe_losses(examples, outputs, self._model, probes), start=1):
                    yield each, number < probes.count
            case "sampled" | "top_k":
                yield drawn_loss(examples, outputs, among=MOST_PROBABLE if loss == "top_k" else None), False
            case "sum" if target is not None:
                yield examples.divergence(outputs, target), False
            case _:
                yield examples.loss(outputs, reduction=loss), False


def _leaf(states: Tensor, device: torch.device) -> Tensor:
    return states.detach().to(device).requires_grad_()


def _back(states: Tensor, output: Tensor, again: bool, gradient: Tensor | None = None) -> Tensor:
    """The gradient of the states through a graph, which is kept if it is gone through `again`."""
    torch.autograd.backward(output, gradient, retain_graph=again)
    found = states.grad
    assert found is not None
    states.grad = None
    return found


def _embeddings(part: nn.Module) -> list[nn.Module]:
    """The tables in which a part looks its inputs up; all that it holds, if it is no model that names them."""
    if isinstance(part, PreTrainedModel):
        return [part.get_input_embeddings()]
    return [table for table in part.modules() if isinstance(table, nn.Embedding)]
