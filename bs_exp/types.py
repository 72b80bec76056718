"""Frozen data that one stage of the pipeline makes and the next ones read.

Convention (Basis Sharing, section 3): a weight is ``W[d_in, d_out]`` and acts as ``y = x @ W``; matrices of a group
are concatenated along ``d_out``; the basis acts first, ``y = (x @ basis) @ coefficients + bias``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, TypeAlias

from bs_exp.errors import RecordError

if TYPE_CHECKING:  # readers of records need the plan below, and should not wait for torch
    import torch
    from jaxtyping import Float, Int
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# What a matrix does in its block; `models/roles.yaml` says which names mean which.
MATRIX_TYPES = (
    "q",
    "k",
    "v",
    "qkv",
    "o",
    "gate",
    "up",
    "gate_up",
    "down",
    "q_a",
    "q_b",
    "kv_a",
    "kv_b",
    "shared_gate",
    "shared_up",
    "shared_down",
    "expert_gate",
    "expert_up",
    "expert_down",
    "cross_q",
    "cross_k",
    "cross_v",
    "cross_o",
)


class Task(StrEnum):
    """What a model was trained to do, which decides how token windows are fed to it."""

    CAUSAL_LM = "causal_lm"  # predicts the next token (Llama, GPT)
    MASKED_LM = "masked_lm"  # fills in masked tokens (BERT with its head)
    SEQ2SEQ_LM = "seq2seq_lm"  # an encoder reads a source, a decoder writes a target (T5, BART)
    ENCODER = "encoder"  # gives hidden states and no logits (BERT without its head)


class Statistic(StrEnum):
    """The statistics of calibration. A strategy lists those that it `needs`; no others are collected."""

    GRAM = "gram"  # X^T X, one per input site
    INPUT_MOMENTS = "input_moments"  # mean |x|, max |x| and mean x^4 by channel, one of each per input site
    OUTPUT_GRAM = "output_gram"  # g^T g with g = dLoss/dy at a matrix's output, one per matrix; costs a backward pass
    SAMPLED_OUTPUT_GRAM = "sampled_output_gram"  # the same with labels that the model draws from its own predictions
    TOP_K_OUTPUT_GRAM = "top_k_output_gram"  # the same with labels drawn among the most probable tokens alone
    PROBED_OUTPUT_GRAM = "probed_output_gram"  # the same with <output, v> for random v in place of a loss: no logits
    SENSITIVITY = "sensitivity"  # ||dLoss/dW||_F / ||W||_F, summed over each block's matrices; costs a backward pass
    BLOCK_OUTPUTS = "block_outputs"  # singular values of each block's outputs
    WEIGHT_GRADIENT = "weight_gradient"  # E[(dLoss/dW)^2] summed over each row, one per matrix; costs a backward pass
    LOSS_GRADIENT = "loss_gradient"  # dLoss/dW with its signs, one per matrix, as large as it; costs a backward pass


class ExpertPlace(int):
    """The place of an expert's matrix among those of its type, where others have the number of their layer.

    As a number it is `(layer + 1) * MOST_EXPERTS + expert`: so places sort by layer and then by expert, are above every
    number of a layer, and stand wherever a layer tells the members of a group apart. As text it is `layer.expert`.
    """

    MOST_EXPERTS: ClassVar[int] = 2**16

    layer: int
    expert: int

    def __new__(cls, layer: int, expert: int) -> Self:
        if layer < 0 or not 0 <= expert < cls.MOST_EXPERTS:
            raise ValueError(
                f"the layer of an expert must be at least 0 and its number below {cls.MOST_EXPERTS}, got {layer} and "
                f"{expert}."
            )
        place = super().__new__(cls, (layer + 1) * cls.MOST_EXPERTS + expert)
        place.layer, place.expert = layer, expert
        return place

    def __getnewargs__(self) -> tuple[int, int]:  # type: ignore[override]
        return self.layer, self.expert

    def __str__(self) -> str:
        return f"{self.layer}.{self.expert}"

    __repr__ = __str__


def block_of(place: int) -> int:
    """The number of the block in which a member of a group lies."""
    return place.layer if isinstance(place, ExpertPlace) else place


@dataclass(frozen=True)
class WeightMatrix:
    """One weight of the model: its matrix type, its layer, its input site, and the path of the module that stores it.

    Layers of a decoder are numbered after those of its encoder; `stack` is 0 for the encoder and 1 for the decoder.
    `expert` is the number of the expert whose matrix it is; None for others, of which a layer has one of each type.
    """

    matrix: str
    layer: int
    site: str
    module: str
    d_in: int
    d_out: int
    stack: int = 0
    expert: int | None = None

    @property
    def place(self) -> int:
        """What tells it from the others of its type: its layer, or its layer and its expert."""
        return self.layer if self.expert is None else ExpertPlace(self.layer, self.expert)

    @property
    def input_site(self) -> str:
        """Name of the input site: matrices of one layer that read the same activations share one name."""
        return f"{self.layer}.{self.site}"


@dataclass(frozen=True)
class Architecture:
    """The compressible matrices of a model, found in its modules; `untouched` are block weights that stay dense.

    `blocks` are the paths of the blocks in the model, and in every compressed twin of it, by layer. `fused` are those
    of modules whose experts are to be taken apart before they are compressed (`models.experts.unfused`).
    """

    family: str
    matrices: tuple[WeightMatrix, ...]
    untouched: tuple[str, ...] = ()
    blocks: tuple[str, ...] = ()
    fused: tuple[str, ...] = ()

    @cached_property
    def by_position(self) -> Mapping[tuple[str, int], WeightMatrix]:
        """(matrix type, place) -> matrix; the place is the layer, but of experts."""
        return {(m.matrix, m.place): m for m in self.matrices}

    @cached_property
    def matrix_types(self) -> tuple[str, ...]:
        """Matrix types in the order in which they first appear."""
        return tuple(dict.fromkeys(m.matrix for m in self.matrices))

    @property
    def num_layers(self) -> int:
        return 1 + max(m.layer for m in self.matrices)

    @property
    def parameters(self) -> int:
        """Number of parameters in the targeted matrices (biases not counted)."""
        return sum(m.d_in * m.d_out for m in self.matrices)

    def of_type(self, matrix: str) -> tuple[WeightMatrix, ...]:
        """Matrices of one type, by layer, and by expert."""
        return self._by_type.get(matrix, ())

    def experts_of(self, matrix: str, layer: int) -> tuple[WeightMatrix, ...]:
        """The matrices of one type in all experts of a layer; none for other types."""
        return self._experts.get((matrix, layer), ())

    @cached_property
    def _by_type(self) -> Mapping[str, tuple[WeightMatrix, ...]]:
        found: dict[str, list[WeightMatrix]] = {}
        for matrix in sorted(self.matrices, key=lambda m: m.place):
            found.setdefault(matrix.matrix, []).append(matrix)
        return {matrix: tuple(members) for matrix, members in found.items()}

    @cached_property
    def _experts(self) -> Mapping[tuple[str, int], tuple[WeightMatrix, ...]]:
        routed = (m for members in self._by_type.values() for m in members if m.expert is not None)
        found: dict[tuple[str, int], list[WeightMatrix]] = {}
        for matrix in routed:
            found.setdefault((matrix.matrix, matrix.layer), []).append(matrix)
        return {position: tuple(members) for position, members in found.items()}


# How the hidden states of a text become one vector, in the words of sentence-transformers.
PoolingMode: TypeAlias = Literal["cls", "lasttoken", "max", "mean", "mean_sqrt_len_tokens", "weightedmean"]


@dataclass(frozen=True, kw_only=True)
class Pooling:
    """How a model makes a sentence embedding: the vectors of its `modes` side by side, scaled to length 1 if asked.

    `max_length` is the number of tokens after which it cuts a text; None: its context.
    """

    modes: tuple[PoolingMode, ...]
    normalize: bool = False
    max_length: int | None = None


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A model ready to run, its tokenizer, and what is known of its origin (source, revision, dtype, fingerprint).

    `original` is the dense model that a compressed one was made from; None for the dense model itself. `pooling` is
    that of a sentence-transformers model; None for others.
    """

    module: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    architecture: Architecture
    provenance: Mapping[str, Any]
    task: Task = Task.CAUSAL_LM
    original: LoadedModel | None = None
    pooling: Pooling | None = None

    @property
    def device(self) -> torch.device:
        return self.module.device

    @property
    def fingerprint(self) -> str:
        """Hash of all weights (names, dtypes, shapes, bytes) and of the model's configuration."""
        return str(self.provenance["fingerprint"])


