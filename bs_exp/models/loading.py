"""Sources of models: the embedded demo model, a local folder, the Hugging Face hub.

Every source ends in `assemble`, which sets eval mode, finds the matrices and computes the fingerprint.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib import resources
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bs_exp.errors import ConfigError, ModelError
from bs_exp.models.architecture import Roles, find_architecture, read_roles
from bs_exp.models.checkpoint import Checkpoint, require_checkpoint
from bs_exp.models.fingerprint import fingerprint
from bs_exp.models.offload import check_offload, place
from bs_exp.models.processor_files import file_finder
from bs_exp.models.sentence_transformers import read_sentence_model
from bs_exp.types import LoadedModel, Task
from bs_exp.validation import check_choice, shown

_DTYPES: dict[str, torch.dtype | str] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "auto": "auto",
}

_INSTALL_AGAIN = "The installation is incomplete: install bs_exp again."
_HUB_HINT = (
    "Without a network use model=demo, model=local model.path=DIR, or a machine's filled cache "
    "(HF_HOME=CACHE HF_HUB_OFFLINE=1). Gated models need a token (HF_TOKEN)."
)
_SAVE_ANEW = "model.path must name a folder written by save_pretrained, of the model and of its tokenizer."


@dataclass(frozen=True, kw_only=True)
class DemoModel:
    """The embedded trained model (`bs_exp/demo/model`): Llama architecture, a tokenizer of its own, no download."""

    dtype: str = "float32"
    device: str = "auto"
    roles: Roles | None = None

    def __post_init__(self) -> None:
        check_settings(self.dtype, self.device, self.roles)

    def load(self) -> LoadedModel:
        """The demo model; ModelError if the installation lacks it."""
        with self._checkpoint() as checkpoint:
            require_checkpoint(Path(checkpoint.place), _INSTALL_AGAIN)
            return _load(checkpoint, self.device, self.roles, source="demo", name="demo")

    def shapes(self) -> LoadedModel:
        """The demo model on the meta device."""
        with self._checkpoint() as checkpoint:
            found = checkpoint.shapes(self.roles)
        return replace(found, provenance={**found.provenance, "name": "demo"})

    @contextmanager
    def _checkpoint(self) -> Iterator[Checkpoint]:
        with resources.as_file(resources.files("bs_exp.demo") / "model") as folder:
            yield Checkpoint(place=str(folder), dtype=resolve_dtype(self.dtype), hint=_INSTALL_AGAIN)


@dataclass(frozen=True, kw_only=True)
class LocalModel:
    """A checkpoint folder in Hugging Face format, with its tokenizer."""

    path: str
    dtype: str = "auto"
    device: str = "auto"
    offload: str = "none"
    attn_implementation: str | None = None
    trust_remote_code: bool = False
    allow_unused: bool = False
    roles: Roles | None = None

    def __post_init__(self) -> None:
        check_settings(self.dtype, self.device, self.roles)
        check_offload(self.offload, resolve_device(self.device))

    def load(self) -> LoadedModel:
        """The model of the folder, read without network; ModelError if the folder is no checkpoint."""
        checkpoint = self._checkpoint
        require_checkpoint(Path(checkpoint.place), _SAVE_ANEW)
        return _load(checkpoint, self.device, self.roles, source="local", name=checkpoint.place, offload=self.offload)

    def shapes(self) -> LoadedModel:
        """The model on the meta device. The folder needs no more than config.json; ModelError without one."""
        if not Path(self._checkpoint.place, "config.json").is_file():
            raise ModelError(f"{self._checkpoint.place} holds no config.json, which says the shapes of a model.")
        return self._checkpoint.shapes(self.roles)

    @property
    def _checkpoint(self) -> Checkpoint:
        return Checkpoint(
            place=str(Path(self.path).expanduser().resolve()),
            dtype=resolve_dtype(self.dtype),
            attn_implementation=self.attn_implementation,
            trust_remote_code=self.trust_remote_code,
            allow_unused=self.allow_unused,
            in_place=self.offload == "disk",
            hint=_SAVE_ANEW,
        )


@dataclass(frozen=True, kw_only=True)
class HubModel:
    """A checkpoint of the Hugging Face hub, read from the local cache if it is there."""

    name: str
    revision: str = "main"
    dtype: str = "auto"
    device: str = "auto"
    offload: str = "none"
    attn_implementation: str | None = None
    trust_remote_code: bool = False
    allow_unused: bool = False
    roles: Roles | None = None

    def __post_init__(self) -> None:
        check_settings(self.dtype, self.device, self.roles)
        check_offload(self.offload, resolve_device(self.device))

    def load(self) -> LoadedModel:
        """The model of this revision; the provenance holds its commit. ModelError if it cannot be read."""
        if Path(self.name).is_dir():
            # transformers would quietly prefer the folder.
            raise ConfigError(
                f"model.name={self.name} is a folder here, not only a name on the hub. "
                f"Use model=local model.path={self.name}, or run from another directory."
            )
        checkpoint = self._checkpoint(_HUB_HINT).pinned()
        return _load(checkpoint, self.device, self.roles, source="hub", name=self.name, offload=self.offload)

    def shapes(self) -> LoadedModel:
        """The model on the meta device. ModelError if no configuration can be found."""
        return self._checkpoint(
            "For an estimate without a network, put the model's config.json into a folder and name it: model=DIR."
        ).shapes(self.roles)

    def _checkpoint(self, hint: str) -> Checkpoint:
        return Checkpoint(
            place=self.name,
            revision=self.revision,
            dtype=resolve_dtype(self.dtype),
            attn_implementation=self.attn_implementation,
            trust_remote_code=self.trust_remote_code,
            allow_unused=self.allow_unused,
            in_place=self.offload == "disk",
            hint=hint,
        )


def check_settings(dtype: str, device: str, roles: Roles | None) -> None:
    """ConfigError for an unknown dtype, a device that does not exist here, or a role that is no matrix type."""
    resolve_dtype(dtype)
    resolve_device(device)
    read_roles(roles)


def resolve_dtype(name: str) -> torch.dtype | str:
    """The dtype of a setting; `auto` stays `auto` (the dtype in which the checkpoint is stored)."""
    check_choice("dtype", name, tuple(_DTYPES))
    return _DTYPES[name]


def resolve_device(name: str) -> torch.device:
    """The device of a setting; `auto` is the first CUDA device, else the CPU. ConfigError if it does not exist here."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError) as error:
        raise ConfigError(f"device must be auto, cpu, cuda, cuda:N, mps or xpu, got {shown(name)}.") from error
    if device.type not in ("cpu", "cuda", "mps", "xpu"):
        raise ConfigError(f"device must be auto, cpu, cuda, cuda:N, mps or xpu, got {shown(name)}.")
    if device.type in ("mps", "xpu") and not getattr(torch, device.type).is_available():
        raise ConfigError(
            f"device is {name!r}, which torch {torch.__version__} does not have here. Use model.device=cpu or auto."
        )
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise ConfigError(
            f"device is {name!r}, but torch {torch.__version__} sees {torch.cuda.device_count()} CUDA devices here. "
            "Use model.device=cpu or auto, or install a CUDA build of torch."
        )
    return device


