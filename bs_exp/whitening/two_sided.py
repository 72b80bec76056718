"""Weights on both sides of the error: a Kronecker-factored Fisher."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import get_args

import torch
from jaxtyping import Float
from torch import Tensor

from bs_exp.linalg.cholesky import damped_root
from bs_exp.linalg.decomposition import needs_left_root, needs_right_root
from bs_exp.types import GramRoot, GroupStatistics, LoadedModel, LossUnit, Metric, Probed, Probes, Statistic, Task
from bs_exp.validation import check_at_least, check_choice, check_seed, check_share, check_unit

# Square root of the curvature (nats) assumed for outputs that do not reach the loss: negligible, but invertible.
_NEGLIGIBLE = 1e-6
_CURVATURES: Mapping[str, Statistic] = {
    "label": Statistic.OUTPUT_GRAM,
    "sampled": Statistic.SAMPLED_OUTPUT_GRAM,
    "top_k": Statistic.TOP_K_OUTPUT_GRAM,
    "probes": Statistic.PROBED_OUTPUT_GRAM,
}
AUTO = "auto"


@dataclass(frozen=True, kw_only=True)
class TwoSidedWhitening:
    """Error in the loss itself: `1/2 sum_i ||H^(1/2) dW_i G_i^(1/2)||_F^2` per predicted token, to second order.

    `H` is the group's input Gram per token, averaged over its layers; `G_i = E[g g^T]` with g the gradient of the token
    loss (nats) at the output of layer i's matrix. So losses of different groups, types and depths have one unit and may
    be compared. `ridge` and `damping` are added to H's and G's diagonals, as shares of their entries; `temper` is the
    exponent gamma of `G^gamma`, scaled to the trace of G: below 1 it trusts the curvature less, meant for large steps.
    A layer whose outputs have no influence on the loss is given a negligible G.

    `curvature` says which loss that is, and of which labels. `label`: the text's own (empirical Fisher). `sampled`:
    drawn from the model's predictions, one per token, so that G estimates the curvature of the KL divergence. `top_k`:
    drawn among the five most probable tokens, whose probabilities are scaled to 1 (IO-SVD, 2605.15626; it sums over
    these tokens instead of drawing one). `probes`: no labels and no logits, but 1 - cosine between the outputs of the
    dense and of the compressed model, averaged over the outputs; G comes from `probes` random directions per window,
    drawn by `probe_seed` (`probe_losses`). The outputs are the last hidden states, or with `probed` = `embedding` the
    sentence embeddings. `auto`: `label`, and `probes` of the hidden states for a model without logits.
    Kronecker factors: Martens and Grosse (1503.05671), section 3; for SVD: GFWSVD (2505.17974), LEMS/KFAC-SVD.
    """

    ridge: float
    damping: float
    temper: float
    curvature: str = AUTO
    probes: int = 1
    probe_seed: int = 0
    probed: Probed = "hidden"

    def __post_init__(self) -> None:
        check_share(ridge=self.ridge, damping=self.damping)
        check_unit(" (outputs weighted alike, full curvature)", temper=self.temper)
        check_choice("curvature", self.curvature, (AUTO, *_CURVATURES))
        check_at_least(1, probes=self.probes)
        check_seed(self.probe_seed)
        check_choice("probed", self.probed, get_args(Probed))

    @property
    def needs(self) -> frozenset[Statistic]:
        return frozenset({Statistic.GRAM, _CURVATURES[self._chosen]})

    @property
    def probing(self) -> Probes:
        """What is probed, where that is asked for."""
        return Probes(count=self.probes, seed=self.probe_seed, of=self.probed)

    @property
    def _chosen(self) -> str:
        return "label" if self.curvature == AUTO else self.curvature

    def for_model(self, dense: LoadedModel) -> TwoSidedWhitening:
        """The same, with a curvature that the model has where that is `auto`."""
        if self.curvature != AUTO:
            return self
        return replace(self, curvature="probes" if dense.task is Task.ENCODER else "label")

    def metric(self, statistics: GroupStatistics) -> Metric:
        output_grams = {
            "label": statistics.output_grams,
            "sampled": statistics.sampled_grams,
            "top_k": statistics.top_k_grams,
            "probes": statistics.probed_grams,
        }[self._chosen]
        if statistics.gram is None or output_grams is None:
            raise ValueError("TwoSidedWhitening needs Grams of inputs and outputs; it says so in `needs`.")
        group = statistics.group
        per_token = statistics.gram / (statistics.tokens * group.size)
        whitener, ridge = damped_root(per_token, ridge=self.ridge, needed=needs_left_root(group))
        right: dict[int, Tensor | GramRoot] = {}
        dampings = []
        # The loss may be over fewer tokens than are read (masked tokens, a decoder's target).
        probed = self._chosen == "probes"
        predictions = (statistics.probed_outputs if probed else statistics.predictions) or statistics.tokens
        for layer, total in output_grams.items():
            if not bool(total.any()):
                # No output of this matrix reaches the loss (it is multiplied by zeros later): any error costs nothing.
                right[layer] = _NEGLIGIBLE * torch.eye(len(total), dtype=torch.float64, device=total.device)
                continue
            root, added = damped_root(
                tempered(total / predictions, self.temper),
                ridge=self.damping,
                needed=needs_right_root(group),
                of="output gradients",
            )
            right[layer] = root.mT.contiguous() if isinstance(root, Tensor) else root
            dampings.append(float(added.mean()))
        damping = max(dampings, default=0.0)
        unit = LossUnit.COSINE if probed else LossUnit.NATS
        return Metric(whitener=whitener, ridge=ridge, right=right, damping=damping, unit=unit)


def tempered(gram: Float[Tensor, "d d"], exponent: float) -> Float[Tensor, "d d"]:
    """`gram^exponent`, scaled to the trace of `gram`."""
    if exponent == 1.0:
        return gram
    values, vectors = torch.linalg.eigh(gram)
    powers = values.clamp_min(0.0).pow(exponent)
    powers = powers * (values.clamp_min(0.0).sum() / powers.sum())
    result: Tensor = (vectors * powers) @ vectors.mT
    return result