Target: TypeAlias = Literal["continuation", "spans"]
Activations: TypeAlias = Literal["auto", "memory", "disk"]


@dataclass(frozen=True, kw_only=True)
class Feeding:
    """How windows are fed to models that do not predict the next token; models that do ignore it.

    A masked language model predicts `mask_share` of a window's tokens, drawn by `seed` and the window's own ids. An
    encoder-decoder reads the first `source_share` of a window and writes the rest (`target="continuation"`), or reads
    the window with `mask_share` of its tokens cut out and writes these (`target="spans"`).
    """

    mask_share: float = 0.15
    source_share: float = 0.5
    target: Target = "continuation"
    seed: int = 0


Probed: TypeAlias = Literal["hidden", "embedding"]


@dataclass(frozen=True, kw_only=True)
class Probes:
    """Random directions v for which gradients of `<output, v>` are taken: `count` of them per window, by `seed`.

    `of` says of which output, scaled to length 1: the last hidden states, or the sentence embedding.
    """

    count: int = 1
    seed: int = 0
    of: Probed = "hidden"


@dataclass(frozen=True, eq=False)
class TokenWindows:
    """Token sequences of equal length with the text's provenance; `tail` holds a shorter last window, if kept."""

    ids: Int[Tensor, "windows length"]
    provenance: Mapping[str, Any]
    tail: Int[Tensor, " rest"] | None = None
    feeding: Feeding = Feeding()


