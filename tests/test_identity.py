"""Keys hold our own strategies by `repr`, and everybody else's by module, name, settings and source."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bs_exp.identity import code_of, identity, own_code
from bs_exp.selection.measured import MeasuredSelection
from bs_exp.update.chain import UpdateChain
from bs_exp.update.none import NoUpdate
from bs_exp.whitening.gram import GramWhitening
from tests.support.updates import RECOVERY

Write = Callable[..., Any]
CLASS = """
from dataclasses import dataclass, field

@dataclass(frozen=True)
class GramWhitening:
    ridge: float = 1e-6
    hidden: float = field(default=1.0, repr=False)
    parts: object = None
    needs = frozenset()

    def metric(self, statistics):
        return None
"""
PLAIN = """
class Plain:
    def __init__(self, alpha):
        self.alpha = alpha
"""


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Write]:
    """Writes modules into a folder on the path, and imports the first of them afresh."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    names: set[str] = set()

    def write(**modules: str) -> Any:
        for name, text in modules.items():
            (tmp_path / f"{name}.py").write_text(text, encoding="utf-8")
            names.add(name)
            sys.modules.pop(name, None)
        importlib.invalidate_caches()
        return importlib.import_module(next(iter(modules)))

    yield write
    for name in names:
        sys.modules.pop(name, None)


def test_our_own_are_told_by_repr() -> None:
    for strategy in (GramWhitening(ridge=1e-6), UpdateChain(updates={"one": NoUpdate()}), RECOVERY):
        assert identity(strategy) == repr(strategy)
        assert own_code(strategy) == {}


def test_others_are_told_by_module_name_settings_and_source(written: Write) -> None:
    module = written(mine=CLASS)
    found = identity(module.GramWhitening())
    assert found != repr(GramWhitening(ridge=1e-6)) and "mine.GramWhitening" in json.dumps(found)
    assert found == identity(module.GramWhitening()) == json.loads(json.dumps(found))
    different = [module.GramWhitening(ridge=1e-5), module.GramWhitening(hidden=2.0), module.GramWhitening(parts=[1])]
    assert len({json.dumps(identity(one)) for one in (module.GramWhitening(), *different)}) == 4
    # The same source in another module is another strategy.
    assert identity(written(other=CLASS).GramWhitening()) != found


def test_an_edit_is_another_strategy_and_taking_it_back_the_first(written: Write) -> None:
    first = identity(written(mine=CLASS).GramWhitening())
    edited = identity(written(mine=CLASS + "\n# mended\n").GramWhitening())
    assert first != edited and identity(written(mine=CLASS).GramWhitening()) == first


def test_an_edit_counts_once_it_is_loaded(written: Write, tmp_path: Path) -> None:
    """What runs is what was loaded, whatever the file says meanwhile."""
    module = written(mine=CLASS)
    before = identity(module.GramWhitening())
    (tmp_path / "mine.py").write_text(CLASS + "x = 1\n", encoding="utf-8")
    assert identity(module.GramWhitening()) == before
    assert identity(importlib.reload(module).GramWhitening()) != before


def test_what_a_module_imports_counts_too(written: Write) -> None:
    importing = "def late():\n    from helper import f\n" + CLASS
    one = identity(written(mine=importing, helper="f = 1").GramWhitening())
    written(helper="f = 2")
    assert identity(written(mine=importing).GramWhitening()) != one


def test_foreign_code_within_ours_counts(written: Write) -> None:
    def made(text: str) -> Any:
        candidates = {"mine": {"whitening": written(mine=text).GramWhitening()}}
        return identity(
            MeasuredSelection(
                candidates=candidates, objective="kl", holdout=0.5, rounds="all", recalibrate=True, seed=0
            )
        )

    one, two = made(CLASS), made(CLASS + "#")
    assert one != two and not isinstance(one, str)


def test_functions_and_classes_as_settings_count(written: Write) -> None:
    def made(text: str) -> Any:
        return identity({"f": written(mine=text).f})

    assert made("\ndef f(): return 1\n") != made("\ndef f(): return 2\n")


def test_attributes_of_a_class_without_fields_are_its_settings(written: Write) -> None:
    """Its `repr` holds an address, which another object may have next time."""
    plain = written(mine=PLAIN).Plain
    assert identity(plain(1)) == identity(plain(1)) != identity(plain(2))


def test_large_tensors_are_told_by_their_content(written: Write) -> None:
    """Their `repr` leaves out the middle."""
    plain, one = written(mine=PLAIN).Plain, torch.zeros(5000)
    other = one.clone()
    other[2500] = 1.0
    assert repr(one) == repr(other)
    assert identity(plain(one)) == identity(plain(one.clone())) != identity(plain(other))


def test_a_subclass_of_ours_is_foreign_and_bases_count(written: Write) -> None:
    derived = "from base import Base\nclass Mine(Base):\n    pass\n"
    base = "from bs_exp.update.recover import Recovery\nclass Base(Recovery):\n    x = 1\n"

    def made(text: str) -> dict[str, Any]:
        written(base=text)
        kind = written(mine=derived).Mine
        return own_code(kind(**{name: getattr(RECOVERY, name) for name in RECOVERY.__dataclass_fields__}))

    assert made(base) == made(base) != made(base.replace("1", "2"))
    assert set(made(base)["code"]["sources"]) == {"base", "mine"}


def test_a_class_without_a_file_is_never_found_again() -> None:
    """As in a notebook; of two such classes nobody knows whether they are the same."""
    script = (
        "from bs_exp.identity import identity\n"
        "exec('class Mine: pass', space := {'__name__': '__main__'})\n"
        "kind = space['Mine']\n"
        "assert identity(kind()) == identity(kind())\n"
        "print(identity(kind()))"
    )
    outputs = [
        subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    ]
    assert "process " in outputs[0] and outputs[0] != outputs[1]


def test_what_a_function_makes_is_known_as_long_as_it_lives() -> None:
    def make(value: int) -> type:
        return type("Local", (), {"__module__": __name__, "__qualname__": "make.<locals>.Local", "value": value})

    one, two = make(1), make(2)
    assert code_of(one) == code_of(one) != code_of(two)


def test_an_object_that_holds_itself_ends(written: Write) -> None:
    strategy = written(mine=PLAIN).Plain(1)
    strategy.alpha = strategy
    assert identity(strategy)
