"""README.md and recipe.yaml of a saved model: read by the hub's own reader, true to the record, enough to repeat it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from transformers.pipelines import PIPELINE_REGISTRY

import bs_exp
from bs_exp.models.licence import licence_lines
from bs_exp.models.tiny import tiny_random
from bs_exp.models.upload import PLACE
from bs_exp.records.record import read_record
from bs_exp.reporting import formats
from bs_exp.runs.model_card import RunRecipe, model_card, write_card
from bs_exp.types import Task

PYTHON = re.compile(r"```python\n(.*?)```", re.DOTALL)


def table(card: str) -> dict[str, list[str]]:
    """Rows of the card's table by their first cell."""
    rows = [line.strip("| ").split(" | ") for line in card.splitlines() if line.startswith("| ")]
    return {name: cells for name, *cells in rows}


def commands(card: str) -> Iterator[list[str]]:
    for block in re.findall(r"```sh\n(.*?)```", card, re.DOTALL):
        yield from (shlex.split(line) for line in block.splitlines())


@pytest.fixture(scope="module")
def result(texts: Path) -> bs_exp.Compression:
    dense = tiny_random()
    text = (texts / "A.txt").read_text()
    return bs_exp.compress(
        dense.module,
        dense.tokenizer,
        [text],
        preset="best",
        overrides=["calibration.sequence_length=64", "schedule=single"],
        quiet=True,
    )