@dataclass(frozen=True, eq=False)
class CalibrationData:
    """The windows on which statistics are gathered, and how many of them the model reads at once.

    `activations` says where hidden states wait between the blocks of a model that is walked through; `probes` what is
    probed where a statistic is made of probes. With a model `towards`, the loss of labels is replaced by the KL
    divergence from its predictions, at the same tokens.

    Made once, before the first stage. A recipe that reads no text has none.
    """

    windows: TokenWindows
    batch_size: int
    activations: Activations = "auto"
    probes: Probes = Probes()
    towards: LoadedModel | None = None

    @property
    def batches(self) -> tuple[Int[Tensor, "batch length"], ...]:
        """The ids of the windows, `batch_size` windows at a time; the last batch may be smaller."""
        batches: tuple[Tensor, ...] = self.windows.ids.split(self.batch_size)
        return batches


@dataclass(frozen=True, order=True)
class WeightGroup:
    """Matrices of one type, one per layer, that share a basis. A single layer means: not shared.

    Of experts a layer has many: then `layers` are their places (`ExpertPlace`), and `blocks` the layers themselves.
    `correction` is the rank of each layer's own low-rank term, which is added to the shared factors; 0 for none.
    """

    matrix: str
    layers: tuple[int, ...]
    d_in: int
    d_out: int
    correction: int = 0

    @property
    def name(self) -> str:
        return f"{self.matrix}[{','.join(map(str, self.layers))}]"

    @property
    def size(self) -> int:
        return len(self.layers)

    @property
    def blocks(self) -> tuple[int, ...]:
        """The layers in which the group has matrices, each once."""
        return tuple(dict.fromkeys(map(block_of, self.layers)))

    @property
    def is_routed(self) -> bool:
        """Whether its matrices are experts', which read the tokens that are sent to them."""
        return isinstance(self.layers[0], ExpertPlace)

    def within(self, block: int) -> tuple[int, ...]:
        """The members that lie in a block."""
        return tuple(place for place in self.layers if block_of(place) == block)

    @property
    def columns(self) -> int:
        """Columns of the concatenated weight, `n * d_out`."""
        return self.size * self.d_out

    @property
    def parameters(self) -> int:
        """Parameters of the dense matrices."""
        return self.d_in * self.columns

    @property
    def full_rank(self) -> int:
        return min(self.d_in, self.columns)

    @property
    def correction_parameters(self) -> int:
        """Parameters of the corrections of all layers."""
        return self.size * self.correction * (self.d_in + self.d_out)


