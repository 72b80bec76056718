"""`model=DIR`, `model=ORG/NAME`, `data=FILE`, `data=FOLDER`: options that are named by a path and have no file.

To Hydra they are options like any other, from one more place of its search path: they stand in grids of sweeps, in
sweep files, in `--cfg job` and in Python. An option file of that name comes first.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.object_type import ObjectType
from hydra.plugins.config_source import ConfigResult, ConfigSource
from omegaconf import OmegaConf

from bs_exp.cli.conf_root import root_folder
from bs_exp.errors import ConfigError

# Group -> how its options are named besides those of `conf/`.
GROUPS = {
    "model": "a folder (model=DIR) or a name on the hub (model=ORG/NAME)",
    "data": "a text file or a folder of them (data=FILE, data=FOLDER)",
}
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_SUFFIX = re.compile(r"\.[A-Za-z][A-Za-z0-9]*$")
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".json", ".onnx")


class PathOptions(ConfigSource):
    """What Hydra asks for options that no folder of its search path has."""

    @staticmethod
    def scheme() -> str:
        """What the entry in `hydra.searchpath` begins with."""
        return "bs-exp-paths"

    def load_config(self, config_path: str) -> ConfigResult:
        """The option for a path, with the path in it; ConfigError if there can be nothing to read."""
        group, _, name = config_path.partition("/")
        option, settings = _model(name) if group == "model" else _data(name)
        text = (root_folder() / "conf" / group / f"{option}.yaml").read_text(encoding="utf-8")
        return ConfigResult(
            provider=self.provider,
            path=self.full_path(),
            config=OmegaConf.merge(OmegaConf.create(text), settings),
            header=self._get_header_dict(text),
        )

    def is_group(self, config_path: str) -> bool:
        """Never: groups are folders of `conf/`."""
        return False

    def is_config(self, config_path: str) -> bool:
        """Whether it is an option of one of the groups, and named by a path (of a model: or by ORG/NAME)."""
        group, _, name = config_path.partition("/")
        return group in GROUPS and is_path(name)

    def available(self) -> bool:
        """Always."""
        return True

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        """None: paths are not listed."""
        return []


def is_path(name: str) -> bool:
    """Whether an option's name is that of a file or folder: written like one, or there is one."""
    return name not in ("", ".", "..") and bool("/" in name or _SUFFIX.search(name) or Path(name).exists())


def _data(name: str) -> tuple[str, dict[str, Any]]:
    """The option for a text file or a folder of them, and its settings; ConfigError if there is none."""
    if not Path(name).expanduser().exists():
        raise ConfigError(
            f"data={name}: there is no such file or folder (looked in {Path.cwd()}). data names a text file, a folder "
            "of them, or an option of conf/data."
        )
    return "text", {"calibration": {"files": [name]}}


def _model(name: str) -> tuple[str, dict[str, Any]]:
    """The option for a model of this name, and its settings; ConfigError if it is neither a folder nor a hub's name."""
    path = Path(name).expanduser()
    if path.is_dir():
        return "local", {"path": name}
    if path.suffix.lower() == ".gguf":
        raise ConfigError(
            f"model={name}: GGUF files hold weights that are quantised already, and are not read. Compress the "
            "checkpoint that the file was made from (model=DIR or model=ORG/NAME), and convert the result."
        )
    if path.exists():
        raise ConfigError(f"model={name} is a file; name the folder that it lies in: model={path.absolute().parent}.")
    if path.suffix.lower() in _WEIGHTS or not _HUB_NAME.fullmatch(name):
        raise ConfigError(
            f"model={name}: there is no such folder (looked in {Path.cwd()}). A model is named by its folder, as "
            "written by save_pretrained (model=DIR), by its name on the hub (model=ORG/NAME), or by an option of "
            "conf/model."
        )
    if Path(name).parent.is_dir():
        raise ConfigError(
            f"model={name}: the folder {Path(name).parent} has no {Path(name).name}. If a model of the hub is meant, "
            f"say so: model=hub model.name={name}."
        )
    return "hub", {"name": name}


# Not through `Plugins`, whose making looks for plug-ins: ours import this module, and would be looked for twice.
SourcesRegistry.instance().register(PathOptions)
