"""bs_exp from Python: the same results as the command line, and nothing changed that is the caller's."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from transformers import AutoModelForCausalLM

import bs_exp
from bs_exp.errors import ConfigError, DataError, ModelError
from bs_exp.models.tiny import tiny_random
from bs_exp.records.record import read_record
from bs_exp.whitening.gram import GramWhitening

PAGE = Path(__file__).parents[1] / "docs" / "python.md"
SHORT = ["calibration.sequence_length=64"]


@pytest.fixture(scope="module")
def documents(texts: Path) -> list[str]:
    return [(texts / name).read_text() for name in ("A.txt", "B.txt")]


def test_a_model_in_memory_stays_as_it_is(documents: list[str]) -> None:
    dense = tiny_random()
    model = dense.module.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    state = torch.random.get_rng_state()
    result = bs_exp.compress(model, dense.tokenizer, documents, overrides=SHORT, quiet=True)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not GlobalHydra.instance().is_initialized()
    assert result.model is not model and 0.7 < result.size["retain_ratio"] <= 0.8
    assert result.model.get_input_embeddings().weight is model.get_input_embeddings().weight
    assert {spectrum.group for spectrum in result.spectra} == {planned.group for planned in result.plan.groups}
    report = result.report()
    assert "of the targeted parameters (asked: 80.0%)" in report and "q         0" in report


@pytest.mark.parametrize("preset", ["svd_llm", "basis_sharing"])
def test_it_is_what_the_command_line_makes(cli: Callable[..., Any], texts: Path, tmp_path: Path, preset: str) -> None:
    dense = tiny_random()
    dense.module.save_pretrained(tmp_path / "dense")
    dense.tokenizer.save_pretrained(tmp_path / "dense")
    dials = ["calibration.sequence_length=64", "calibration.order=sequential"]
    done = cli(
        "model=local", f"model.path={tmp_path}/dense", f"experiment={preset}", "retain_ratio=0.6", "calibration=text",
        f"calibration.files=[{texts}/A.txt]", "calibration.num_sequences=all", *dials, "evaluation=smoke",
        "tracking=none", "save_model=true", "hydra.run.dir=out",
    )  # fmt: skip
    assert done.status == 0, done.err
    for given in (dense.module, tmp_path / "dense"):
        found = bs_exp.compress(
            given, dense.tokenizer, texts / "A.txt", preset=preset, retain_ratio=0.6, overrides=dials, quiet=True
        )
        plan = {key: value for key, value in (read_record(Path("out")).plan or {}).items() if key != "rounds"}
        assert found.plan.to_dict() == plan
        saved = AutoModelForCausalLM.from_pretrained("out/model").state_dict()
        assert all(torch.equal(value, saved[name]) for name, value in found.model.state_dict().items())


def test_windows_are_clipped_to_the_model_with_a_note(documents: list[str]) -> None:
    dense = tiny_random()
    dense.module.config.max_position_embeddings = 48
    result = bs_exp.compress(dense.module, dense.tokenizer, documents, preset="svd_llm", quiet=True)
    assert result.calibration["sequence_length"] == 48
    assert result.notes == ("calibration windows of 48 tokens instead of 512: the model's context",)


def test_saved_and_loaded_and_judged(documents: list[str], tmp_path: Path) -> None:
    dense = tiny_random()
    result = bs_exp.compress(dense.module, dense.tokenizer, documents, overrides=SHORT, quiet=True)
    loaded = bs_exp.load(result.save(tmp_path / "model"))
    dials = ["evaluation.sequence_length=64", "evaluation.max_windows=2"]
    values = [
        bs_exp.evaluate(model, loaded.tokenizer, {"mine": documents}, overrides=dials)["ppl/mine"]
        for model in (result.model, loaded.model, dense.module)
    ]
    assert values[0] == values[1] != values[2]
    accuracy = bs_exp.evaluate(loaded.model, loaded.tokenizer, tasks=["docs_cloze"], overrides=["evaluation.limit=4"])
    assert 0.0 <= float(accuracy["acc/docs_cloze"]) <= 1.0


def test_a_strategy_has_the_defaults_of_its_file() -> None:
    assert bs_exp.strategy("whitening=gram") == GramWhitening(ridge=1e-12)
    assert bs_exp.strategy("whitening=gram", ridge=0.5) == GramWhitening(ridge=0.5)
    assert bs_exp.strategy("precision=int4", group_size=None).group_size is None
    assert bs_exp.strategy("sharing=explicit", layers={"q": [[0, 1]]}).layers == {"q": ((0, 1),)}
    with pytest.raises(ConfigError, match=r"whitening=gram has no setting rige\. Did you mean ridge\?"):
        bs_exp.strategy("whitening=gram", rige=0.5)
    with pytest.raises(ConfigError, match="takes a group and one of its options"):
        bs_exp.strategy("whitening")


@pytest.mark.parametrize(("family", "metric"), [("bert", "masked_ppl/a"), ("t5", "seq2seq_ppl/a")])
def test_other_models_are_judged_by_their_own_loss(family: str, metric: str, documents: list[str]) -> None:
    """And not by how like themselves they are."""
    dense = tiny_random(family)
    result = bs_exp.compress(
        dense.module, dense.tokenizer, documents, preset="svd", retain_ratio=0.1, overrides=SHORT, quiet=True
    )
    short = ["evaluation.sequence_length=64", "evaluation.max_windows=4"]
    before, after = (
        bs_exp.evaluate(model, dense.tokenizer, {"a": documents}, overrides=short)
        for model in (dense.module, result.model)
    )
    assert before[metric] != after[metric] and min(float(before[metric]), float(after[metric])) > 1.0


def test_what_is_wrong_is_said_before_any_work(documents: list[str], tmp_path: Path) -> None:
    model, tokenizer = tiny_random().module, tiny_random().tokenizer
    for arguments, dials, message in (
        ((model,), {}, "needs its tokenizer"),
        (
            (model, tokenizer, documents),
            {"preset": "svd_lm"},
            r"experiment=svd_lm does not exist\. Did you mean svd_llm\?",
        ),
        ((model, tokenizer, documents), {"overrides": ["sharing.size=3"]}, r"sharing\.size does not exist"),
        ((model, tokenizer, documents), {"retain_ratio": 1.5}, r"retain_ratio must be above 0 and at most 1"),
        ((model, tokenizer, [1, 2]), {}, "texts must be a list of texts, but element 0 is 1"),
        ((model, tokenizer, 5), {}, "texts must be a list of texts, one for each document, got 5"),
        ((model, tokenizer, {"val": "text"}), {}, r"texts must be a list of texts.* got \{val: 'text'\}"),
        ((torch.nn.Linear(3, 3), tokenizer, documents), {}, "a model of Transformers, a folder or a name.* got Linear"),
        ((model, tokenizer, documents), {"overrides": "layout=pivoted"}, "overrides is a list of settings"),
        ((model, tokenizer, ""), {}, "texts is an empty string"),
        (
            (model, tokenizer),
            {"data": ["a text " * 99]},
            r"data must be .* got \['a text .{,90} \.\.\.\. Give texts in memory",
        ),
        ((model, tokenizer, documents), {"data": "wikitext2"}, "both name a text"),
        (("DIR", "TEXT.txt"), {}, r"the second argument of compress is a tokenizer, got 'TEXT\.txt'\. Texts are named"),
        (("DIR", documents), {}, "the second argument of compress is a tokenizer"),
    ):
        with pytest.raises(ConfigError, match=message):
            bs_exp.compress(*arguments, **dials, quiet=True)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="no text in them"):
        bs_exp.compress(model, tokenizer, ["", " "], quiet=True)
    with pytest.raises(ConfigError, match="needs texts"):
        bs_exp.evaluate(model, tokenizer)
    with pytest.raises(ConfigError, match=r"texts by name, as in \{'val': texts\}, got \['"):
        bs_exp.evaluate(model, tokenizer, documents)  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="has a shape and no values"):
        bs_exp.compress(tiny_random().module.to("meta"), tokenizer, documents, quiet=True)


def test_a_generator_of_texts_is_read_once(documents: list[str]) -> None:
    dense = tiny_random()
    listed, generated = (
        bs_exp.compress(dense.module, dense.tokenizer, given, overrides=SHORT, quiet=True)
        for given in (documents, (text for text in documents))
    )
    assert listed.plan == generated.plan and listed.calibration["sha256"] == generated.calibration["sha256"]


def test_nothing_is_lost_by_saving(documents: list[str], tmp_path: Path) -> None:
    """Neither the model that was compressed, nor metrics that belong to none of the two."""
    dense = tiny_random()
    place = bs_exp.save_model(dense.module, dense.tokenizer, tmp_path / "dense")
    result = bs_exp.compress(place, texts=documents, overrides=SHORT, quiet=True)
    with pytest.raises(ConfigError, match="holds the model that is compressed"):
        result.save(place)
    with pytest.raises(ConfigError, match=r"metrics holds what evaluate found of each model.* got \{ppl/a: 3.0\}"):
        result.save(tmp_path / "new", metrics={"ppl/a": 3.0})  # type: ignore[dict-item]
    assert not (tmp_path / "new").exists()
    with pytest.raises(ModelError, match="is compressed already"):
        bs_exp.compress(result.model, result.tokenizer, documents, quiet=True)


def test_a_result_says_in_a_line_what_it_is(documents: list[str]) -> None:
    dense = tiny_random()
    settings = ["calibration.sequence_length=64"]
    result = bs_exp.compress(dense.module, dense.tokenizer, documents, overrides=settings, quiet=True)
    assert re.fullmatch(
        r"<Compression to 0\.8: \d+ groups, [\d.]+ KiB of [\d.]+ KiB; report\(\) says more>", repr(result)
    )


def test_a_missing_folder_is_not_looked_for_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "OUT").mkdir()
    for name in ("nowhere", "OUT/model", tmp_path / "none"):
        with pytest.raises(ModelError, match=r"is no folder\. Name one that"):
            bs_exp.load(name)


def test_the_page_runs_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL):
        exec(compile(block, str(PAGE), "exec"), names)
    assert (tmp_path / "spectra.png").stat().st_size > 10_000 and (tmp_path / "compressed" / "config.json").exists()
    assert float(names["found"]["ppl/mine"]) > 1.0 and names["whitening"] == GramWhitening(ridge=1e-9)