@dataclass(frozen=True, eq=False)
class InputMoments:
    """Moments of each input channel x over tokens (and layers): mean of |x|, maximum of |x|, mean of x^4, in fp64."""

    absolute: Float[Tensor, " d_in"]
    peak: Float[Tensor, " d_in"]
    fourth: Float[Tensor, " d_in"]


@dataclass(frozen=True, eq=False)
class WeightGradient:
    """Squared loss gradients of a group's weights, averaged over calibration sequences (empirical Fisher), in fp64.

    `rows` sums them over all columns of the group. `sensitivity` is the square root of their sum per layer, divided by
    the same quantity for all layers of the matrix type: 1 is a group of average sensitivity.
    """

    rows: Float[Tensor, " d_in"]
    sensitivity: float


@dataclass(frozen=True, eq=False)
class GroupStatistics:
    """The statistics of one group: Grams are sums over tokens (and, for `gram`, over the group's layers), in fp64.

    `tokens` is the number of tokens that one layer of the group read, `predictions` the number of predicted tokens
    whose loss gradients make the output Grams. `loss_gradient` is that of the mean token loss, in nats per predicted
    token, by the concatenated weights. `sampled_grams` and `top_k_grams` are output Grams of drawn labels,
    `probed_grams` those of random probes, averaged over the probes and summed over `probed_outputs` outputs. A
    statistic that no strategy needs is None.
    """

    group: WeightGroup
    tokens: int
    gram: Float[Tensor, "d_in d_in"] | None = None
    output_grams: Mapping[int, Float[Tensor, "d_out d_out"]] | None = None
    moments: InputMoments | None = None
    weight_gradient: WeightGradient | None = None
    predictions: int | None = None
    loss_gradient: Float[Tensor, "d_in columns"] | None = None
    sampled_grams: Mapping[int, Float[Tensor, "d_out d_out"]] | None = None
    top_k_grams: Mapping[int, Float[Tensor, "d_out d_out"]] | None = None
    probed_grams: Mapping[int, Float[Tensor, "d_out d_out"]] | None = None
    probed_outputs: int | None = None


@dataclass(frozen=True, eq=False)
class LayerProfile:
    """Statistics of whole blocks of the dense model, in fp64; one that no strategy needs is None.

    `sensitivity` sums `||dLoss/dW||_F / ||W||_F` over a block's matrices. `output_singular_values` are those of a
    block's outputs (tokens x channels), in falling order.
    """

    sensitivity: Float[Tensor, " layers"] | None = None
    output_singular_values: Mapping[int, Float[Tensor, " channels"]] | None = None


class LossUnit(StrEnum):
    """The unit of the predicted losses of a metric.

    It is `OUTPUT_NORM` only if the metric is the Gram itself (whitening `gram`, importance `none`).
    """

    OUTPUT_NORM = "output_norm"  # ||X dW||_F on the calibration inputs
    METRIC_NORM = "metric_norm"  # ||S dW||_F: in the weights, in scaled weights, or on inputs that are re-weighted
    NATS = "nats"  # increase of the mean token loss, to second order
    COSINE = "cosine"  # 1 - cosine between the outputs of the dense and of the compressed model, to second order

    @property
    def is_second_order(self) -> bool:
        """Whether losses are half the square of a norm, and those of different matrices may be added."""
        return self in (LossUnit.NATS, LossUnit.COSINE)


