"""The cache never returns what was not stored whole under exactly this key."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from bs_exp.cache import Cache, content_key
from bs_exp.errors import CacheError

TENSORS = {"a": torch.arange(12.0, dtype=torch.float64).reshape(4, 3), "b": torch.tensor(7.0)}


@pytest.fixture(params=["disk", "memory"])
def cache(request: pytest.FixtureRequest, tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache" if request.param == "disk" else None)


def test_stored_tensors_come_back(cache: Cache) -> None:
    key = content_key(model="m", settings={"ridge": 1e-6})
    assert cache.find("gram", key) is None
    cache.store("gram", key, TENSORS)
    entry = cache.find("gram", key)
    assert entry is not None
    assert torch.equal(entry.tensor("a"), TENSORS["a"]) and entry.tensor("a").dtype == torch.float64
    assert torch.equal(entry.rows("a", 2), TENSORS["a"][:2])
    assert cache.find("gram", content_key(model="m", settings={"ridge": 1e-5})) is None
    assert cache.find("decomposition", key) is None
    assert (cache.hits["gram"], cache.misses["gram"]) == (1, 2)


def test_another_cache_object_finds_the_file(tmp_path: Path) -> None:
    Cache(tmp_path).store("gram", "k", TENSORS)
    assert Cache(tmp_path).find("gram", "k") is not None


def test_a_folder_that_cannot_be_made_is_known_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CacheError, match=r"file/cache.*cache\.dir"):
        Cache(tmp_path / "file" / "cache").check()
    Cache(None).check()
    Cache(tmp_path / "new").check()
    assert (tmp_path / "new").is_dir()


def test_files_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        Cache(tmp_path).store("gram", "k", TENSORS)
    finally:
        os.umask(before)
    [path] = (tmp_path / "gram").iterdir()
    assert path.stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("keep", [0, 5, 40, 0.5, -1])
def test_a_truncated_file_is_a_miss_and_is_replaced(tmp_path: Path, keep: float) -> None:
    cache = Cache(tmp_path)
    cache.store("gram", "k", TENSORS)
    [path] = (tmp_path / "gram").iterdir()
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content)) if isinstance(keep, float) else keep])
    assert cache.find("gram", "k") is None
    assert cache.damaged["gram"] == 1
    cache.store("gram", "k", TENSORS)
    entry = cache.find("gram", "k")
    assert entry is not None and torch.equal(entry.tensor("a"), TENSORS["a"])


@pytest.mark.parametrize("byte", [0x00, 0xFF])
def test_a_file_with_a_changed_byte_is_a_miss(tmp_path: Path, byte: int) -> None:
    Cache(tmp_path).store("gram", "k", TENSORS)
    [path] = (tmp_path / "gram").iterdir()
    content = bytearray(path.read_bytes())
    content[-20] = byte if content[-20] != byte else 0x7F
    path.write_bytes(content)
    cache = Cache(tmp_path)
    assert cache.find("gram", "k") is None and cache.damaged["gram"] == 1


def test_a_file_under_another_name_is_not_trusted(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    cache.store("gram", "old", TENSORS)
    (tmp_path / "gram" / "old.safetensors").rename(tmp_path / "gram" / "new.safetensors")
    assert cache.find("gram", "new") is None


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(CacheError, match=r"cache\.dir=null"):
        Cache(tmp_path / "file").store("gram", "k", TENSORS)


@pytest.mark.skipif(not Path("/dev/full").exists() or os.name != "posix", reason="needs a full device")
def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bs_exp.files.os.fsync", _no_space)
    with pytest.raises(CacheError, match="No space left"):
        Cache(tmp_path).store("gram", "k", TENSORS)
    assert list((tmp_path / "gram").iterdir()) == []


def _no_space(descriptor: int) -> None:
    with open("/dev/full", "wb", buffering=0) as full:
        full.write(b"x")


def test_keys_depend_on_every_part() -> None:
    base = {"model": "m", "settings": {"a": 1, "b": [1, 2]}}
    assert content_key(**base) == content_key(settings={"b": [1, 2], "a": 1}, model="m")
    assert len({content_key(**base), content_key(**{**base, "model": "n"}), content_key(model="m", settings={})}) == 3


def _rewritten(folder: Path, change: Callable[[dict[str, torch.Tensor], dict[str, str]], None]) -> Cache:
    """A cache whose only file has been written again, by the format's own library, after a change."""
    Cache(folder).store("gram", "k", TENSORS)
    [path] = (folder / "gram").iterdir()
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        metadata = dict(file.metadata())
    change(tensors, metadata)
    save_file(tensors, path, metadata)
    return Cache(folder)


def _shape(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    tensors["a"] = tensors["a"].reshape(3, 4)


def _dtype(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    tensors["a"] = tensors["a"].view(torch.int64)


def _missing(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    del tensors["b"]


def _more(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    tensors["c"] = torch.zeros(3)


def _swapped(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    tensors["c"], metadata["c"] = tensors.pop("b"), metadata.pop("b")


@pytest.mark.parametrize("change", [_shape, _dtype, _missing, _more, _swapped])
def test_the_same_bytes_under_another_header_are_a_miss(tmp_path: Path, change: Callable[..., None]) -> None:
    cache = _rewritten(tmp_path, change)
    assert cache.find("gram", "k") is None and cache.damaged["gram"] == 1


def test_a_file_of_an_earlier_version_is_found(tmp_path: Path) -> None:
    def without(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
        assert json.loads(metadata.pop("declared")) == [["a", "torch.float64", [4, 3]], ["b", "torch.float32", []]]

    entry = _rewritten(tmp_path, without).find("gram", "k")
    assert entry is not None and torch.equal(entry.tensor("a"), TENSORS["a"])


@pytest.mark.parametrize("content", [None, b"", b"cut"])
def test_a_file_that_goes_under_a_run_says_what_to_do(tmp_path: Path, content: bytes | None) -> None:
    entry = Cache(tmp_path).store("gram", "k", TENSORS)
    [path] = (tmp_path / "gram").iterdir()
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    for read in (lambda: entry.tensor("a"), lambda: entry.rows("a", 1)):
        with pytest.raises(CacheError, match=r"gram/k\.safetensors .*Start the run again.*cache\.dir=DIR"):
            read()


def test_what_killed_runs_left_is_removed_before_the_next_one(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    cache.store("gram", "k", TENSORS)
    left = [tmp_path / "gram" / f".k.safetensors.{i:016x}.tmp" for i in range(2)]
    for path in left:
        path.write_bytes(b"half")
    os.utime(left[0], (time.time() - 90_000,) * 2)
    cache.check()
    assert [path.exists() for path in left] == [False, True]
    assert cache.find("gram", "k") is not None
