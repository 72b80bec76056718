"""A key changes with everything that a result depends on, one by one; what cannot be known has no key."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bs_exp.cache import Cache
from bs_exp.corpora.text_files import TextFiles
from bs_exp.corpora.windows import CalibrationSet
from bs_exp.evaluation.accuracy import Accuracy
from bs_exp.evaluation.perplexity import Perplexity
from bs_exp.models.fingerprint import fingerprint
from bs_exp.models.tiny import tiny_random
from bs_exp.protocols import Evaluator
from bs_exp.runs import content_keys
from bs_exp.runs.content_keys import content_read, evaluated_windows_key, tokenizer_hash, windows_key
from bs_exp.runs.stored_values import EVALUATED, TOKENISATION, find_data, find_windows, store_data, store_windows
from bs_exp.types import LoadedModel


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("the model reads a text of some words " * 20)
    return path


def _perplexity(text: Path, **settings: Any) -> Perplexity:
    given: dict[str, Any] = {
        "sequence_length": 16, "stride": None, "tail": "drop", "average": "tokens", "max_windows": None,
        "batch_size": 2, "special_tokens": False,
    }  # fmt: skip
    return Perplexity(corpora={"text": TextFiles(files=[str(text)])}, **(given | settings))


def _calibration(text: Path, **settings: Any) -> CalibrationSet:
    given: dict[str, Any] = {
        "num_sequences": "all", "sequence_length": 16, "order": "sequential", "batch_size": 2, "seed": 0,
        "special_tokens": False,
    }  # fmt: skip
    return CalibrationSet(corpus=TextFiles(files=[str(text)]), **(given | settings))


def evaluation_key(evaluator: Evaluator, model: LoadedModel) -> str | None:
    return content_keys.evaluation_key(evaluator, content_read(evaluator), model)


def _refreshed(model: LoadedModel) -> LoadedModel:
    return replace(model, provenance={**model.provenance, "fingerprint": fingerprint(model.module)})


def _other_weight(model: LoadedModel) -> LoadedModel:
    with torch.no_grad():
        next(model.module.parameters()).view(-1)[0] += 1.0
    return _refreshed(model)


def _other_configuration(model: LoadedModel) -> LoadedModel:
    model.module.config.rms_norm_eps *= 2
    return _refreshed(model)


def _other_dtype(model: LoadedModel) -> LoadedModel:
    return _refreshed(replace(model, module=model.module.to(torch.bfloat16)))


def _other_attention(model: LoadedModel) -> LoadedModel:
    model.module.set_attn_implementation("eager")
    return model


def _other_tokenizer(model: LoadedModel) -> LoadedModel:
    model.tokenizer.add_tokens(["words"])
    return model


class _Subclass(torch.nn.SiLU):
    """A part of a model by code of others."""


def _other_code(model: LoadedModel) -> LoadedModel:
    model.module.model.layers[0].mlp.act_fn = _Subclass().eval()
    return model


@pytest.mark.parametrize(
    "change",
    [_other_weight, _other_configuration, _other_dtype, _other_attention, _other_tokenizer, _other_code],
)
def test_another_model_has_another_key(change: Callable[[LoadedModel], LoadedModel], text: Path) -> None:
    evaluator = _perplexity(text)
    before = evaluation_key(evaluator, tiny_random("llama"))
    assert before is not None
    assert evaluation_key(evaluator, tiny_random("llama")) == before
    assert evaluation_key(evaluator, change(tiny_random("llama"))) not in (before, None)


@pytest.mark.parametrize("name", ["machine", "versions", "package_hash"])
def test_another_machine_library_or_version_of_this_package_has_another_key(
    name: str, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, evaluator, calibration = tiny_random("llama"), _perplexity(text), _calibration(text)
    keys = evaluation_key(evaluator, model), windows_key(calibration, model.tokenizer)
    monkeypatch.setattr(content_keys, name, lambda *_: {"other": "one"} if name != "package_hash" else "other")
    assert evaluation_key(evaluator, model) != keys[0]
    # Token ids are the same on every machine.
    assert (windows_key(calibration, model.tokenizer) == keys[1]) == (name == "machine")


def test_the_machine_is_told_by_threads_and_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    before = content_keys.machine(torch.device("cpu"))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 97)
    assert content_keys.machine(torch.device("cpu")) != before
    monkeypatch.undo()
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "medium")
    assert content_keys.machine(torch.device("cpu")) != before


def test_the_package_is_hashed_with_its_task_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashes = set()
    for name, content in (("a.py", "x = 1"), ("a.py", "x = 2"), ("b.py", "x = 2"), ("c.yaml", "x: 2")):
        for old in tmp_path.iterdir():
            old.unlink()
        (tmp_path / name).write_text(content)
        monkeypatch.setattr(content_keys, "_PACKAGE", tmp_path)
        hashes.add(content_keys.package_hash.__wrapped__())
    assert len(hashes) == 4


def test_other_text_and_other_settings_have_other_keys(text: Path) -> None:
    model = tiny_random("llama")
    ways: list[Callable[..., Any]] = [
        lambda **s: evaluation_key(_perplexity(text, **s), model),
        lambda **s: windows_key(_calibration(text, **s), model.tokenizer),
    ]
    for key in ways:
        before = key()
        assert before is not None
        assert len({before, key(sequence_length=8), key(batch_size=1), key(special_tokens=True)}) == 4
        content = text.read_text()
        text.write_text(content + "x")  # under the same name
        assert key() not in (before, None)
        text.write_text(content)
        assert key() == before


def test_windows_of_another_tokenizer_have_another_key(text: Path) -> None:
    tokenizer, other = tiny_random("llama").tokenizer, tiny_random("llama").tokenizer
    assert tokenizer_hash(tokenizer) == tokenizer_hash(other)
    other.add_special_tokens({"additional_special_tokens": ["<new>"]})
    assert tokenizer_hash(tokenizer) != tokenizer_hash(other)
    assert windows_key(_calibration(text), tokenizer) != windows_key(_calibration(text), other)


def test_items_and_files_of_tasks_are_in_the_key(tmp_path: Path) -> None:
    (tmp_path / "items.json").write_text('[{"context": "a b", "choices": ["c", "d"], "answer": 0}]')
    (tmp_path / "mine.yaml").write_text(
        "task: mine\ndataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {tmp_path}/items.json}}}}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: context\ndoc_to_choice: choices\n"
        "doc_to_target: answer\nmetric_list: [{metric: acc}]\n"
    )
    task = Accuracy(
        tasks=["mine"], limit=None, num_fewshot=None, batch_size=1, seed=0, include_path=[str(tmp_path)]
    )  # fmt: skip
    model = tiny_random("llama")
    first = evaluation_key(task, model)
    assert first is not None and evaluation_key(task, model) == first
    (tmp_path / "items.json").write_text('[{"context": "a b", "choices": ["c", "d"], "answer": 1}]')
    second = evaluation_key(task, model)
    (tmp_path / "helper.py").write_text("x = 1")
    assert len({first, second, evaluation_key(task, model), None}) == 4


@dataclass(frozen=True)
class _Silent:
    """An evaluator that does not say what it reads."""

    def check(self, model: LoadedModel) -> None: ...

    def evaluate(self, model: LoadedModel) -> Mapping[str, float | str]:
        return {}


def test_what_cannot_be_known_has_no_key(text: Path) -> None:
    model = tiny_random("llama")
    assert evaluation_key(_Silent(), model) is None
    assert evaluation_key(_perplexity(text.parent / "none.txt"), model) is None
    handle = model.module.model.layers[0].register_forward_hook(lambda *_: None)
    assert evaluation_key(_perplexity(text), model) is None
    handle.remove()
    model.module.train()
    assert evaluation_key(_perplexity(text), model) is None


@pytest.mark.parametrize("stored", [True, False], ids=["folder", "memory"])
def test_data_and_windows_come_back_as_they_were(stored: bool, tmp_path: Path, text: Path) -> None:
    cache = Cache(tmp_path / "cache" if stored else None)
    data = {"metrics": {"ppl/text": 0.1 + 0.2, "ppl/other": float("inf"), "device": "cpu"}, "run_id": "a-b"}
    assert find_data(cache, "dense_evaluation", "k") is None
    store_data(cache, "dense_evaluation", "k", data)
    assert find_data(cache, "dense_evaluation", "k") == data
    tokenizer = tiny_random("llama").tokenizer
    evaluated = _perplexity(text, tail="keep", special_tokens="per_window").texts()["text"].windows(tokenizer)
    assert evaluated.tail is not None
    for kind, windows in ((TOKENISATION, _calibration(text).windows(tokenizer)), (EVALUATED, evaluated)):
        store_windows(cache, kind, "k", windows)
        found = find_windows(cache, kind, "k")
        assert found is not None and torch.equal(found.ids, windows.ids) and found.feeding == windows.feeding
        assert (found.tail is None) == (windows.tail is None)
        assert found.tail is None or torch.equal(found.tail, windows.tail)  # type: ignore[arg-type]
        assert dict(found.provenance) == dict(windows.provenance)


def test_evaluated_windows_are_known_by_what_they_are_cut_by(text: Path) -> None:
    """How many are read at once, and how losses are averaged, makes no other windows."""

    def key(**settings: Any) -> str:
        evaluator = _perplexity(text, **settings)
        return evaluated_windows_key(evaluator.texts()["text"], evaluator.content()["text"], "tokenizer")

    before = key()
    assert key(batch_size=1, average="windows") == before
    changes = ({"sequence_length": 8}, {"stride": 4}, {"max_windows": 2}, {"tail": "keep"}, {"special_tokens": True})
    assert len({before, *(key(**change) for change in changes)}) == 6
    text.write_text(text.read_text() + "x")
    assert key() != before