@dataclass(frozen=True, eq=False)
class GramRoot:
    """The triangular root S of a damped Gram, `S^T S = gram + diag(added)`, which is made when it is first asked for.

    `factorise` makes it. Where a decomposition needs no root of a side, it multiplies by the Gram instead, which saves
    the factorisation and a triangular solve.
    """

    gram: Float[Tensor, "d d"]
    added: Float[Tensor, " d"]
    factorise: Callable[[], Float[Tensor, "d d"]]

    @cached_property
    def triangle(self) -> Float[Tensor, "d d"]:
        """S, upper triangular, in fp64."""
        return _upper(self.factorise(), "root")

    def times(self, matrix: Float[Tensor, "d n"]) -> Float[Tensor, "d n"]:
        """`(gram + diag(added)) @ matrix`."""
        product: Tensor = self.gram @ matrix
        return product.addcmul_(self.added[:, None], matrix)


class _Whitener:
    """The field `Metric.whitener`: a tensor whenever it is read, also where a `GramRoot` was given."""

    def __get__(self, metric: Metric | None, owner: type[Metric]) -> Float[Tensor, "d d"] | None:
        if metric is None:
            raise AttributeError("whitener")  # tells `dataclass` that the field has no default
        given: Tensor | GramRoot | None = metric.__dict__["whitener"]
        return given.triangle if isinstance(given, GramRoot) else given

    def __set__(self, metric: Metric, given: Float[Tensor, "d d"] | GramRoot | None) -> None:
        if given is not None and not isinstance(given, GramRoot):
            given = _upper(given, "whitener")
        metric.__dict__["whitener"] = given


class _Right:
    """The field `Metric.right`: tensors whenever they are read, also where a `GramRoot` was given."""

    def __get__(self, metric: Metric | None, owner: type[Metric]) -> Mapping[int, Float[Tensor, "d d"]] | None:
        found: _RightRoots | None = None if metric is None else metric.__dict__["right"]  # None is also the default
        return found

    def __set__(self, metric: Metric, given: Mapping[int, Float[Tensor, "d d"] | GramRoot] | None) -> None:
        metric.__dict__["right"] = given if given is None or isinstance(given, _RightRoots) else _RightRoots(given)


class _RightRoots(Mapping[int, "Tensor"]):
    """Lower triangular roots by layer; those of a `GramRoot` are made when they are read."""

    def __init__(self, given: Mapping[int, Tensor | GramRoot]) -> None:
        self.given = {
            layer: root if isinstance(root, GramRoot) else _upper(root.mT, f"right[{layer}]^T").mT
            for layer, root in given.items()
        }

    def __getitem__(self, layer: int) -> Tensor:
        root = self.given[layer]
        return root.triangle.mT if isinstance(root, GramRoot) else root

    def __iter__(self) -> Iterator[int]:
        return iter(self.given)

    def __len__(self) -> int:
        return len(self.given)


@dataclass(frozen=True, eq=False)
class Metric:
    """The norm `||S dW R||_F` in which a group's error is measured; None is the identity. All in fp64.

    `whitener` S is upper triangular with `S^T S = M + diag(ridge)`, where M is the Gram, possibly re-weighted, or
    another matrix that the whitening uses instead, and `ridge` is one number or one by channel; `right` holds, by
    layer, a lower triangular R with `R R^T = output Gram + diag(damping)` (`damping` is the mean over channels, of the
    layer where it is largest).

    Any other root does as well: what is not triangular is replaced by the triangular matrix of its QR decomposition,
    which has the same `S^T S` (or `R R^T`). Triangular ones keep their bits. A `GramRoot` may be given in place of
    either: of `S`, or of `R^T`.
    Raises ValueError for a root that has fewer rows than channels (`right`: columns), and so no inverse.
    """

    whitener: _Whitener = _Whitener()
    ridge: float | Float[Tensor, " d_in"] = 0.0
    right: _Right = _Right()
    damping: float = 0.0
    unit: LossUnit = LossUnit.METRIC_NORM

    @property
    def mean_ridge(self) -> float:
        """The ridge, averaged over channels: what the plan records."""
        return float(self.ridge) if isinstance(self.ridge, float | int) else float(self.ridge.mean())

    @property
    def left_gram(self) -> GramRoot | None:
        """The whitener's Gram, if that is what was given."""
        given = self.__dict__["whitener"]
        return given if isinstance(given, GramRoot) else None

    @property
    def right_grams(self) -> Mapping[int, GramRoot]:
        """The Grams of `right`, of those layers for which they were given."""
        given = {} if (right := self.__dict__["right"]) is None else right.given
        return {layer: root for layer, root in given.items() if isinstance(root, GramRoot)}


