"""A cache that is kept small: the longest unused goes first, and nothing that a living process uses."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bs_exp.cache import Cache
from bs_exp.cache_folder import Lease, cache_files, prune, remove
from bs_exp.errors import ConfigError

ENTRY = {"a": torch.zeros(100_000, dtype=torch.float64)}
SIZE = 800_000


def filled(folder: Path, count: int = 4) -> list[str]:
    """Entries with known times of use, stored by a cache that needs them no more."""
    cache = Cache(folder)
    for index in range(count):
        cache.store("gram", f"k{index}", ENTRY)
        os.utime(folder / "gram" / f"k{index}.safetensors", (1000.0 + index,) * 2)
    cache.release()
    return [f"gram/k{index}" for index in range(count)]


def names(folder: Path) -> list[str]:
    return [file.name for file in cache_files(folder)]


def test_the_longest_unused_goes_first(tmp_path: Path) -> None:
    every = filled(tmp_path)
    assert names(tmp_path) == every
    freed, left = prune(tmp_path, int(2.5 * SIZE))
    assert names(tmp_path) == every[2:] and freed >= 2 * SIZE and left == sum(f.bytes for f in cache_files(tmp_path))
    assert prune(tmp_path, int(2.5 * SIZE)) == (0, left)


def test_finding_an_entry_is_using_it(tmp_path: Path) -> None:
    every = filled(tmp_path)
    cache = Cache(tmp_path)
    assert cache.find("gram", "k0") is not None
    cache.release()
    assert names(tmp_path) == [*every[1:], every[0]]
    prune(tmp_path, int(1.5 * SIZE))
    assert names(tmp_path) == [every[0]]


def test_what_a_cache_uses_stays_until_it_is_released(tmp_path: Path) -> None:
    every = filled(tmp_path)
    cache = Cache(tmp_path)
    entry = cache.find("gram", "k1")
    assert prune(tmp_path, 0)[1] > 0 and names(tmp_path) == [every[1]]
    assert entry is not None and torch.equal(entry.tensor("a"), ENTRY["a"])
    cache.release()
    assert prune(tmp_path, 0)[1] == 0 and names(tmp_path) == []


def test_what_another_process_uses_stays_as_long_as_it_lives(tmp_path: Path) -> None:
    """The process is killed, so it cannot say that it is done."""
    every = filled(tmp_path)
    program = (
        "import sys; from pathlib import Path; from bs_exp.cache_folder import Lease; "
        "lease = Lease(Path(sys.argv[1])); lease.add('gram/k0'); print('ready', flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert other.stdout is not None and other.stdout.readline() == "ready\n"
        prune(tmp_path, 0)
        assert names(tmp_path) == every[:1]
        assert remove(tmp_path, every) == 0
    finally:
        other.kill()
        other.communicate()
    prune(tmp_path, 0)
    assert names(tmp_path) == [] and list((tmp_path / ".in-use").iterdir()) == []


def test_a_cache_with_a_limit_makes_room_for_what_it_stores(tmp_path: Path) -> None:
    filled(tmp_path)
    cache = Cache(tmp_path, max_gb=2.5 * SIZE / 2**30)
    for index in range(2):
        cache.store("decomposition", f"n{index}", ENTRY)
    assert sorted(names(tmp_path)) == ["decomposition/n0", "decomposition/n1"] and cache.over == 0
    cache.store("decomposition", "n2", ENTRY)
    assert len(names(tmp_path)) == 3 and 0 < cache.over < SIZE
    cache.release()
    again = Cache(tmp_path, max_gb=2.5 * SIZE / 2**30)
    again.store("decomposition", "n3", ENTRY)
    assert names(tmp_path) == ["decomposition/n2", "decomposition/n3"] and again.over == 0


@pytest.mark.parametrize("on_disk", [True, False])
@pytest.mark.parametrize(("keep", "kept"), [(True, True), (False, False), ("auto", True)])
def test_rounds_are_dropped_unless_they_are_kept(tmp_path: Path, on_disk: bool, keep: bool | str, kept: bool) -> None:
    cache = Cache(tmp_path if on_disk else None, keep_rounds=keep)
    cache.store("gram", "first", ENTRY)
    start = len(cache.made)
    cache.store("gram", "second", ENTRY)
    cache.drop(cache.made[start:])
    assert cache.find("gram", "first") is not None
    assert (cache.find("gram", "second") is not None) is kept


def test_large_rounds_are_dropped_by_themselves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bs_exp.cache._SMALL_ROUND", SIZE // 2)
    for cache in (Cache(tmp_path), Cache(None)):
        cache.store("gram", "k", ENTRY)
        cache.drop(cache.made)
        assert cache.find("gram", "k") is None


def test_a_round_that_another_run_uses_stays(tmp_path: Path) -> None:
    cache, other = Cache(tmp_path, keep_rounds=False), Cache(tmp_path)
    cache.store("gram", "k", ENTRY)
    assert other.find("gram", "k") is not None
    cache.drop(cache.made)
    assert names(tmp_path) == ["gram/k"]


def test_auto_is_exact_where_that_is_affordable() -> None:
    assert Cache(None).stored_dtype(10**8) is torch.float64
    assert Cache(None).stored_dtype(10**9) is torch.float32
    assert Cache(None, dtype="float64").stored_dtype(10**9) is torch.float64
    assert Cache(None, dtype="float32").stored_dtype(1) is torch.float32


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"dtype": "bfloat16"}, r"cache\.dtype must be one of auto, float64, float32, got 'bfloat16'"),
        ({"max_gb": 0.0}, r"cache\.max_gb must be above 0"),
        ({"max_gb": -1.0}, r"cache\.max_gb must be above 0"),
        ({"max_gb": float("nan")}, r"cache\.max_gb must be above 0"),
        ({"keep_rounds": "some"}, r"cache\.keep_rounds must be auto, true or false"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, object], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        Cache(None, **settings)  # type: ignore[arg-type]


def test_a_lease_ends_with_its_object(tmp_path: Path) -> None:
    lease = Lease(tmp_path)
    lease.add("gram/k")
    assert lease.path.read_text() == "gram/k\n"
    path = lease.path
    del lease
    assert not path.exists()
