"""Hidden states on their way through the blocks of a model, and where they wait: in memory or in files."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from torch import Tensor

from bs_exp.errors import CacheError
from bs_exp.models.blocks import Blocks
from bs_exp.models.kept_states import KeptStates
from bs_exp.models.mapped import release, write_tensors
from bs_exp.models.model_inputs import Inputs
from bs_exp.types import Activations

# Of the memory that is free, `auto` takes no more than this share for hidden states.
_SHARE = 0.25


@dataclass(frozen=True)
class Waiting:
    """Where hidden states wait: `memory`, `disk` (a file without a name in `folder`), or `auto`: on disk if they would
    take more than a quarter of the free memory."""

    where: Activations = "auto"
    folder: Path | None = None

    def fixed(self, nbytes: int) -> Waiting:
        """Memory or disk, for so many bytes. CacheError if the disk has too little space for them."""
        if not self.takes_disk(nbytes):
            return Waiting("memory")
        folder = Path(tempfile.gettempdir()) if self.folder is None else self.folder
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
        if nbytes > free:
            raise CacheError(
                f"The hidden states of the calibration windows take {nbytes / 1e9:.3g} GB, but {folder} has "
                f"{free / 1e9:.3g} GB free. Free some space, set cache.dir to a larger disk, lower "
                "calibration.num_sequences or sequence_length, or set calibration.activations=memory."
            )
        return Waiting("disk", folder)

    def takes_disk(self, nbytes: int) -> bool:
        """Whether so many bytes would wait on disk."""
        if self.where == "auto":
            return self.folder is not None and nbytes > _SHARE * psutil.virtual_memory().available
        return self.where == "disk"

    def put(self, states: Tensor) -> Tensor:
        """The states on the CPU, in memory or in a file."""
        if self.where != "disk":
            return states.cpu()
        try:
            [stored] = write_tensors([states], self.folder)
        except OSError as error:
            raise _unwritable(self.folder, error) from error
        return stored


def _unwritable(folder: Path | None, error: OSError) -> CacheError:
    return CacheError(
        f"Cannot write hidden states into {folder}: {error}. Free some space, or set calibration.activations=memory."
    )


class BlockStream:
    """The hidden states of all batches in front of a block, carried on by one block after the other.

    They wait as `waiting` says, in the model's dtype. Those of a walk that was interrupted are taken up from `kept`,
    in front of `layer`, which is `latest` or an earlier one, and what is in front of further layers is kept there.
    """

    def __init__(
        self,
        blocks: Blocks,
        batches: Iterable[Inputs],
        waiting: Waiting | None = None,
        kept: KeptStates | None = None,
        *,
        latest: int = 0,
    ) -> None:
        self._blocks = blocks
        self._kept = kept
        self._states: list[Tensor] = []
        self.layer = 0
        chosen = waiting or Waiting("memory")
        inputs = list(batches)
        for each in inputs:
            states = blocks.embedded(each)
            if not self._states:
                chosen = chosen.fixed(len(inputs) * states.nbytes)
            self._states.append(chosen.put(states))
        self._waiting = chosen
        if kept is not None and (found := kept.found(self._states)) is not None and found[0] <= latest:
            self.layer, self._states = found

    def __len__(self) -> int:
        """Number of batches."""
        return len(self._states)

    def resident(self, layer: int) -> AbstractContextManager[None]:
        """The weights of a block are on the model's device meanwhile."""
        return self._blocks.resident(layer)

    def run(self, layer: int, batch: int) -> Tensor:
        """What a block makes of the states of a batch in front of it, on the model's device."""
        with torch.no_grad():
            return self._blocks.run(layer, self._states[batch])

    def advance(self, batch: int, states: Tensor) -> None:
        """Puts a batch in front of the next block."""
        release([self._states[batch]])
        if self._kept is None:
            self._states[batch] = self._waiting.put(states)
            return
        try:
            self._states[batch] = self._kept.put(self.layer + 1, batch, states)
        except OSError as error:
            raise _unwritable(self._kept.folder, error) from error

    def pass_on(self, layer: int) -> None:
        """Puts all batches in front of the next block, as this one, which may have changed, carries them there."""
        with self.resident(layer):
            for batch in range(len(self)):
                self.advance(batch, self.run(layer, batch))

    def next_layer(self) -> None:
        """Told when all batches are in front of the next block."""
        self.layer += 1
        if self._kept is not None:
            self._kept.complete(self.layer, len(self))

    def states(self, batch: int) -> Tensor:
        """The states of a batch, on the CPU."""
        return self._states[batch]


def through_all(blocks: Blocks, batches: Sequence[Inputs], waiting: Waiting | None = None) -> BlockStream:
    """A stream behind the last block: all batches went through one block before the next one ran."""
    stream = BlockStream(blocks, batches, waiting)
    for layer in range(len(blocks)):
        with blocks.resident(layer):
            for batch in range(len(stream)):
                with torch.inference_mode():
                    stream.advance(batch, stream.run(layer, batch))
    return stream