def _upper(root: Tensor, name: str) -> Float[Tensor, "d d"]:
    """The upper triangular S in fp64 with the same `S^T S`; the root itself if it is one."""
    root = root.double()
    if root.ndim != 2 or root.shape[0] < root.shape[1]:
        raise ValueError(
            f"Metric.{name} must be a matrix with at least as many rows as channels, got shape {tuple(root.shape)}: "
            "without an inverse there is no way back from the whitened weights."
        )
    if root.shape[0] == root.shape[1] and not bool(root.tril(-1).any()):
        return root
    import torch  # who makes a metric has it; who reads records should not wait for it

    triangle = torch.linalg.qr(root, mode="r").R
    signs = triangle.diagonal().sign()
    signed: Tensor = torch.where(signs == 0.0, 1.0, signs)[:, None] * triangle
    return signed


@dataclass(frozen=True, eq=False)
class Spectrum:
    """The singular values of a whitened group, in falling order, and the loss of dropping each component.

    `energies` add up: `energies[k:].sum()` is the loss at rank k in nats, or the squared loss if `unit` is a norm.
    `first_order` adds up too: by how many nats per predicted token, with its sign, the model's loss changes to first
    order when a component is dropped; None unless an allocation needs `Statistic.LOSS_GRADIENT`.
    """

    group: WeightGroup
    singular_values: Float[Tensor, " full_rank"]
    energies: Float[Tensor, " full_rank"]
    ridge: float
    unit: LossUnit = LossUnit.OUTPUT_NORM
    damping: float = 0.0
    first_order: Float[Tensor, " full_rank"] | None = None

    def loss(self, rank: int | None) -> float:
        """Predicted loss at a rank, in the unit of the spectrum; 0 for None, which is dense."""
        if rank is None:
            return 0.0
        tail = float(self.energies[rank:].sum().clamp_min(0.0))
        return tail if self.unit.is_second_order else math.sqrt(tail)


@dataclass(frozen=True, eq=False)
class Decomposition:
    """All components of a group, best first: `basis_t.T @ coefficients` is the weight, the first k the best of rank k.

    Components are balanced (basis column and coefficient row have equal norms), so that half precision can hold them.
    The basis is stored transposed, by component, so that the first k components are a contiguous read.
    """

    spectrum: Spectrum
    basis_t: Float[Tensor, "full_rank d_in"]
    coefficients: Float[Tensor, "full_rank columns"]


Corrections: TypeAlias = "Mapping[int, tuple[Float[Tensor, 'd_in correction'], Float[Tensor, 'correction d_out']]]"


@dataclass(frozen=True, eq=False)
class SharedFactors:
    """One basis for a group and one coefficient matrix per layer; `corrections` are low-rank terms that are added."""

    group: WeightGroup
    basis: Float[Tensor, "d_in rank"]
    coefficients: Mapping[int, Float[Tensor, "rank d_out"]]
    corrections: Corrections = field(default_factory=dict)

    @property
    def rank(self) -> int:
        return self.basis.shape[1]

    def double(self) -> SharedFactors:
        """The same factors in fp64."""
        return SharedFactors(
            self.group,
            self.basis.double(),
            {layer: c.double() for layer, c in self.coefficients.items()},
            {layer: (down.double(), up.double()) for layer, (down, up) in self.corrections.items()},
        )


@dataclass(frozen=True)
class PlannedGroup:
    """A group and its rank; `rank=None` leaves its matrices dense."""

    group: WeightGroup
    rank: int | None
    parameters: int
    predicted_loss: float
    ridge: float
    damping: float = 0.0
    loss_unit: LossUnit = LossUnit.OUTPUT_NORM


