"""Folders of sentence-transformers: pooling as they say, carried to the compressed model, damaged ones refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import bs_exp
from bs_exp.errors import ModelError
from bs_exp.models.loading import LocalModel
from bs_exp.models.model_inputs import hidden_states
from bs_exp.models.pooling import pooled
from bs_exp.types import Pooling
from tests.support.encoders import headless, sentence_folder

TEXTS = ["a first text, which is the longest of them", "another", "and a third"]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    ("mode", "wanted"),
    [
        ("cls", lambda h: h[0]),
        ("lasttoken", lambda h: h[-1]),
        ("max", lambda h: h.max(0).values),
        ("mean", lambda h: h.sum(0) / len(h)),
        ("mean_sqrt_len_tokens", lambda h: h.sum(0) / len(h) ** 0.5),
        ("weightedmean", lambda h: sum((i + 1) * row for i, row in enumerate(h)) / sum(range(1, len(h) + 1))),
    ],
)
def test_every_way_of_pooling_leaves_padding_out(mode: Any, wanted: Callable[..., Any], side: str) -> None:
    """Oracle: the definition, on the tokens of each text alone."""
    hidden = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    mask = mask.flip(1) if side == "left" else mask
    tokens = hidden[0, 2:] if side == "left" else hidden[0, :3]
    found = pooled(hidden, mask, Pooling(modes=(mode, "mean"), normalize=True))
    rows = [torch.cat([wanted(text), text.mean(0)]) for text in (tokens, hidden[1])]
    torch.testing.assert_close(found, torch.stack([row / row.norm() for row in rows]))


@pytest.mark.parametrize(
    ("config", "modes"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, ("cls",)),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": True}, ("max", "mean")),
        ({"pooling_mode": "lasttoken", "pooling_mode_mean_tokens": True}, ("lasttoken",)),
        ({"embedding_dimension": 32, "pooling_mode": ["mean", "cls"]}, ("mean", "cls")),
        ({"word_embedding_dimension": 32}, ("mean",)),
    ],
)
def test_pooling_is_read(tmp_path: Path, config: dict[str, Any], modes: tuple[str, ...]) -> None:
    model = LocalModel(path=str(sentence_folder(tmp_path, config))).load()
    assert model.pooling == Pooling(modes=modes, normalize=True, max_length=64)  # type: ignore[arg-type]
    assert model.provenance["sentence_transformers"]["pooling"]["modes"] == list(modes)


def test_other_modules_are_named_and_carried(tmp_path: Path) -> None:
    folder = sentence_folder(tmp_path / "dense", {}, between="Dense")
    model = LocalModel(path=str(folder)).load()
    assert model.pooling is None
    assert model.provenance["sentence_transformers"]["other_modules"] == ["Dense"]
    made = bs_exp.compress(str(folder), texts=TEXTS * 200, preset="svd", overrides=["calibration.sequence_length=32"])
    saved = made.save(tmp_path / "saved")
    for name in ("modules.json", "1_Pooling/config.json", "2_Dense/config.json", "sentence_bert_config.json"):
        assert (saved / name).read_bytes() == (folder / name).read_bytes()


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("modules.json", "{", "Cannot read modules.json"),
        ("modules.json", '[{"type": "x.Transformer", "path": "../up"}]', "no list of modules"),
        ("modules.json", '[{"type": "x.Transformer", "path": "0_Transformer"}]', "name the transformer's folder"),
        ("1_Pooling/config.json", '{"pooling_mode": "median"}', "names no way of pooling; known are cls"),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, file: str, content: str, message: str) -> None:
    folder = sentence_folder(tmp_path, {})
    (folder / file).write_text(content)
    with pytest.raises(ModelError, match=message):
        LocalModel(path=str(folder)).load()


def test_sentence_transformers_loads_what_is_saved(tmp_path: Path) -> None:
    """Oracle: the library itself. Its embeddings of the dense folder are ours, and those of the saved one too."""
    library = pytest.importorskip(
        "sentence_transformers", reason="needs the extra bs-exp[embeddings], which dev does not install"
    )
    folder = sentence_folder(tmp_path / "dense", {})
    made = bs_exp.compress(str(folder), texts=TEXTS * 200, preset="svd", overrides=["calibration.sequence_length=32"])
    saved = made.save(tmp_path / "saved")
    pooling = LocalModel(path=str(folder)).load().pooling
    assert pooling is not None
    for place, module in ((folder, headless().module), (saved, made.model)):
        theirs = library.SentenceTransformer(str(place), device="cpu").encode(TEXTS, convert_to_tensor=True)
        given = made.tokenizer(TEXTS, padding=True, return_tensors="pt")
        inputs = {name: given[name] for name in ("input_ids", "attention_mask")}
        with torch.no_grad():
            ours = pooled(hidden_states(module, inputs), inputs["attention_mask"], pooling)
        torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)
    assert json.loads((saved / "modules.json").read_text())[0]["path"] == ""
