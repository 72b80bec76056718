"""The entry point through which vLLM learns to serve saved models (group `vllm.general_plugins`).

vLLM calls `register` in each of its processes, whatever it serves. So nothing here may fail, or import vLLM, before.
"""

from __future__ import annotations

from typing import Any

METHOD = "basis_sharing"  # as in bs_exp.models.modeling_basis_sharing, which imports torch
OLDEST = (0, 32)
SUPPORTED = ">=0.32"


def register() -> None:
    """Makes vLLM know the method `basis_sharing`; a vLLM that is too old says so when such a model is loaded."""
    import vllm
    from vllm.model_executor.layers import quantization

    if not is_supported(vllm.__version__):
        _register_refusal(vllm.__version__)
        return
    from bs_exp.serving.vllm_method import BasisSharingQuantization

    if METHOD not in quantization.QUANTIZATION_METHODS:
        quantization.register_quantization_config(METHOD)(BasisSharingQuantization)


def is_supported(version: str) -> bool:
    """Whether a vLLM of this version is new enough; what is built from a source without a version is taken to be."""
    from packaging.version import InvalidVersion, Version

    try:
        release = Version(version).release[:2]
    except InvalidVersion:
        return True
    return release >= OLDEST or release == (0, 0)


def _register_refusal(version: str) -> None:
    from vllm.model_executor.layers.quantization import register_quantization_config
    from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

    class TooOld(QuantizationConfig):  # type: ignore[misc]
        """Stands in for the method in a vLLM that it cannot work with."""

        @classmethod
        def override_quantization_method(cls, hf_quant_cfg: Any, *args: Any, **kwargs: Any) -> None:
            if isinstance(hf_quant_cfg, dict) and hf_quant_cfg.get("quant_method") == METHOD:
                raise ValueError(too_old(version))

    register_quantization_config(METHOD)(TooOld)


def too_old(version: str) -> str:
    return (
        f"This model has shared bases, which bs_exp serves with vllm{SUPPORTED}; this is vllm {version}. Install a "
        "newer one, or serve the dense model: bs_exp.to_dense."
    )
