"""A saved model brings the files of its checkpoint's tokenizer and processors along, and nothing else of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bs_exp.models.processor_files import copy_missing, processor_files
from bs_exp.models.saving import save_model
from bs_exp.models.tiny import tiny_random

# As in a folder of gemma3 with vision, and of a few others.
BROUGHT = {
    "preprocessor_config.json": json.dumps({"image_processor_type": "Gemma3ImageProcessor", "do_resize": True}),
    "processor_config.json": json.dumps({"processor_class": "Gemma3Processor", "image_seq_length": 256}),
    "video_preprocessor_config.json": "{}",
    "audio_tokenizer_config.json": "{}",
    "chat_template.json": json.dumps({"chat_template": "{{ messages }}"}),
    "additional_chat_templates/rag.jinja": "{{ documents }}",
    "tokenizer.model": "sentencepiece",
    "added_tokens.json": "{}",
    "vocab.json": "{}",
    "merges.txt": "a b",
    "spiece.model": "sentencepiece",
}
LEFT = {
    "README.md": "words",
    "processing_gemma3.py": "raise SystemExit",
    "tokenizer_code.py": "raise SystemExit",
    "pytorch_model.bin": "weights",
    "tokenizer.safetensors": "weights",
    "optimizer.pt": "weights",
    "generation_config.json.bak": "{}",
    "onnx/tokenizer.json": "{}",
}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A checkpoint with files of processors, and with others."""
    dense = tiny_random()
    folder = save_model(dense.module, dense.tokenizer, tmp_path / "source")
    for name, text in {**BROUGHT, **LEFT}.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    return folder


def names_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_a_run_saves_the_files_of_the_source_folder(
    cli: Callable[..., Any], tiny: tuple[str, ...], source: Path, tmp_path: Path
) -> None:
    own = (source / "tokenizer_config.json").read_text()
    settings = ("model=local", f"model.path={source}", "save_model=true", f"hydra.run.dir={tmp_path}/out")
    done = cli(*tiny, *settings)
    assert done.status == 0, done.err
    saved = tmp_path / "out" / "model"
    assert {name: (saved / name).read_text() for name in BROUGHT} == BROUGHT
    assert names_in(saved) & LEFT.keys() <= {"README.md"}, "its own card, and not that of the source"
    assert (saved / "README.md").read_text() != LEFT["README.md"]
    # Those that the tokenizer writes are its own.
    assert json.loads((saved / "tokenizer_config.json").read_text()).items() >= json.loads(own).items()


def test_files_that_are_there_stay(tmp_path: Path) -> None:
    kept, other = tmp_path / "kept.json", tmp_path / "other.json"
    kept.write_text("kept")
    other.write_text("other")
    copy_missing({"kept.json": other, "deep/new.json": other}, tmp_path)
    assert kept.read_text() == "kept" and (tmp_path / "deep" / "new.json").read_text() == "other"


def test_only_files_are_taken_from_a_folder(source: Path) -> None:
    (source / "tokenizer_of_old.json").mkdir()
    (source / "vocab.txt").symlink_to(source / "missing")
    found = processor_files({"source": "local", "name": str(source)})
    assert found.keys() >= BROUGHT.keys() and not found.keys() & {"tokenizer_of_old.json", "vocab.txt", "config.json"}


def test_models_of_no_checkpoint_have_none_and_a_hub_out_of_reach_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    assert processor_files(tiny_random().provenance) == {}
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert processor_files({"source": "hub", "name": "nobody/nothing", "revision": None}) == {}


def test_files_of_a_hub_model_come_from_its_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = "0" * 40
    repository = tmp_path / "models--nobody--nothing"
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    (snapshot / "preprocessor_config.json").write_text("{}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path))
    found = processor_files({"source": "hub", "name": "nobody/nothing", "revision": commit})
    assert found == {"preprocessor_config.json": snapshot / "preprocessor_config.json"}
