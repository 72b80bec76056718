"""What a run may be asked to return."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir

from bs_exp.cli.conf_root import root_folder
from bs_exp.cli.config import build
from bs_exp.errors import ConfigError
from bs_exp.records.metrics import SIZES
from bs_exp.records.record import read_record


@pytest.mark.parametrize(
    ("override", "objective"),
    [
        ("objective=null", None),
        ("objective=ppl/a", "ppl/a"),
        ("objective=[ppl/a]", ("ppl/a",)),
        ("objective=[ppl/a,size/bytes]", ("ppl/a", "size/bytes")),
    ],
)
def test_objectives_are_a_metric_or_several(override: str, objective: Any) -> None:
    with initialize_config_dir(str(root_folder() / "conf"), version_base="1.3"):
        assert build(compose("config", [override])).objective == objective


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("objective=[]", r"^objective must name a metric, or several different ones, got \[\]"),
        ("objective=[ppl/a,ppl/a]", r"several different ones, got \['ppl/a', 'ppl/a'\]"),
        ("objective=3", r"^objective must be the name of a metric, a list of names, or null, got 3"),
        ("objective=[ppl/a,3]", r"a list of names, or null, got \['ppl/a', 3\]"),
        ("objective={a: 1}", r"^objective must be the name of a metric"),
    ],
)
def test_what_is_no_objective_is_refused(override: str, message: str) -> None:
    with (
        initialize_config_dir(str(root_folder() / "conf"), version_base="1.3"),
        pytest.raises(ConfigError, match=message),
    ):
        build(compose("config", [override]))


@pytest.mark.slow
def test_sizes_are_objectives(cli: Callable[..., Any], tiny: tuple[str, ...]) -> None:
    names = [f"size/{name}" for name in SIZES]
    done = cli(*tiny, f"objective=[{','.join(names)}]", "hydra.run.dir=out")
    assert done.status == 0, done.err
    record = read_record(Path("out"))
    assert record.objective == {f"size/{name}": record.size[name] for name in SIZES}
    unknown = cli(*tiny, "objective=size/weight", "hydra.run.dir=out2")
    assert unknown.status == 1
    assert "error: objective must be one of ppl/text" in unknown.err
    assert ", size/targeted_bytes, or a list of these, got 'size/weight'." in unknown.err
