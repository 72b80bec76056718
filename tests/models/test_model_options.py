"""Options of the group `model`: all compose, all fields stand in their files, presets only name a model."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import get_class, instantiate
from omegaconf import DictConfig, OmegaConf

import bs_exp.cli.config  # noqa: F401  registers the root's schema
from bs_exp.models.loading import HubModel
from bs_exp.models.tiny import ENCODER_DECODERS, ENCODERS, FAMILIES, TinyRandom

CONF = Path(__file__).parents[2] / "conf"
OPTIONS = sorted(file.stem for file in (CONF / "model").glob("[!_]*.yaml"))
MANUALS = ("demo", "local", "hub", "tiny_random")


def _option(name: str, *overrides: str) -> DictConfig:
    with initialize_config_dir(config_dir=str(CONF), version_base="1.3"):
        return compose("config", [f"model={name}", *overrides]).model


@pytest.mark.parametrize("name", MANUALS)
def test_every_field_stands_in_its_file(name: str) -> None:
    node = _option(name)
    fields = {field.name for field in dataclasses.fields(get_class(node._target_))}
    assert set(node) - {"_target_"} == fields


@pytest.mark.parametrize("name", sorted(set(OPTIONS) - set(MANUALS)))
def test_a_preset_is_a_hub_model_with_a_name(name: str) -> None:
    text = OmegaConf.load(CONF / "model" / f"{name}.yaml")
    assert set(text) <= {"defaults", "name", "dtype"}
    source = instantiate(_option(name), _convert_="all")
    assert source == HubModel(name=text.name, dtype=text.get("dtype", "auto"))
    assert source.name.count("/") == 1


def test_the_manual_page_of_tiny_models_names_every_family() -> None:
    text = (CONF / "model" / "tiny_random.yaml").read_text()
    assert all(family in text for family in (*FAMILIES, *ENCODERS, *ENCODER_DECODERS))


def test_roles_can_be_given_on_the_command_line() -> None:
    node = _option("tiny_random", "model.family=gpt2", "model.roles={attn.c_proj: dense, mlp.c_fc: up}")
    source = instantiate(node, _convert_="all")
    assert source == TinyRandom(family="gpt2", roles={"attn.c_proj": "dense", "mlp.c_fc": "up"})
    assert source.load().architecture.matrix_types == ("qkv", "up", "down")
