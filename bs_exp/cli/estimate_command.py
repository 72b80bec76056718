"""`bs-exp estimate SETTING ...`, or `dry_run=true`: what a run would take, and nothing is run."""

from __future__ import annotations

import sys
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from bs_exp.cli.config import build, check_root
from bs_exp.cli.points import in_sweep
from bs_exp.errors import ConfigError
from bs_exp.printable import printable


def print_estimate(cfg: DictConfig) -> None:
    """Prints the estimate of the run that a configuration describes; a few seconds measure the machine."""
    if in_sweep():
        raise ConfigError("dry_run=true is for one run: leave out -m, and name one value of each setting.")
    check_root(cfg)
    experiment = build(cfg)

    import transformers

    from bs_exp.estimate import limits, machine, text
    from bs_exp.runs.expected import expected, expected_windows, place_of, shapes_of

    transformers.logging.set_verbosity_error()
    shapes, place = shapes_of(experiment.model), place_of(experiment.model)
    recipe = experiment.recipe
    windows = expected_windows(shapes, recipe.calibration) if recipe.reads_windows else None
    found = expected(
        shapes,
        place,
        recipe,
        windows,
        experiment.evaluators.values(),
        experiment.cache,
        save_model=experiment.save_model,
    )
    folder = experiment.cache.folder
    print("measuring this machine, some seconds", file=sys.stderr)
    rates = machine.measured(folder, place.device, shapes.module.dtype)
    there = limits.rooms(found, place, folder, Path(HydraConfig.get().runtime.output_dir))
    millions = shapes.module.num_parameters() / 1e6
    title = (
        f"{cfg.name} at {cfg.retain_ratio:g} on {shapes.provenance.get('name')} ({millions:,.0f} M parameters, "
        f"{shapes.provenance.get('dtype')}, {place.device}, offload={place.offload}): estimated, nothing is run"
    )
    for line in text.lines(title, found, windows, rates, there, limits.warnings(found, there, experiment.cache.max_gb)):
        print(printable(line))
