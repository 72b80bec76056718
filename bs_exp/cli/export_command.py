"""`bs-exp export`: a saved compressed model in a form that other tools read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bs_exp.errors import ConfigError, ModelError

# How a model can be written, and what that is.
FORMS = {
    "dense": "ordinary layers with the products of the factors",
    "onnx": "a graph for onnxruntime that multiplies by both factors",
}


@dataclass(frozen=True)
class Exported:
    """The folder that the model was written to, and what is to be known of it, by title."""

    folder: Path
    facts: Mapping[str, str] = field(default_factory=dict)


def export(folder: Path, to: str, out: Path | None) -> Exported:
    """Writes the model of a folder in another form (`FORMS`), whole or not at all.

    `to="dense"` is as large as the original model, `to="onnx"` as the compressed one. Raises ModelError if `folder`
    holds no compressed model, or none that has this form; ConfigError if `out` is there already, or a package is not.
    """
    folder = folder.expanduser()
    out = (out or folder.absolute().with_name(f"{folder.absolute().name}-{to}")).expanduser()
    if not (folder / "config.json").is_file():
        inside = f" It holds the folder model: bs-exp export {folder / 'model'} --to {to}." if _is_run(folder) else ""
        raise ModelError(f"{folder} is no saved model: it has no config.json.{inside}")
    if out.exists():
        raise ConfigError(f"{out} exists already. Name another folder with --out.")

    import transformers

    transformers.logging.disable_progress_bar()
    return _onnx(folder, out) if to == "onnx" else _dense(folder, out)


def _dense(folder: Path, out: Path) -> Exported:
    import transformers

    from bs_exp.models.auto_classes import find_auto_class
    from bs_exp.models.saving import save_model
    from bs_exp.models.surgery import to_dense

    config = transformers.AutoConfig.from_pretrained(folder)
    auto = find_auto_class(config, own_code=False)
    if auto is None:
        raise ModelError(f"{folder} is of no kind that bs_exp knows: model type {config.model_type!r}.")
    model: Any = auto.loader.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return Exported(save_model(to_dense(model), tokenizer, out))


def _onnx(folder: Path, out: Path) -> Exported:
    from bs_exp.serving.onnx_export import export_onnx, settings_of

    done = export_onnx(folder, out)
    return Exported(done.folder, settings_of(done))


def _is_run(folder: Path) -> bool:
    return (folder / "model" / "config.json").is_file()
