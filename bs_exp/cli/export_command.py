"""`bs-exp export`: a saved compressed model in a form that other tools read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bs_exp.errors import ConfigError, ModelError


def export(folder: Path, to: str, out: Path | None) -> Path:
    """The folder that the model was written to, whole or not at all.

    `to="dense"`: ordinary layers with the products of the factors, as large as the original model. Raises ModelError if
    `folder` holds no compressed model, ConfigError if `out` is there already.
    """
    folder = folder.expanduser()
    out = (out or folder.absolute().with_name(f"{folder.absolute().name}-{to}")).expanduser()
    if not (folder / "config.json").is_file():
        inside = f" It holds the folder model: bs-exp export {folder / 'model'} --to {to}." if _is_run(folder) else ""
        raise ModelError(f"{folder} is no saved model: it has no config.json.{inside}")
    if out.exists():
        raise ConfigError(f"{out} exists already. Name another folder with --out.")

    import transformers

    from bs_exp.models.auto_classes import find_auto_class
    from bs_exp.models.saving import save_model
    from bs_exp.models.surgery import to_dense

    transformers.logging.disable_progress_bar()
    config = transformers.AutoConfig.from_pretrained(folder)
    auto = find_auto_class(config, own_code=False)
    if auto is None:
        raise ModelError(f"{folder} is of no kind that bs_exp knows: model type {config.model_type!r}.")
    model: Any = auto.loader.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return save_model(to_dense(model), tokenizer, out)


def _is_run(folder: Path) -> bool:
    return (folder / "model" / "config.json").is_file()