def test_the_command_that_the_card_prints_makes_the_same_model(
    cli: Callable[..., Any], texts: Path, tmp_path: Path
) -> None:
    """From a local model and files: their places are asked for, and nothing of this machine is told."""
    dense = tiny_random()
    place = tmp_path / "models" / "my llama=1"  # which Hydra takes in quotes alone
    bs_exp.save_model(dense.module, dense.tokenizer, place)
    (place / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Mine\n")
    (place / "LICENSE").write_text("Do as you like.")
    done = cli(
        f"model={place}", "calibration=text", f"calibration.files=[{texts}/A.txt]", "calibration.num_sequences=8",
        "calibration.sequence_length=64", "evaluation=text", f"evaluation.files=[{texts}/B.txt]",
        "evaluation.sequence_length=64", "experiment=best", "schedule=single", "sharing=paper", "retain_ratio=0.6",
        "tracking=none", "save_model=true", "hydra.run.dir=first",
    )  # fmt: skip
    assert done.status == 0, done.err
    folder, record = tmp_path / "first" / "model", read_record(tmp_path / "first")
    card, recipe = (folder / "README.md").read_text(), (folder / "recipe.yaml").read_text()
    for written in (card, recipe):
        assert str(tmp_path) not in written and str(texts) not in written
        assert not re.search(r"(?<![\w/.:])/(home|root|tmp|work|Users)/", written)
    assert "`my llama=1`" in card and "`calibration.files=[PATH/TO/A.txt]`" in card and "`retain_ratio=0.6`" in card

    data = ModelCard.load(folder / "README.md").data
    assert (data.license, data.base_model) == ("apache-2.0", None)
    assert (folder / "LICENSE").read_text() == "Do as you like."
    rows = table(card)
    for name, kind in (("ppl/text", "dense"), ("ppl/text", "compressed")):
        cell = rows[name][kind == "compressed"]
        assert float(cell.replace(",", "")) == pytest.approx(record.metrics[kind][name], rel=1e-3)
    assert rows["bytes"][:2] == [f"{record.size[name]:,}" for name in ("dense_bytes", "bytes")]
    assert rows["parameters"][:2] == [f"{record.size[name]:,}" for name in ("dense_parameters", "parameters")]

    (words,) = commands(card)
    assert words[0] == "bs-exp" and any(word.startswith("model.path=") for word in words)
    refused = cli("--config-dir", str(folder), "--config-name", "recipe")
    assert refused.status == 1 and "must be set, as in model.path=VALUE" in refused.err
    own = {"PATH/TO/my llama=1": str(place), "PATH/TO/A.txt": f"{texts}/A.txt", "PATH/TO/B.txt": f"{texts}/B.txt"}
    own |= {PLACE: str(folder), "hydra.run.dir=OUT": "hydra.run.dir=again"}
    for there, here in own.items():
        words = [word.replace(there, here) for word in words]
    again = cli(*words[1:])
    assert again.status == 0, again.err
    second = read_record(tmp_path / "again")
    assert second.plan == record.plan and second.config_hash == record.config_hash
    for name in ("model.safetensors", "config.json", "recipe.yaml"):
        assert (tmp_path / "again" / "model" / name).read_bytes() == (folder / name).read_bytes()


def test_a_card_from_python_and_its_snippets(result: bs_exp.Compression, tmp_path: Path) -> None:
    metrics = {
        "dense": {"acc/mine": 0.5, "acc_stderr/mine": 0.02},
        "compressed": {"acc/mine": 0.25, "acc_stderr/mine": 0.0175},
    }
    folder = result.save(tmp_path / "model", metrics=metrics)
    card = (folder / "README.md").read_text()
    assert table(card)["acc/mine"] == ["0.5 ± 0.02", "0.25 ± 0.018", "-25.0 pt"]
    assert "a LlamaForCausalLM in memory" in card
    data = ModelCard.load(folder / "README.md").data
    assert data.library_name == "transformers"
    assert {"basis-sharing", "low-rank", "compression", "best"} <= set(data.tags)
    assert data.pipeline_tag in PIPELINE_REGISTRY.get_supported_tasks()
    assert (data.base_model, data.license, data.datasets) == (None, None, None)
    settings = yaml.safe_load((folder / "recipe.yaml").read_text())
    assert settings["model"]["path"] == settings["calibration"]["files"] == "???"
    assert settings["calibration"]["sequence_length"] == 64
    snippets = PYTHON.findall(card)
    assert len(snippets) == 2 and "trust_remote_code=True" in snippets[0]
    for snippet in snippets:
        exec(compile(snippet.replace(PLACE, str(folder)), "README.md", "exec"), {})


@pytest.mark.parametrize("family", ["bert", "t5"])
def test_snippets_of_other_tasks_run(result: bs_exp.Compression, family: str, tmp_path: Path) -> None:
    dense = tiny_random(family)
    dense.module.save_pretrained(tmp_path)
    dense.tokenizer.save_pretrained(tmp_path)
    card = told(result, task=dense.task.value)
    code = PYTHON.findall(card.text)[0].replace("trust_remote_code=True", "")
    exec(compile(code.replace(PLACE, str(tmp_path)), "README.md", "exec"), {})
    assert card.data.pipeline_tag == {Task.MASKED_LM: "fill-mask", Task.SEQ2SEQ_LM: "text2text-generation"}[dense.task]


def told(result: bs_exp.Compression, calibration: Any = None, **model: Any) -> ModelCard:
    """The card of a model with another provenance."""
    assert result.record is not None and result.recipe is not None
    known: Any = result.record.provenance
    provenance = {**known, "model": {**known["model"], **model}}
    if calibration is not None:
        provenance["calibration"] = {"corpus": calibration}
    return model_card(replace(result.record, provenance=provenance), result.recipe)


def test_a_hub_model_is_named_with_its_commit_and_data(
    result: bs_exp.Compression, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = {"corpus": "hub", "path": "Salesforce/wikitext"}
    card = told(result, corpus, source="hub", name="org/base", revision="0123abc")
    assert card.data.base_model == "org/base" and card.data.datasets == ["Salesforce/wikitext"]
    assert "https://huggingface.co/org/base" in card.text and "commit `0123abc`" in card.text
    again = ModelCard(str(card))
    assert again.data.to_dict() == card.data.to_dict()
    assert told(result, {"corpus": "hub", "path": "parquet"}).data.datasets is None
    # The recipe is of the commit that was used.
    record, recipe = result.record, result.recipe
    assert record is not None and recipe is not None
    known: Any = record.provenance
    from_hub = {**known, "model": {**known["model"], "source": "hub", "name": "org/base", "revision": "0123abc"}}
    write_card(replace(record, provenance=from_hub), recipe, tmp_path)
    assert yaml.safe_load((tmp_path / "recipe.yaml").read_text())["model"]["revision"] == "0123abc"


@pytest.mark.parametrize(
    ("files", "found"),
    [
        ({}, {}),
        ({"README.md": "# No metadata"}, {}),
        ({"README.md": "---\nlicense: [mit\n---\n"}, {}),
        ({"README.md": "---\n- license\n---\n"}, {}),
        ({"README.md": "---\nlicense: mit\n---\n"}, {"license": "mit"}),
        (
            {"README.md": "---\nlicense: other\nlicense_name: mine\nlicense_link: LICENSE\n---\n"},
            {"license": "other", "license_name": "mine", "license_link": "LICENSE"},
        ),
        ({"LICENSE": "Mine."}, {"license": "other", "license_link": "LICENSE"}),
    ],
    ids=repr,
)
def test_a_licence_is_copied_and_never_made_up(
    files: dict[str, str], found: dict[str, str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert licence_lines({"source": "local", "name": str(tmp_path)}) == found
    assert licence_lines({"source": "demo", "name": "demo"}) == {}
    assert capfd.readouterr().err == ""  # a card without metadata is no fault of who saves


def test_settings_are_shown_without_places(tmp_path: Path) -> None:
    from bs_exp.cli.recipe_file import _shown

    (tmp_path / "a b.txt").touch()
    assert _shown("model=~/models/llama") == "model=PATH/TO/llama"
    assert _shown("model=meta-llama/Llama-2-7b-hf") == "model=meta-llama/Llama-2-7b-hf"
    assert _shown("update.data.files=[/data/x.txt,/data/y.txt]") == "update.data.files=[PATH/TO/x.txt,PATH/TO/y.txt]"
    assert _shown(f"data='{tmp_path}/a b.txt'") == "'data=PATH/TO/a b.txt'"
    assert RunRecipe(render=str).command("D") == "bs-exp --config-dir D --config-name recipe hydra.run.dir=OUT"


def test_shares_and_ranks_are_those_of_the_plan(result: bs_exp.Compression) -> None:
    card = told(result).text
    ranks = [p.rank for p in result.plan.groups if p.group.matrix == "q" and p.rank is not None]
    assert f"q {min(ranks)}" in card and f"{len(result.plan.groups)} groups, 0 of them with a basis" in card
    assert formats.percent(result.size["retain_ratio"]) in card and "seeds: run 0, calibration 2023" in card
