"""Options of `corpus`, `calibration` and `evaluation`: the contract others script against, and the manual pages."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import get_class, instantiate
from omegaconf import DictConfig, OmegaConf

from bs_exp.cli.dials import with_dials
from bs_exp.corpora.hub_dataset import HubDataset
from bs_exp.corpora.python_docs import PythonDocs
from bs_exp.corpora.text_files import TextFiles
from bs_exp.corpora.windows import CalibrationSet
from bs_exp.evaluation.accuracy import Accuracy
from bs_exp.evaluation.draft import Draft
from bs_exp.evaluation.embeddings import Embeddings
from bs_exp.evaluation.masked_perplexity import MaskedPerplexity
from bs_exp.evaluation.mteb_scores import MtebScores
from bs_exp.evaluation.perplexity import Perplexity
from bs_exp.evaluation.seq2seq_perplexity import Seq2SeqPerplexity
from bs_exp.evaluation.similarity import Similarity
from bs_exp.evaluation.throughput import Throughput

CONF = Path(__file__).parents[2] / "conf"


def _options(group: str) -> list[str]:
    return sorted(file.stem for file in (CONF / group).glob("*.yaml") if not file.stem.startswith("_"))


def _compose(*overrides: str) -> DictConfig:
    with initialize_config_dir(config_dir=str(CONF), version_base="1.3"):
        return compose(overrides=list(overrides))


def _needed(group: str, option: str) -> list[str]:
    return [f"{group}.files=[some.txt]"] if option in ("text", "text_part") else []


def _evaluators(*overrides: str) -> dict[str, Any]:
    made: dict[str, Any] = instantiate(with_dials(_compose(*overrides)).evaluation.evaluators, _convert_="all")
    return made


def _calibration(*overrides: str) -> CalibrationSet:
    made = instantiate(with_dials(_compose(*overrides)).calibration.set, _convert_="all")
    assert isinstance(made, CalibrationSet)
    return made


def test_the_contract_of_text_calibration_and_evaluation() -> None:
    overrides = [
        "+calibration=text",
        "calibration.files=[A.txt]",
        "calibration.num_sequences=all",
        "calibration.sequence_length=512",
        "calibration.order=sequential",
        "+evaluation=text",
        "evaluation.files=[B.txt]",
        "evaluation.sequence_length=512",
    ]
    calibration = _calibration(*overrides)
    assert calibration.corpus == TextFiles(files=["A.txt"])
    assert (calibration.num_sequences, calibration.sequence_length, calibration.order) == ("all", 512, "sequential")
    assert calibration.special_tokens is False
    evaluators = _evaluators(*overrides)
    assert evaluators == {
        "perplexity": Perplexity(
            corpora={"text": TextFiles(files=["B.txt"])},
            sequence_length=512,
            stride=None,
            tail="drop",
            average="tokens",
            max_windows=None,
            batch_size=8,
            special_tokens=False,
        )
    }


@pytest.mark.parametrize("option", _options("calibration"))
def test_every_calibration_option_makes_its_set_and_turns_its_dials(option: str) -> None:
    dials = [
        "num_sequences=7",
        "sequence_length=33",
        "order=sequential",
        "batch_size=3",
        "seed=5",
        "special_tokens=true",
    ]
    made = _calibration(
        f"+calibration={option}", *_needed("calibration", option), *(f"calibration.{dial}" for dial in dials)
    )
    assert made == CalibrationSet(
        corpus=made.corpus,
        num_sequences=7,
        sequence_length=33,
        order="sequential",
        batch_size=3,
        seed=5,
        special_tokens=True,
    )


@pytest.mark.parametrize("option", ["wikitext2", "c4", "ptb", "alpaca"])
def test_the_papers_calibrate_on_256_training_windows_of_2048(option: str) -> None:
    made = _calibration(f"+calibration={option}")
    assert (made.num_sequences, made.sequence_length, made.order, made.special_tokens) == (256, 2048, "random", True)
    assert isinstance(made.corpus, HubDataset) and made.corpus.split.partition("[")[0] == "train"


def test_five_texts_are_judged_on_parts_that_no_calibration_reads() -> None:
    judged = _evaluators("+evaluation=five_texts")["perplexity"].corpora
    texts = sorted(set(_options("calibration")) - {"text", "text_part"})
    calibrated = {text: _calibration(f"+calibration={text}").corpus for text in texts}
    assert {text: (calibrated[text].split, judged[text].split) for text in judged} == {
        "wikitext2": ("train", "test"),
        "ptb": ("train", "test"),
        "c4": ("train", "validation"),
        "alpaca": ("train[:-2000]", "train[-2000:]"),
        "python_docs": ("calibration", "heldout"),
    }
    assert sorted(judged) == texts
    for text in set(texts) - {"python_docs"}:
        assert calibrated[text].path == judged[text].path


def test_the_default_calibrates_and_evaluates_on_different_splits() -> None:
    assert _calibration("+calibration=python_docs").corpus == PythonDocs(split="calibration")
    assert _evaluators("+evaluation=full")["perplexity"].corpora == {"python_docs": PythonDocs(split="heldout")}


@pytest.mark.parametrize("option", _options("evaluation"))
def test_every_evaluation_option_makes_its_evaluators(option: str) -> None:
    made = _evaluators(f"+evaluation={option}", *_needed("evaluation", option))
    kinds = {
        "perplexity": Perplexity,
        "accuracy": Accuracy,
        "throughput": Throughput,
        "draft": Draft,
        "similarity": Similarity,
        "embeddings": Embeddings,
        "mteb": MtebScores,
        "masked_perplexity": MaskedPerplexity,
        "seq2seq_perplexity": Seq2SeqPerplexity,
    }
    assert made and all(type(evaluator) is kinds[name] for name, evaluator in made.items())
    everything = {"perplexity", "accuracy", "throughput"}
    expected = {
        **dict.fromkeys(("full", "smoke", "papers"), everything),
        "similarity": {"similarity"},
        "draft": {"draft"},
        "embeddings": {"similarity", "embeddings"},
        "mteb": {"mteb"},
        "encoder": {"similarity", "masked_perplexity"},
        "seq2seq": {"similarity", "seq2seq_perplexity"},
    }
    assert set(made) == expected.get(option, {"perplexity"})


def test_corpora_can_be_added_and_exchanged() -> None:
    evaluators = _evaluators(
        "+evaluation=wikitext2",
        "+corpus@evaluation.corpora.ptb=ptb",
        "+corpus@evaluation.corpora.mine=text",
        "evaluation.corpora.mine.files=[mine.jsonl]",
    )
    assert set(evaluators["perplexity"].corpora) == {"wikitext2", "ptb", "mine"}
    calibration = _calibration("+calibration=python_docs", "corpus@calibration.corpus=c4")
    assert isinstance(calibration.corpus, HubDataset)


def test_the_papers_evaluate_three_corpora_and_seven_tasks() -> None:
    evaluators = _evaluators("+evaluation=papers")
    perplexity = evaluators["perplexity"]
    assert {name: corpus.split for name, corpus in perplexity.corpora.items()} == {
        "wikitext2": "test",
        "ptb": "test",
        "c4": "validation",
    }
    assert perplexity.corpora["c4"].max_documents == 2000
    assert (perplexity.sequence_length, perplexity.tail, perplexity.average) == (2048, "keep", "windows")
    assert len(evaluators["accuracy"].tasks) == 7


@pytest.mark.parametrize("option", _options("corpus"))
def test_every_corpus_option_is_a_full_manual_page(option: str) -> None:
    node = OmegaConf.load(CONF / "corpus" / f"{option}.yaml")
    assert set(node) - {"_target_"} == {field.name for field in dataclasses.fields(get_class(node._target_))}


@pytest.mark.parametrize("option", [*_options("evaluation")])
def test_every_field_of_an_evaluator_is_a_dial(option: str) -> None:
    cfg = with_dials(_compose(f"+evaluation={option}", *_needed("evaluation", option)))
    written = OmegaConf.to_container(cfg.evaluation.evaluators, resolve=False)
    assert isinstance(written, dict) and written
    for node in written.values():
        fields = {field.name for field in dataclasses.fields(get_class(node["_target_"]))}
        assert set(node) - {"_target_"} == fields
        assert all(re.fullmatch(r"\$\{evaluation\.\w+\}", str(node[name])) for name in fields)


def test_what_an_evaluator_sets_by_itself_is_not_the_groups_dial() -> None:
    own = "+evaluation.evaluators.perplexity.stride=7"
    made = _evaluators("+evaluation=full", "evaluation.stride=5", own)
    assert made["perplexity"].stride == 7
    assert made["perplexity"].batch_size == made["accuracy"].batch_size


def test_an_evaluator_of_others_is_handed_the_dials_that_it_names() -> None:
    cfg = _compose("+evaluation=full", "evaluation.batch_size=3")
    node = {"_target_": f"{__name__}._Foreign", "limit": 1}
    OmegaConf.update(cfg, "evaluation.evaluators.foreign", node, force_add=True)
    made = instantiate(with_dials(cfg).evaluation.evaluators.foreign)
    assert made == _Foreign(batch_size=3, limit=1, unknown="own")


@dataclasses.dataclass(frozen=True)
class _Foreign:
    batch_size: int
    limit: int | None
    unknown: str = "own"
