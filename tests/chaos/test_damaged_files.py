"""Files with a flipped bit, or cut off: noticed, or without any effect; never another result without a word."""

from __future__ import annotations

import json
import random
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import optuna
import pytest
import torch
import transformers
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM

import bs_exp
from bs_exp.cache import Cache
from bs_exp.errors import BsExpError, RecordError
from bs_exp.layout.pivoted import PivotedLayout
from bs_exp.models.loading import LocalModel
from bs_exp.models.tiny import tiny_random
from bs_exp.records.record import RunRecord, read_record
from bs_exp.search.storage import open_storage
from tests.support.campaign import Campaign
from tests.support.deaths import end, start_command
from tests.support.factorised import compressed_twin
from tests.support.searches import Runner, search
from tests.support.sweeps import POINTS, differences, records, signature, sweep_command

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(1200)]
Start = Callable[[str, float], Campaign]
SECONDS = 240.0
WEIGHTS, CONFIG = "model.safetensors", "config.json"


@pytest.fixture(scope="module")
def swept(tiny: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished sweep: `cache` and `sweep`."""
    folder = tmp_path_factory.mktemp("swept")
    assert end(start_command(sweep_command(tiny), folder, folder / "log"), SECONDS) == 0
    assert len(signature(folder / "sweep")) == POINTS
    return folder


def damage(whole: bytes, draw: random.Random, *, start: int = 0) -> tuple[bytes, str]:
    """The content with one bit flipped, or cut off, somewhere behind `start`; and what was done."""
    place = draw.randrange(start, len(whole))
    if draw.random() < 0.3:
        return whole[:place], f"cut at byte {place} of {len(whole)}"
    bit = draw.randrange(8)
    return whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :], f"bit {bit} of byte {place} flipped"


def test_cache_files(tmp_path: Path, swept: Path, campaign: Start) -> None:
    found = campaign("damaged cache files", 0.03)
    files = sorted((swept / "cache").rglob("*.safetensors"))
    for case in found.cases(20_000):
        whole = found.draw.choice(files)
        content, what = damage(whole.read_bytes(), found.draw)
        path = tmp_path / whole.parent.name / whole.name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        # The second is a process's own look at the file that it used before.
        entry = Cache(tmp_path).find(whole.parent.name, whole.stem)
        lost = []
        if entry is not None:
            with safe_open(whole, framework="pt") as file:
                same = all(torch.equal(entry.tensor(name), file.get_tensor(name)) for name in file.keys())  # noqa: SIM118
            lost = [] if same else ["it was used, with other numbers"]
        found.count(f"{case}: {whole.parent.name}, {what}", lost=lost)
        found.details["harmless" if entry is not None else "noticed"] += 1
    assert not found.faults, "\n".join(found.faults)


def test_records(tmp_path: Path, swept: Path, campaign: Start) -> None:
    found = campaign("damaged records", 0.03)
    files = sorted((swept / "sweep").glob("*/record.json"))
    for case in found.cases(20_000):
        whole = found.draw.choice(files)
        content, what = damage(whole.read_bytes(), found.draw)
        path = tmp_path / whole.name
        path.write_bytes(content)
        lost, outcome = list[str](), "harmless"
        try:
            # As data: NaN is no other value than NaN.
            if repr(read_record(path)) != repr(read_record(whole)):
                lost.append("it was read, with other content")
        except RecordError:
            outcome = "noticed"
        found.count(f"{case}: {what}", lost=lost)
        found.details[outcome] += 1
    assert not found.faults, "\n".join(found.faults[:20])


def test_journals(tmp_path: Path, campaign: Start) -> None:
    """A cut journal holds the trials before; from one with a flipped bit nothing else is read."""
    found = campaign("damaged journals", 0.03)
    search(tmp_path / "whole", n_trials=4).run(Runner())
    whole = (tmp_path / "whole" / "study.journal").read_bytes()

    def read(path: Path) -> list[object]:
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        storage = open_storage(str(path), setting="storage")
        study = optuna.load_study(study_name="study", storage=storage)
        times = [(t.datetime_start, t.datetime_complete) for t in study.trials]
        trials = [(t.number, t.state, t.params, t.values, t.user_attrs, t.distributions) for t in study.trials]
        return [*zip(trials, times, strict=True)]

    expected = read(tmp_path / "whole" / "study.journal")
    for case in found.cases(20_000):
        content, what = damage(whole, found.draw)
        path = tmp_path / str(case) / "study.journal"
        path.parent.mkdir()
        path.write_bytes(content)
        lost, other, outcome = list[str](), list[str](), "harmless"
        try:
            trials = read(path)
            if "cut" in what:
                outcome = "continued"
                # The last trial that is there may lack what was stored of it later.
                if trials[:-1] != expected[: max(0, len(trials) - 1)]:
                    lost.append("other trials were read")
            elif trials != expected:
                lost.append("it was read, with other content")
        except BsExpError:
            outcome = "noticed"
        except KeyError as error:
            if "cut" in what and not path.read_bytes().count(b"\n"):
                outcome = "empty"  # cut in its first line: no study yet, it is made again
            else:
                other.append(f"unexpected {error!r}")
        found.count(f"{case}: {what}", lost=lost, other=other)
        found.details[outcome] += 1
        shutil.rmtree(path.parent)
    assert not found.faults, "\n".join(found.faults[:20])


def test_databases(tmp_path: Path, campaign: Start) -> None:
    """A SQLite file that is cut or has a flipped bit: refused in words, or its ended trials are what they were."""
    found = campaign("damaged databases", 0.04)

    def place(folder: Path) -> str:
        return f"sqlite:///{folder}/study.db"

    def read(folder: Path) -> str:
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        storage = open_storage(place(folder), setting="storage")
        trials = optuna.load_study(study_name="study", storage=storage).trials
        return repr([(t.number, t.state, t.params, t.values, t.user_attrs, t.distributions) for t in trials])

    (tmp_path / "whole").mkdir()
    search(tmp_path / "whole", n_trials=4, storage=place(tmp_path / "whole")).run(Runner())
    expected, whole = read(tmp_path / "whole"), (tmp_path / "whole" / "study.db").read_bytes()
    used = [position for position, byte in enumerate(whole) if byte]  # most of its pages are empty
    for case in found.cases(2000):
        content, what = damage(whole, found.draw)
        if "cut" not in what:
            position = found.draw.choice(used)
            content, what = _flip(whole, position, found.draw), f"a bit of byte {position} flipped"
        folder, runner = tmp_path / str(case), Runner()
        folder.mkdir()
        (folder / "study.db").write_bytes(content)
        lost, other, outcome = list[str](), list[str](), "harmless"
        try:
            search(folder, n_trials=4, storage=place(folder)).run(runner)
            if not content:
                outcome = "empty"  # no study yet
            elif runner.points or read(folder) != expected:
                lost.append(f"it was read, with other content; {len(runner.points)} trials were run again")
        except BsExpError:
            outcome = "noticed"
        except Exception as error:
            other.append(f"unexpected {error!r}")
        found.count(f"{case}: {what}", lost=lost, other=other)
        found.details[outcome] += 1
        shutil.rmtree(folder)
    assert not found.faults, "\n".join(found.faults[:20])


# Beside the tensors, what a model computes from its configuration alone.
_Loaded = tuple[dict[str, Tensor], dict[str, object]]


def _load(folder: Path) -> _Loaded | None:
    """Tensors and configuration as plain Transformers loads them; None if it refuses, or says that some are missing."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    except Exception:  # Transformers' own classes raise anything for a configuration that they do not understand
        return None
    told = any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    config = model.config.to_dict()
    return None if told else (dict(model.state_dict()), {k: v for k, v in config.items() if k != "_name_or_path"})


def _same(ones: _Loaded, others: _Loaded) -> bool:
    bits = {torch.float32: torch.int32}
    (found, settings), (expected, wanted) = ones, others
    return (
        settings == wanted
        and found.keys() == expected.keys()
        and all(
            tensor.dtype == found[name].dtype
            and torch.equal(
                tensor.view(bits.get(tensor.dtype, tensor.dtype)),
                found[name].view(bits.get(tensor.dtype, tensor.dtype)),
            )
            for name, tensor in expected.items()
        )
    )


def test_saved_models(tmp_path: Path, swept: Path, campaign: Start) -> None:
    """Cuts, and bits of weights, of the header, of pivots and of config.json."""
    found = campaign("damaged models", 0.05)
    transformers.logging.set_verbosity_error()
    compressed_twin(tiny_random("llama"), PivotedLayout()).save_pretrained(tmp_path / "pivoted")
    folders = [tmp_path / "pivoted", *sorted(path.parent for path in (swept / "sweep").glob("*/model/config.json"))]
    wholes = {folder: _load(folder) for folder in folders}
    for case in found.cases(2000):
        folder = found.draw.choice(folders)
        expected = wholes[folder]
        assert expected is not None
        name = CONFIG if found.draw.random() < 0.3 else WEIGHTS
        whole = (folder / name).read_bytes()
        start = 8 + int.from_bytes(whole[:8], "little")
        content, what = damage(whole, found.draw)
        if name == WEIGHTS and "cut" not in what:
            match found.draw.randrange(3):
                case 0 if kept := sorted(kept_bytes(whole)):
                    place = found.draw.choice(kept)
                    content, what = _flip(whole, place, found.draw), f"a bit of byte {place}, of pivots, flipped"
                case 1:
                    place = found.draw.randrange(start)
                    content, what = _flip(whole, place, found.draw), f"a bit of byte {place}, of the header, flipped"
        copy = tmp_path / str(case)
        shutil.copytree(folder, copy)
        (copy / name).write_bytes(content)
        loaded = _load(copy)
        shutil.rmtree(copy)
        lost = [] if loaded is None or _same(loaded, expected) else ["it was loaded, as another model"]
        found.count(f"{case}: {folder.name}/{name}, {what}", lost=lost)
        found.details["noticed" if loaded is None else "harmless"] += 1
    assert not found.faults, "\n".join(found.faults[:20])


def test_folders_of_dense_models(tmp_path: Path, campaign: Start) -> None:
    """What is read before any work: a damaged file may pass for another, but what does not is told in words."""
    found = campaign("damaged checkpoints", 0.03)
    transformers.logging.set_verbosity_error()
    dense = tiny_random("llama")
    dense.module.save_pretrained(tmp_path / "whole")
    dense.tokenizer.save_pretrained(tmp_path / "whole")
    names = [path.name for path in sorted((tmp_path / "whole").iterdir())]
    for case in found.cases(2000):
        folder, name = tmp_path / str(case), found.draw.choice(names)
        shutil.copytree(tmp_path / "whole", folder)
        content, what = damage((folder / name).read_bytes(), found.draw)
        (folder / name).write_bytes(content)
        other, outcome = list[str](), "read"
        for load in (
            lambda folder=folder: LocalModel(path=str(folder)).load(),
            lambda folder=folder: bs_exp.load(folder),
        ):  # type: ignore[misc]
            try:
                load()
            except BsExpError:
                outcome = "refused in words"
            except Exception as error:
                other.append(f"unexpected {error!r}")
        shutil.rmtree(folder)
        found.count(f"{case}: {name}, {what}", other=other)
        found.details[outcome] += 1
    assert not found.faults, "\n".join(found.faults[:20])


def _flip(whole: bytes, place: int, draw: random.Random) -> bytes:
    return whole[:place] + bytes([whole[place] ^ 1 << draw.randrange(8)]) + whole[place + 1 :]


def kept_bytes(whole: bytes) -> Iterator[int]:
    """The places of all bytes of pivots in a safetensors file."""
    size = int.from_bytes(whole[:8], "little")
    for name, tensor in json.loads(whole[8 : 8 + size]).items():
        if name.endswith("pivots"):
            first, last = tensor["data_offsets"]
            yield from range(8 + size + first, 8 + size + last)


def test_a_sweep_goes_on_from_damaged_files(
    tmp_path: Path, tiny: tuple[str, ...], swept: Path, campaign: Start
) -> None:
    """Two of its records and four files of its cache, which points that are run again read: it finds what it found."""
    found = campaign("sweeps on damaged files", 0.05)
    expected = signature(swept / "sweep")
    for case in found.cases(50):
        folder = tmp_path / str(case)
        shutil.copytree(swept, folder)
        cached = found.draw.sample(sorted((folder / "cache").rglob("*.safetensors")), 4)
        for path in [*cached, *found.draw.sample(sorted((folder / "sweep").glob("*/record.json")), 2)]:
            content, _ = damage(path.read_bytes(), found.draw)
            path.write_bytes(content)
        code = end(start_command(sweep_command(tiny), folder, folder / "log"), SECONDS)
        other = [f"exit code {code}: {(folder / 'log').read_text()[-800:]}"] if code else []
        found.count(f"sweep {case}", tried=6, lost=differences(signature(folder / "sweep"), expected), other=other)
        found.details["points run again"] += sum(
            isinstance(record, RunRecord) and record.process != read_record(swept / "sweep" / name).process
            for name, record in records(folder / "sweep").items()
        )
        shutil.rmtree(folder)
    assert not found.faults, "\n".join(found.faults)
