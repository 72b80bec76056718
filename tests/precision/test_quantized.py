"""Quantised weights: the inputs that count, what feedback and refit gain, what is refused, the command line."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from bs_exp.cache import Cache
from bs_exp.errors import ConfigError, ContractError, ModelError
from bs_exp.linalg.quantization import fit_grid, round_with_feedback
from bs_exp.models.architecture import weight_of
from bs_exp.models.hooks import Hooks
from bs_exp.models.modeling_basis_sharing import Quantized, QuantizedLinear
from bs_exp.models.surgery import is_factorised
from bs_exp.models.tiny import tiny_random
from bs_exp.pipeline import compress, prepare
from bs_exp.precision.quantized import QuantizedWeights
from bs_exp.protocols import Precision
from bs_exp.records.record import read_record
from bs_exp.sharing.heads import HeadSharing
from bs_exp.sharing.none import NoSharing
from bs_exp.testing.models import LAYOUTS, QUIET, Tokens, recipe, same, values
from bs_exp.types import CompressedModel, LoadedModel
from bs_exp.update.none import NoUpdate
from bs_exp.workspace import Workspace
from tests.support.options import strategy

Cli = Callable[..., Any]
INT4 = QuantizedWeights(
    bits=4,
    group_size=16,
    symmetric=False,
    error_feedback=True,
    order="importance",
    damping=0.01,
    inputs="sequential",
    refit=True,
    ridge=1e-6,
)
NEAREST = replace(INT4, error_feedback=False, refit=False)


@cache
def dense() -> LoadedModel:
    return tiny_random()


@cache
def statistics() -> Cache:
    return Cache(None)


def made(precision: Precision, **changes: Any) -> CompressedModel:
    asked = replace(recipe(NoUpdate(), changes.pop("layout", LAYOUTS[0])), precision=precision, **changes)
    return compress(dense(), asked, Workspace(statistics(), QUIET))


def error(precision: QuantizedWeights, **changes: Any) -> float:
    return float(made(precision, **changes).precision["relative_error"])


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_feedback_and_refit_each_lower_the_change_of_outputs(layout: Any) -> None:
    nearest, fed, fitted, both = (
        error(precision, layout=layout, sharing=NoSharing())
        for precision in (NEAREST, replace(INT4, refit=False), replace(INT4, error_feedback=False), INT4)
    )
    assert both < min(fed, fitted) and max(fed, fitted) < nearest


def test_more_bits_and_smaller_groups_change_less() -> None:
    by_bits = [error(replace(INT4, bits=bits)) for bits in (3, 4, 8)]
    assert by_bits == sorted(by_bits, reverse=True) and by_bits[-1] < 0.01 < by_bits[0]
    assert error(replace(INT4, group_size=4)) < error(replace(INT4, group_size=None))


@pytest.mark.parametrize("inputs", ["sequential", "one_shot"])
def test_dense_matrices_are_rounded_on_inputs_of_the_blocks_before_as_they_were_stored(inputs: str) -> None:
    """Oracle: Grams from hooks on the model that is made, or on the dense one; and the codes that follow from them."""
    found = made(replace(INT4, inputs=inputs), retain_ratio=1.0)
    source = found.module if inputs == "sequential" else dense().module
    grams = dict(_grams(source))
    for matrix in dense().architecture.matrices:
        if inputs == "sequential" and matrix.matrix not in ("q", "k", "v"):
            continue  # within a block, the others read what it gave before it was stored
        weight = weight_of(dense().module, matrix).detach().T.double()
        gram = grams[matrix.module]
        grid = fit_grid(weight, bits=4, group_size=16, symmetric=False, dtype=torch.float32, importance=gram.diagonal())
        codes = round_with_feedback(weight, grid, gram, damping=0.01, by_importance=True)
        layer = found.module.get_submodule(matrix.module)
        assert isinstance(layer, QuantizedLinear)
        differ = (layer.matrix("weight").double() - grid.values(codes)).abs() > 1e-6
        assert float(differ.double().mean()) < 0.02, matrix.module  # sums in another order: a code here and there


def _grams(module: Any) -> Iterator[tuple[str, Tensor]]:
    seen: dict[str, Tensor] = {}
    with Hooks() as hooks, torch.no_grad():
        for matrix in dense().architecture.matrices:
            hooks.on_input(
                module.get_submodule(matrix.module),
                lambda x, name=matrix.module: seen.__setitem__(name, x.flatten(0, -2).double()),
            )
        module(Tokens().windows(None).ids)
    return ((name, x.T @ x) for name, x in seen.items())


def test_nearest_reads_no_text() -> None:
    assert not NEAREST.reads_windows and INT4.reads_windows and replace(NEAREST, refit=True).reads_windows
    first, second = (made(NEAREST, calibration=Tokens(count=count), retain_ratio=1.0) for count in (8, 16))
    assert same(values(first.module), values(second.module))


def test_at_a_ratio_of_one_a_folder_without_factors_is_declared() -> None:
    found = made(INT4, retain_ratio=1.0)
    assert is_factorised(found.module)
    config = found.module.hf_quantizer.quantization_config  # type: ignore[union-attr]
    assert config.groups == [] and config.precision == {"bits": 4, "group_size": 16, "symmetric": False}
    assert config.quantized == sorted(matrix.module for matrix in dense().architecture.matrices)


def test_matrices_cut_into_heads() -> None:
    found = made(INT4, sharing=strategy("sharing=heads"))
    stored = [name for name, part in found.module.named_modules() if isinstance(part, Quantized)]
    assert any(".blocks." in name for name in stored)
    assert isinstance(strategy("sharing=heads"), HeadSharing)


def test_an_encoder_decoder_takes_the_inputs_of_one_pass() -> None:
    model = tiny_random("t5")
    asked = replace(recipe(NoUpdate()), precision=INT4, sharing=NoSharing())
    with pytest.raises(ModelError, match=r"precision\.inputs=one_shot"):
        prepare(model, asked, QUIET)
    once = replace(asked, precision=replace(INT4, inputs="one_shot"))
    assert compress(model, once, Workspace(Cache(None), QUIET)).precision["matrices"] > 0


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"bits": 5}, "bits must be one of 3, 4, 8, got 5"),
        ({"bits": True}, "bits must be one of"),
        ({"group_size": 0}, "group_size must be a whole number of at least 1"),
        ({"order": "random"}, "order must be"),
        ({"inputs": "all"}, "inputs must be"),
        ({"damping": -1.0}, "damping must be"),
        ({"ridge": float("nan")}, "ridge must be"),
    ],
)
def test_settings_that_make_no_sense_are_refused(wrong: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        replace(INT4, **wrong)


class _Careless(QuantizedWeights):
    """Changes what belongs to no matrix."""

    def apply(self, compressed: Any, *others: Any) -> dict[str, Any]:
        with torch.no_grad():
            compressed.get_input_embeddings().weight.add_(1.0)
        return {}


def test_a_precision_that_changes_other_parameters_is_told_so() -> None:
    model = tiny_random()
    asked = replace(recipe(NoUpdate()), precision=_Careless(**vars(INT4)))
    with pytest.raises(ContractError, match=r"precision tests.*embed_tokens\.weight of the dense model changed"):
        compress(model, asked, Workspace(Cache(None), QUIET))


def test_adapters_that_are_not_merged_are_refused(cli: Cli, tiny: tuple[str, ...]) -> None:
    done = cli(*tiny, "experiment=svd_llm", "update=lora", "update.merge=false", "update.steps=1", "precision=int8")
    assert done.status != 0 and "update.merge=true" in done.err


def test_command_line(cli: Cli, tiny: tuple[str, ...], tmp_path: Path) -> None:
    """The record has what was done and what it takes; the folder loads; and becomes an ordinary one."""
    done = cli(*tiny, "experiment=best", "schedule=single", "precision=int4", "save_model=true", "hydra.run.dir=out")
    assert done.status == 0, done.err
    record = read_record(tmp_path / "out")
    assert record.precision["bits"] == 4 and 0.0 < record.precision["relative_error"] < 0.5
    assert record.choices["precision"] == "int4" and "quantise" in record.timings
    assert record.size["targeted_bytes"] < 0.3 * record.size["dense_targeted_bytes"]
    assert record.size["saved_bytes"] >= record.size["bytes"]
    assert "stored in 4 bits" in (tmp_path / "out" / "model" / "README.md").read_text()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")
    assert loaded(torch.tensor([[1, 2, 3]])).logits.isfinite().all()
    assert cli("export", "out/model", "--to", "dense").status == 0
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model-dense").config.model_type == "llama"
