"""What a statistic is: a class that says where it watches the model, takes tensors there, and gives tensors by name.

The classes are in `activations` and `gradients`, their table in `gather`: a new statistic is a class and a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar, Literal, Protocol, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from bs_exp.types import Architecture, WeightMatrix

Loss: TypeAlias = Literal["sum", "mean", "sampled", "top_k", "probes"]
"""The model's own loss on a batch: summed over its predicted tokens, or averaged; or one of drawn labels, summed
(`drawn_loss`); or random sums of outputs, which are no loss but have gradients too (`probe_losses`)."""


class Place(StrEnum):
    """Where a statistic watches; it has one accumulator for every subject there."""

    INPUT = "input"  # what an input site reads; the subject is the site
    OUTPUT_GRADIENT = "output_gradient"  # loss gradient at the output of a matrix; the subject is its module
    WEIGHT_GRADIENT = "weight_gradient"  # loss gradients of the targeted weights of a block; the subject is the block
    BLOCK_OUTPUT = "block_output"  # hidden states behind a block; the subject is the block


@dataclass(frozen=True)
class Subject:
    """What an accumulator is about: an input site, a module or a block (then its name is the layer), its layer, and
    its targeted matrices."""

    name: str
    layer: int
    matrices: tuple[WeightMatrix, ...]


@dataclass(frozen=True, eq=False)
class Seen:
    """What came by at a place: inputs, hidden states or a gradient, in the dtype and on the device of the model.

    With a gradient at the output of a matrix come the windows and positions of its `batch`, and the `inputs` of the
    matrix, if an accumulator there reads them; with a gradient of a weight, the `weight`.
    """

    values: Tensor
    batch: torch.Size | None = None
    inputs: Tensor | None = None
    weight: Tensor | None = None

    @property
    def rows(self) -> Float[Tensor, "tokens channels"]:
        """The values, in fp32."""
        return self.values.reshape(-1, self.values.shape[-1]).float()

    @property
    def exact_rows(self) -> Float[Tensor, "tokens channels"]:
        """The values in fp64 on a CPU, in fp32 elsewhere, where fp64 is slow."""
        return self.rows.double() if self.values.device.type == "cpu" else self.rows


def summed(total: Tensor, products: Tensor) -> Tensor:
    """`total + products` in fp64, in place where it can be.

    On a cuda device it stays there, as a Gram takes longer to the host than to make. Elsewhere it is on the CPU, since
    some devices have no fp64.
    """
    if products.device.type == "cuda":
        return total.to(products.device).add_(products)
    return total.add_(products.double().cpu())


class Accumulator(Protocol):
    """One statistic of one subject: products in fp32, `summed` in fp64, unless it says otherwise.

    `loss` is that whose gradients it takes, None if it takes none. `reads_inputs`: at a matrix's output, whether it
    needs the matrix's inputs beside the gradients, which costs the memory to keep them.
    """

    place: ClassVar[Place]
    loss: ClassVar[Loss | None]
    reads_inputs: ClassVar[bool]

    def __init__(self, subject: Subject, *, batches: int) -> None:
        """`batches` is how many there will be, in all processes together."""

    def add(self, seen: Seen) -> None:
        """Takes what was seen once."""

    def combine(self) -> None:
        """Adds what the other processes of the run saw (`bs_exp.processes`); called once, after all was seen."""

    def tensors(self) -> dict[str, Tensor]:
        """What was found, by name; not finite where anything seen was not."""


def subjects(architecture: Architecture, place: Place) -> tuple[Subject, ...]:
    """All subjects at a place, by layer."""
    match place:
        case Place.INPUT:
            sites: dict[str, list[WeightMatrix]] = {}
            for matrix in architecture.matrices:
                sites.setdefault(matrix.input_site, []).append(matrix)
            return tuple(Subject(name, found[0].layer, tuple(found)) for name, found in sites.items())
        case Place.OUTPUT_GRADIENT:
            return tuple(Subject(matrix.module, matrix.layer, (matrix,)) for matrix in architecture.matrices)
        case Place.WEIGHT_GRADIENT | Place.BLOCK_OUTPUT:
            blocks = range(len(architecture.blocks))
            return tuple(Subject(str(layer), layer, _of_layer(architecture, layer)) for layer in blocks)


def is_finite(tensors: Mapping[str, Tensor]) -> bool:
    """Whether sums hold no NaN and nothing infinite. What is infinite anywhere in a Gram is so on its diagonal."""
    looked_at = [tensor.diagonal() if name == "gram" else tensor for name, tensor in tensors.items()]
    return all(bool(tensor.isfinite().all()) for tensor in looked_at)


def _of_layer(architecture: Architecture, layer: int) -> tuple[WeightMatrix, ...]:
    return tuple(matrix for matrix in architecture.matrices if matrix.layer == layer)
