"""Models of which nothing but shapes is known: on the meta device, from a configuration alone."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import Any

import torch
import yaml
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from bs_exp.models.architecture import Roles, find_architecture
from bs_exp.models.auto_classes import AutoClass
from bs_exp.types import LoadedModel


def known_config(name: str) -> PreTrainedConfig | None:
    """The configuration of a model on the hub by `known_shapes.yaml`; None if it is not there."""
    settings = _known().get(name)
    return None if settings is None else AutoConfig.for_model(**settings)


def known_names() -> tuple[str, ...]:
    """Names of the models whose shapes are known."""
    return tuple(_known())


@cache
def _known() -> Mapping[str, Mapping[str, Any]]:
    text = resources.files("bs_exp.models").joinpath("known_shapes.yaml").read_text(encoding="utf-8")
    found: Mapping[str, Mapping[str, Any]] = yaml.safe_load(text)
    return found


def on_meta(
    config: PreTrainedConfig,
    auto: AutoClass,
    tokenizer: PreTrainedTokenizerBase,
    roles: Roles | None,
    *,
    dtype: torch.dtype,
    name: str,
    options: Mapping[str, Any],
) -> LoadedModel:
    """A model in evaluation mode whose weights are on the meta device; its provenance has no fingerprint."""
    with torch.device("meta"):
        module: PreTrainedModel = auto.loader.from_config(config, dtype=dtype, **options)
    module.eval()
    architecture = find_architecture(module, roles)
    provenance = {"name": name, "dtype": str(dtype).removeprefix("torch."), "family": architecture.family}
    return LoadedModel(module, tokenizer, architecture, provenance, auto.task)