def assemble(
    module: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    roles: Roles | None,
    *,
    source: str,
    name: str,
    task: Task = Task.CAUSAL_LM,
    revision: str | None = None,
) -> LoadedModel:
    """A model in eval mode with its architecture and its provenance (fingerprint included)."""
    module.eval()
    architecture = find_architecture(module, roles)
    provenance = {
        "source": source,
        "name": name,
        "revision": revision,
        "dtype": str(module.dtype).removeprefix("torch."),
        "device": str(module.device),
        "family": architecture.family,
        "task": task.value,
        "parameters": module.num_parameters(),
        "fingerprint": fingerprint(module),
    }
    return LoadedModel(module, tokenizer, architecture, provenance, task)


def _load(
    checkpoint: Checkpoint, device: str, roles: Roles | None, *, source: str, name: str, offload: str = "none"
) -> LoadedModel:
    found = checkpoint.read()
    if offload == "none":
        found.module.to(resolve_device(device))  # type: ignore[arg-type]
    else:
        place(found.module, find_architecture(found.module, roles).blocks, resolve_device(device))
    revision = checkpoint.revision
    loaded = assemble(
        found.module, found.tokenizer, roles, source=source, name=name, task=found.task, revision=revision
    )
    provenance = dict(loaded.provenance)
    told = {"unused_weights": list(found.unused) or None, "odd_files": found.odd}
    provenance |= {name: value for name, value in told.items() if value}
    sentence = read_sentence_model(file_finder(source, checkpoint.place, revision), name)
    if sentence is None:
        return replace(loaded, provenance=provenance)
    provenance["sentence_transformers"] = {
        "pooling": None
        if sentence.pooling is None
        else asdict(sentence.pooling) | {"modes": list(sentence.pooling.modes)},
        "other_modules": list(sentence.others),
    }
    return replace(loaded, provenance=provenance, pooling=sentence.pooling)
