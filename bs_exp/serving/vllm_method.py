"""vLLM's words for a saved model: its quantization config, and the method of its factorised layers. Imports vLLM."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from vllm.config import get_current_vllm_config
from vllm.distributed.utils import get_pp_indices
from vllm.model_executor.layers.linear import (
    LinearBase,
    LinearMethodBase,
    QKVParallelLinear,
    RowParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

from bs_exp.models.modeling_basis_sharing import BIASES, METHOD
from bs_exp.serving.factors import FactorisedLayer, SharedBases, factorised_layer
from bs_exp.serving.parts import Part, StoredGroup, check_stages, parts_of, read_groups, renamed, share

# What vLLM's models call the matrices of a layer that they load one by one.
_SHARDS = {"q": 0, "k": 1, "v": 2}


class BasisSharingQuantization(QuantizationConfig):  # type: ignore[misc]
    """The groups of a saved model, by vLLM's names of modules, and the bases of the model that is being built."""

    def __init__(self, groups: tuple[StoredGroup, ...]):
        super().__init__()
        self.groups = groups
        self.unquantized = UnquantizedLinearMethod()
        self._bases: dict[torch.dtype, SharedBases] = {}
        self._claimed: set[str] = set()

    @classmethod
    def get_name(cls) -> str:
        return METHOD

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 0  # ordinary products

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []  # all is in config.json

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> BasisSharingQuantization:
        return cls(read_groups(config))

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        self.groups = renamed(self.groups, hf_to_vllm_mapper.map_name)

    def get_quant_method(self, layer: Any, prefix: str) -> QuantizeMethodBase | None:
        if isinstance(layer, ParallelLMHead) and any(prefix in group.members for group in self.groups):
            raise ValueError(f"{prefix} is factorised in this folder; vLLM takes a dense output layer only.")
        if not isinstance(layer, LinearBase):
            return None
        self.check_pipeline()
        segments = len(getattr(layer, "output_partition_sizes", [layer.output_size]))
        parts = parts_of(prefix, segments, self.groups, self.packed_modules_mapping)
        if parts is None:
            return self.unquantized
        self._claimed.update(part.name for part in parts)
        return FactorisedLinearMethod(self, parts)

    def bases(self, dtype: torch.dtype) -> SharedBases:
        """Where all layers of one dtype find their bases."""
        return self._bases.setdefault(dtype, SharedBases(dtype, self.unquantized))

    def get_checkpoint_weight_mapper(self) -> Any:
        """Asked for when the model is built and before it is loaded: the moment to see whether all groups are in it."""
        pipeline = get_current_vllm_config().parallel_config.pipeline_parallel_size
        lost = [m for group in self.groups for m in group.members if m not in self._claimed]
        if lost and pipeline == 1:
            raise ValueError(
                f"config.json says that {lost[0]} is factorised ({len(lost)} such), but vLLM's model has no layer for "
                "it. Its modules are named or fused in a way that is not known here: serve with "
                "model_impl=transformers, or serve the dense model (bs_exp.to_dense)."
            )
        return super().get_checkpoint_weight_mapper()

    def check_pipeline(self) -> None:
        """ValueError if a group has members in several stages of the pipeline that vLLM is configured for."""
        config = get_current_vllm_config()
        stages = config.parallel_config.pipeline_parallel_size
        if stages > 1:
            blocks = config.model_config.hf_text_config.num_hidden_layers
            check_stages(self.groups, [get_pp_indices(blocks, stage, stages)[0] for stage in range(stages)])


class FactorisedLinearMethod(LinearMethodBase):  # type: ignore[misc]
    """One layer of vLLM whose matrices, or some of them, are stored as factors.

    The checkpoint's tensors are loaded through empty parameters with their names: `qkv_proj.basis` stands for the bases
    of q, k and v, which have several shapes and may belong to other layers, too.
    """

    def __init__(self, config: BasisSharingQuantization, parts: tuple[Part, ...]):
        self.config = config
        self.parts = parts

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        full = _full_widths(layer, output_partition_sizes)
        rank, size = getattr(layer, "tp_rank", 0), getattr(layer, "tp_size", 1)
        shares = [
            share(
                part,
                full=full,
                held=output_partition_sizes,
                d_in=input_size,
                d_in_held=input_size_per_partition,
                rank=rank,
                size=size,
            )
            for part in self.parts
        ]
        config = self.config
        layer.factorised = factorised_layer(
            self.parts,
            shares,
            config.bases(params_dtype),
            config.packed_modules_mapping,
            params_dtype,
            config.unquantized,
        )
        self._add_names(layer, params_dtype)

    def _add_names(self, layer: Any, dtype: torch.dtype) -> None:
        """Empty parameters, by the names of the checkpoint's tensors, whose loaders give these to the parts."""
        corrected = any(part.group is not None and part.group.correction for part in self.parts)
        names = ["basis", "weight", "pivots", "output_bias"]
        names += [f"shared.{name}" for name in (*names, "bias")] + ["down"] if corrected else []
        if corrected:
            layer.shared = nn.Module()
        for name in names:
            last = name.rpartition(".")[2]
            stored = torch.uint8 if last == "pivots" else dtype
            empty: Any = nn.Parameter(torch.empty(0, dtype=stored), requires_grad=False)
            empty.weight_loader = _bias_loader(layer, name) if last in BIASES else _loader(layer.factorised, name)
            (layer.shared if name != last else layer).register_parameter(last, empty)

    def process_weights_after_loading(self, layer: Any) -> None:
        layer.factorised.finish()

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return cast("Tensor", layer.factorised(x, bias))


def _loader(factorised: FactorisedLayer, name: str) -> Callable[..., None]:
    def load(param: nn.Parameter, tensor: Tensor, shard: Any = None) -> None:
        part = 0 if shard is None else _SHARDS.get(shard, shard)
        if not isinstance(part, int) or (shard is None and len(factorised.parts) > 1):
            raise ValueError(f"vLLM loads {name} as the part {shard!r} of a fused layer, which is not known here.")
        factorised.load(part, name, tensor)

    return load


def _bias_loader(layer: Any, name: str) -> Callable[..., None]:
    """Of a bias that has another name in the checkpoint than in vLLM."""

    def load(param: nn.Parameter, tensor: Tensor, *shard: Any) -> None:
        if layer.bias is None:
            raise ValueError(f"The files of the weights hold a {name} of {layer.prefix}, which has no bias in vLLM.")
        layer.bias.weight_loader(layer.bias, tensor, *[s for s in shard if s is not None])

    return load


def _full_widths(layer: Any, held: list[int]) -> list[int]:
    """Widths of the outputs of a layer in all processes together, of which this one holds `held`."""
    if isinstance(layer, QKVParallelLinear):
        heads, kv = layer.total_num_heads, layer.total_num_kv_heads
        return [heads * layer.head_size, kv * layer.head_size, kv * layer.v_head_size]
    if isinstance(layer, RowParallelLinear) or getattr(layer, "tp_size", 1) == 1:
        return held
    return list(getattr(layer, "output_sizes", [layer.output_size]))