@dataclass(frozen=True)
class RankPlan:
    """All groups with their ranks: plain data that can be saved, read, compared and replayed.

    `search` describes how the plan was found, if plans were measured; it does not count when plans are compared.
    """

    groups: tuple[PlannedGroup, ...]
    requested_ratio: float
    layout: str = "plain"
    search: Mapping[str, Any] = field(default_factory=dict, compare=False)

    @property
    def parameters(self) -> int:
        return sum(g.parameters for g in self.groups)

    @property
    def dense_parameters(self) -> int:
        return sum(g.group.parameters for g in self.groups)

    @property
    def predicted_loss(self) -> float:
        """Sum of the groups' predicted losses: nats per token if that is their unit, else a plain sum of norms."""
        return sum(g.predicted_loss for g in self.groups)

    @property
    def retain_ratio(self) -> float:
        """Share of the targeted matrices' parameters that the plan keeps."""
        return self.parameters / self.dense_parameters

    def to_dict(self) -> dict[str, Any]:
        """Plain data for `record.json`."""
        return {
            "layout": self.layout,
            "requested_ratio": self.requested_ratio,
            "retain_ratio": self.retain_ratio,
            "parameters": self.parameters,
            "dense_parameters": self.dense_parameters,
            **({"search": dict(self.search)} if self.search else {}),
            "groups": [
                {
                    "matrix": g.group.matrix,
                    "layers": [_written(place) for place in g.group.layers],
                    "d_in": g.group.d_in,
                    "d_out": g.group.d_out,
                    **({"correction": g.group.correction} if g.group.correction else {}),
                    "rank": g.rank,
                    "parameters": g.parameters,
                    "predicted_loss": g.predicted_loss,
                    "loss_unit": g.loss_unit.value,
                    "ridge": g.ridge,
                    "damping": g.damping,
                }
                for g in self.groups
            ],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`; entries that it does not write are ignored. RecordError if it cannot be read."""
        try:
            return cls(
                groups=tuple(_planned_group(group) for group in data["groups"]),
                requested_ratio=data["requested_ratio"],
                layout=data.get("layout", "plain"),
                search=data.get("search", {}),
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise RecordError(f"This is no plan as RankPlan.to_dict makes it: {error!r}.") from error


def _written(place: int) -> int | list[int]:
    """A member of a group in a record: its layer, or [layer, expert]."""
    return [place.layer, place.expert] if isinstance(place, ExpertPlace) else place


def _read(place: int | list[int]) -> int:
    return ExpertPlace(*place) if isinstance(place, list | tuple) else place


def _planned_group(data: Mapping[str, Any]) -> PlannedGroup:
    """A group of a plan from its entry in `RankPlan.to_dict`."""
    return PlannedGroup(
        group=WeightGroup(
            data["matrix"], tuple(map(_read, data["layers"])), data["d_in"], data["d_out"], data.get("correction", 0)
        ),
        rank=data["rank"],
        parameters=data["parameters"],
        predicted_loss=data["predicted_loss"],
        ridge=data["ridge"],
        damping=data.get("damping", 0.0),
        loss_unit=LossUnit(data.get("loss_unit", LossUnit.OUTPUT_NORM)),
    )


@dataclass(frozen=True, eq=False)
class CompressedModel:
    """A compressed model and the plan it follows; untouched parameters are those of the dense model.

    `calibration` is the provenance of the windows that were used, empty if the recipe needed none; `rounds` are the
    shares kept after each round, the last one being the plan's; `update` is the report of the update on its changes,
    `precision` that of what stored the matrices in fewer bits, empty for none.
    """

    module: PreTrainedModel
    plan: RankPlan
    calibration: Mapping[str, Any]
    rounds: tuple[float, ...]
    update: Mapping[str, Any] = field(default_factory=dict)
    spectra: tuple[Spectrum, ...] = ()
    precision: Mapping[str, Any] = field(default_factory=dict)
