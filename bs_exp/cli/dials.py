"""The dials of a group, handed to the strategies inside its option.

An option of `evaluation` holds several evaluators, one of `calibration` its windows; what they share stands once, as a
dial of the group (`evaluation.batch_size`). Each is handed the dials that its constructor has a parameter for.
"""

from __future__ import annotations

from collections.abc import Iterator

from omegaconf import DictConfig, OmegaConf, open_dict

from bs_exp.cli.setting_types import parameter_names


def with_dials(cfg: DictConfig) -> DictConfig:
    """The configuration with references to the group's dials in every evaluator and in the calibration windows.

    What a node sets by itself stays, and so does a strategy whose parameters cannot be known.
    """
    filled = cfg.copy()
    for group, key in _strategies(cfg):
        node = OmegaConf.select(filled, key)
        names = parameter_names(node["_target_"]) & {str(name) for name in filled[group]} - set(node)
        with open_dict(node):
            for name in sorted(names):
                node[name] = f"${{{group}.{name}}}"
    return filled


def _strategies(cfg: DictConfig) -> Iterator[tuple[str, str]]:
    """Group and full key of each strategy that takes the dials of its group."""
    several = OmegaConf.select(cfg, "evaluation.evaluators")
    inside = [f"evaluation.evaluators.{name!s}" for name in several] if isinstance(several, DictConfig) else []
    for key in ("calibration.set", *inside):
        node = OmegaConf.select(cfg, key)
        if isinstance(node, DictConfig) and isinstance(node.get("_target_"), str):
            yield key.split(".")[0], key
