"""Every option composes and instantiates, shows all its dials, and a slip of the keyboard gets a helpful answer."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from hydra.utils import get_class, instantiate
from omegaconf import DictConfig, OmegaConf

from bs_exp.allocation.uniform import UniformAllocation
from bs_exp.cli.conf_root import root_folder
from bs_exp.cli.config import RootConfig, build
from bs_exp.cli.dials import with_dials
from bs_exp.cli.explain import explain
from bs_exp.cli.points import config_hash, hash_of
from bs_exp.errors import ConfigError
from bs_exp.sharing.adjacent import AdjacentSharing
from bs_exp.sharing.none import NoSharing
from bs_exp.whitening.diagonal import DiagonalWhitening
from bs_exp.whitening.fisher_rows import FisherRowsWhitening
from bs_exp.whitening.gram import GramWhitening
from bs_exp.whitening.identity import IdentityWhitening

CONF = root_folder() / "conf"
GROUPS = sorted(RootConfig.__dataclass_fields__.keys() & {path.name for path in CONF.iterdir() if path.is_dir()})
OPTIONS = [(group, path.stem) for group in GROUPS for path in sorted((CONF / group).glob("[!_]*.yaml"))]
_EXPERIMENT = CONF / "experiment"
PRESETS = sorted(str(path.relative_to(_EXPERIMENT).with_suffix("")) for path in _EXPERIMENT.rglob("*.yaml"))
SWEEPS = sorted(path.stem for path in (root_folder() / "sweeps").glob("*.yaml"))

Compose = Callable[..., DictConfig]


@pytest.fixture
def composed() -> Iterator[Compose]:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield lambda *overrides, **options: compose("config", list(overrides), **options)


def _nodes(node: Any) -> Iterator[dict[str, Any]]:
    """Nodes that name a class, the inner ones too."""
    if isinstance(node, dict):
        if "_target_" in node:
            yield node
        for value in node.values():
            yield from _nodes(value)
    elif isinstance(node, list):
        for value in node:
            yield from _nodes(value)


def _fill(node: DictConfig) -> None:
    """Gives mandatory values a name; constructors do not look whether it exists."""
    for key in node:
        if OmegaConf.is_missing(node, key):
            node[key] = "name"


def test_every_group_has_options() -> None:
    assert {group for group, _ in OPTIONS} == RootConfig.__dataclass_fields__.keys() - {
        field.name for field in dataclasses.fields(RootConfig) if field.type in ("str", "int", "float", "bool")
    } - {"objective", "cache", "sample"}


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_option_instantiates(composed: Compose, group: str, option: str) -> None:
    cfg = composed(f"{group}={option}")
    _fill(cfg[group])
    cfg = with_dials(cfg)
    if "_target_" in cfg[group]:
        instantiate(cfg[group], _convert_="all")
    else:
        child = {"calibration": "set", "evaluation": "evaluators"}[group]
        assert instantiate(cfg[group][child], _convert_="all")


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_option_shows_every_dial(composed: Compose, group: str, option: str) -> None:
    cfg = with_dials(composed(f"{group}={option}"))
    nodes = list(_nodes(OmegaConf.to_container(cfg[group], resolve=False)))
    assert nodes
    for node in nodes:
        strategy = get_class(node["_target_"])
        fields = {field.name for field in dataclasses.fields(strategy) if field.init}  # type: ignore[arg-type]
        assert node.keys() - {"_target_"} == fields, node["_target_"]


@pytest.mark.parametrize("preset", PRESETS)
def test_preset_builds(composed: Compose, preset: str) -> None:
    cfg = composed(f"experiment={preset}")
    assert cfg.name == preset.replace("/", "_")
    build(cfg)


@pytest.mark.parametrize("sweep", SWEEPS)
def test_sweep_composes(composed: Compose, sweep: str) -> None:
    assert composed(f"sweeps={sweep}", return_hydra_config=True).hydra.mode.name == "MULTIRUN"


@pytest.mark.parametrize(
    ("preset", "sharing", "whitening"),
    [
        ("svd", NoSharing, IdentityWhitening),
        ("svd_llm", NoSharing, GramWhitening),
        ("basis_sharing", AdjacentSharing, GramWhitening),
        ("asvd", NoSharing, DiagonalWhitening),
        ("fwsvd", NoSharing, FisherRowsWhitening),
        ("dipsvd_local", NoSharing, GramWhitening),
    ],
)
def test_presets_are_the_published_methods(composed: Compose, preset: str, sharing: type, whitening: type) -> None:
    recipe = build(composed(f"experiment={preset}")).recipe
    assert isinstance(recipe.sharing, sharing)
    assert isinstance(recipe.whitening, whitening)
    assert isinstance(recipe.allocation, UniformAllocation)


def test_default_is_basis_sharing_in_pairs_at_four_fifths(composed: Compose) -> None:
    cfg = composed()
    assert (cfg.name, cfg.retain_ratio, cfg.sharing.group_size) == ("basis_sharing", 0.8, 2)
    choices = composed(return_hydra_config=True).hydra.runtime.choices
    assert (choices.model, choices.calibration, choices.tracking) == ("demo", "python_docs", "wandb")


def test_command_line_beats_preset(composed: Compose) -> None:
    cfg = composed("experiment=svd", "sharing=mlp", "name=mine")
    assert (cfg.name, list(cfg.sharing.matrices)) == ("mine", list(composed("sharing=mlp").sharing.matrices))


def test_runs_started_at_once_get_their_own_folders(composed: Compose) -> None:
    first, second = (composed(return_hydra_config=True).hydra for _ in range(2))
    assert first.run.dir != second.run.dir
    assert first.run.dir == first.run.dir  # the suffix is drawn once per configuration


@pytest.mark.parametrize(
    ("preset", "digest"),
    [
        ("svd_llm", "e7aafbe983df3f2bc3580bf69931de05b8f3b19fbf6ef3fde10b0632b94d88b5"),
        ("basis_sharing", "9724f9d58700160717ace58e251ddd84d7567f981ff0073c6ae8db6c34ffbc4d"),
        ("best", "47cca6033154877c56788bff8429666f9d88850aae9d1c72577a6e052a6bb5ec"),
    ],
)
def test_points_of_earlier_sweeps_are_found_again(composed: Compose, preset: str, digest: str) -> None:
    """Folders of points are named by this hash: another one would run all of them again."""
    assert hash_of(composed(f"experiment={preset}", return_hydra_config=True)) == digest


def test_hash_sees_what_changes_a_result(composed: Compose) -> None:
    def digest(*overrides: str) -> str:
        config = OmegaConf.to_container(composed(*overrides), resolve=True)
        assert isinstance(config, dict)
        return config_hash(config)

    plain = digest()
    assert (
        digest(
            "name=other",
            "tracking=none",
            "cache.dir=null",
            "save_model=true",
            "debug=true",
            "sample.prompt=null",
            "force=true",
        )
        == plain
    )
    assert digest("cache.max_gb=1", "cache.keep_rounds=false", "cache.dtype=auto") == plain
    assert digest("cache.dtype=float32") != plain
    assert digest("calibration.activations=disk") == plain
    local = ("model=local", "model.path=x")
    assert digest(*local, "model.offload=disk") == digest(*local) != plain
    assert digest("retain_ratio=0.7") != plain
    two_sided = "whitening=two_sided"
    assert digest(two_sided) == digest(two_sided, "whitening.curvature=label")
    assert digest(two_sided) != digest(two_sided, "whitening.probes=2")
    assert digest(two_sided) != digest(two_sided, "whitening.curvature=top_k")
    assert digest("precision=none") == plain
    assert len({plain, digest("precision=int8"), digest("precision=int4")}) == 3
    assert digest("seed=1") != plain
    assert digest("experiment=svd") != plain


@pytest.mark.parametrize("preset", ["svd_llm", "basis_sharing", "best"])
def test_hash_of_our_own_options_is_that_of_their_settings_alone(composed: Compose, preset: str) -> None:
    """Finished points of before stay finished: only code of others adds to it."""
    config = OmegaConf.to_container(composed(f"experiment={preset}"), resolve=True)
    assert isinstance(config, dict)
    settings = {
        k: v
        for k, v in config.items()
        if k not in ("name", "cache", "debug", "force", "sample", "save_model", "tracking")
        and k not in ("dry_run", "ignore_estimate")
    }
    del settings["calibration"]["activations"]  # where hidden states wait changes no result
    for later in ("curvature", "probes", "probe_seed", "probed"):  # what was done before there was a choice
        settings["whitening"].pop(later, None)
    del settings["precision"]  # none, likewise
    assert config_hash(config) == hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("sed=1", ["sed does not exist", "Did you mean seed?", "retain_ratio"]),
        ("calibration.num_sequence=3", ["calibration.num_sequence does not exist", "num_sequences?", "batch_size"]),
        ("calibratoin.seed=3", ["calibratoin does not exist", "Did you mean calibration?"]),
        ("sharing.groupsize=3", ["sharing.groupsize does not exist", "Did you mean group_size?"]),
        ("update=recover update.generated=9", ["update.generated does not exist", "Did you mean generated_windows?"]),
        ("update=recover update.renewal=9", ["update.renewal does not exist", "precondition_frequency"]),
        ("update=recover update.longest=9", ["update.longest does not exist", "max_precond_dim"]),
        ("model=dmo", ["model=dmo does not exist", "Did you mean demo?", "tiny_random"]),
        ("experiment=svdllm", ["experiment=svdllm does not exist", "Did you mean svd_llm?", "basis_sharing"]),
        ("seed=abc", ["seed must be a whole number", "'abc'"]),
        ("save_model=perhaps", ["save_model: ", "'perhaps'", "bool"]),
        ("retain_ratio=[1]", ["retain_ratio must be a number", "[1]"]),
        ("seed", ["'seed'", "key=value"]),
        ("retain_ratio=0.5,0.6", ["retain_ratio=0.5,0.6", "--multirun"]),
    ],
)
def test_typo_gets_an_answer(composed: Compose, override: str, expected: list[str]) -> None:
    with pytest.raises(HydraException) as caught:
        composed(*override.split())
    message = explain(caught.value)
    for part in expected:
        assert part in message
    assert "_target_" not in message


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("retain_ratio=0", ["retain_ratio", "0"]),
        ("retain_ratio=1.01", ["retain_ratio", "1.01"]),
        ("seed=-1", ["seed", "-1"]),
        ("sharing.group_size=0", ["sharing.group_size", "0", "1"]),
        ("calibration.num_sequences=0", ["calibration.num_sequences", "0"]),
        ("calibration.order=backwards", ["calibration.order", "backwards", "sequential", "random"]),
        ("whitening.ridge=-1", ["whitening.ridge", "-1"]),
        ("importance=channel importance.a=0", ["importance.a", "0", "at least 1"]),
        ("whitening=diagonal importance=channel", ["ChannelImportance", "DiagonalWhitening", "importance=none"]),
        ("schedule=steps schedule.size=abc", ["schedule.size", "'abc'", "at most 1"]),
        ("schedule=steps schedule.size=1e-7", ["schedule.size", "1e-07", "0.001"]),
        ("schedule=adaptive_steps schedule.min_size=null", ["schedule.min_size", "null"]),
        ("schedule=adaptive_steps schedule.max_loss=abc", ["schedule.max_loss", "'abc'", "above 0"]),
        ("whitening=two_sided whitening.damping=null", ["whitening.damping", "null", "below 1"]),
        ("whitening=two_sided whitening.temper=abc", ["whitening.temper", "'abc'", "between 0 and 1"]),
        ("whitening.ridge=.nan", ["whitening.ridge", "nan"]),
        ("update=recover update.learning_rate=abc", ["update.learning_rate", "'abc'", "above 0"]),
        ("update=recover update.accumulation=5", ["update.accumulation", "batch_size, which is 2", "got 5"]),
        ("update=recover update.piece_length=100000000000000000000", ["update.piece_length", "100000000000000000000"]),
        ("update=recover update.piece_length=1e20", ["update.piece_length", "1e+20"]),
        ("update=recover update.warmup=abc", ["update.warmup", "'abc'", "below 1"]),
        ("experiment=best_recovered update.updates.recover.steps=-1", ["update.updates.recover.steps", "-1"]),
        ("update=refit update.below=abc", ["update.below", "'abc'", "at most 1"]),
        ("sharing.matrices=qkv", ["sharing.matrices", "list", "'qkv'"]),
        ("selection=measured selection.recalibrate=maybe", ["selection.recalibrate", "'maybe'"]),
        ("selection=measured +selection.candidates.x=foo", ["selection.candidates.x", "'foo'", "+sharing@"]),
        ("selection=measured +selection.candidates.x.sharing=all", ["selection.candidates.x.sharing", "'all'"]),
        ("importance=soft_channel importance.temperature=abc", ["importance", "temperature", "abc"]),
        ("tracking.mode=sometimes", ["tracking.mode", "sometimes", "offline"]),
        ("calibration=text", ["calibration.files must be set"]),
        ("evaluation=text", ["evaluation.files must be set"]),
        ("model=local", ["model.path must be set", "model.path=VALUE"]),
        ("+sed=1", ["sed does not exist", "Did you mean seed?"]),
        ("+sharing.size=1", ["sharing", "size"]),
        ("model.dtype=${nothing}", ["nothing"]),
    ],
)
def test_wrong_value_gets_an_answer(composed: Compose, override: str, expected: list[str]) -> None:
    cfg = composed(*override.split())
    with pytest.raises(Exception) as caught:  # of several libraries: the message is what counts
        build(cfg)
    message = explain(caught.value)
    for part in expected:
        assert part in message


def test_a_constructors_complaint_keeps_its_type(composed: Compose) -> None:
    with pytest.raises(ConfigError, match=r"^sharing\.group_size"):
        build(composed("sharing.group_size=0"))
