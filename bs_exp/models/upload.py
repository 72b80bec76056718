"""Uploading a saved model to the Hugging Face hub: whole, checked against its checksums, and nothing else."""

from __future__ import annotations

import json
import re
import tempfile
from fnmatch import fnmatchcase
from pathlib import Path

import httpx
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils._validators import validate_repo_id

from bs_exp.errors import ConfigError, ModelError, UploadError
from bs_exp.models.modeling_basis_sharing import REMOTE_MODULE, check_files
from bs_exp.models.processor_files import copied_files

# What stands in a card for the name that the model has on the hub.
PLACE = "PATH/TO/THIS/MODEL"
_CARD = "README.md"
_MODEL = (
    *("config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json"),
    *(f"{REMOTE_MODULE}.py", _CARD, "recipe.yaml", "LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY.md"),
    *("adapter/adapter_config.json", "adapter/adapter_model.safetensors"),
)
_PICKLED = ".bin"  # older modules of sentence-transformers
_SECRET = re.compile(r"token(?!iz)|secret|password|credential|\.env", re.IGNORECASE)


def files_to_upload(folder: Path) -> tuple[list[str], list[str]]:
    """Names of the files in a saved model that go up, and of those that stay, both in alphabetical order.

    Up go weights as safetensors, configuration, tokenizer and processors, the one file of code, card, recipe and
    licence; no link, no hidden file, nothing pickled. Raises ModelError if `folder` holds no compressed model.
    """
    config = folder / "config.json"
    if not config.is_file():
        inside = f" It holds the folder model: name {folder / 'model'}." if (folder / "model").is_dir() else ""
        raise ModelError(f"{folder} is no saved model: it has no config.json.{inside}")
    try:
        data = json.loads(config.read_text(encoding="utf-8"))
        method = data.get("quantization_config", {}).get("quant_method")
    except (ValueError, AttributeError) as error:
        raise ModelError(f"{config} cannot be read: {error}. Save the model again.") from error
    if method != "basis_sharing":
        raise ModelError(
            f"{folder} holds no compressed model (quant_method is {method!r}). Upload it with `hf upload`, which takes "
            "any folder."
        )
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file() or p.is_symlink())
    wanted = {name for name in names if any(_fits(name, pattern) for pattern in _MODEL)}
    wanted |= {f"{entry.partition('.')[0]}.py" for entry in data.get("auto_map", {}).values() if isinstance(entry, str)}
    wanted |= {name for name in copied_files(folder) if not _SECRET.search(name) and not name.endswith(_PICKLED)}
    up = [name for name in names if name in wanted and not _is_outside(folder / name, folder)]
    if not any(name.endswith(".safetensors") for name in up):
        raise ModelError(f"{folder} holds no weights (model*.safetensors). Save the model again.")
    return up, [name for name in names if name not in up]


def upload(
    folder: Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> str:
    """Uploads a saved compressed model to ORG/NAME in one commit, and returns the address of the commit.

    The repository is made if it does not exist. In the card that goes up, the model has its name there. `token` is that
    of `hf auth login` or HF_TOKEN unless given; HF_ENDPOINT names another hub. Raises ConfigError for a name that the
    hub does not have, ModelError for a folder that is no compressed model or is damaged, UploadError if it is refused.
    """
    check_repo_id(repo_id)
    names, _ = files_to_upload(folder)
    _check_undamaged(folder, names)
    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as scratch:
        try:
            repo = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            operations = [CommitOperationAdd(name, _source(folder, name, repo, Path(scratch))) for name in names]
            commit = api.create_commit(
                repo,
                operations,
                commit_message="Upload a model compressed by bs_exp",
                revision=revision,
                create_pr=create_pr,
            )
        except (HfHubHTTPError, httpx.HTTPError, OSError, ValueError) as error:
            raise UploadError(
                f"{repo_id} cannot be uploaded to {api.endpoint}: {error}. Log in with `hf auth login`, or set "
                "HF_TOKEN to a token that may write there; the folder stays as it is."
            ) from error
    return str(commit.pr_url if create_pr else commit.commit_url)


def check_repo_id(repo_id: str) -> None:
    """ConfigError unless it can name a model on the hub, with its organisation."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ConfigError(f"{repo_id!r} cannot name a model on the hub: {error}") from error
    if "/" not in repo_id:
        raise ConfigError(f"A model on the hub is named ORG/NAME (or USER/NAME), got {repo_id!r}.")


def _check_undamaged(folder: Path, names: list[str]) -> None:
    weights = [folder / name for name in names if name.endswith(".safetensors") and "/" not in name]
    declared = json.loads((folder / "config.json").read_text(encoding="utf-8"))["quantization_config"].get("crc32", {})
    try:
        check_files(weights, declared)
    except ValueError as error:
        raise ModelError(f"{error} It is not uploaded.") from error


def _source(folder: Path, name: str, repo: str, scratch: Path) -> Path:
    """Where the content of a file is: the card's with the model's name in it."""
    if name != _CARD:
        return folder / name
    card = scratch / _CARD
    card.write_text((folder / name).read_text(encoding="utf-8").replace(PLACE, repo), encoding="utf-8")
    return card


def _fits(name: str, pattern: str) -> bool:
    return name.count("/") == pattern.count("/") and fnmatchcase(name, pattern)


def _is_outside(path: Path, folder: Path) -> bool:
    return path.is_symlink() or not path.resolve().is_relative_to(folder.resolve())
