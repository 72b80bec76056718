"""A file is whole at every moment, nothing is written through a link, and only regular files are read."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from bs_exp.files import file_sizes, name_fault, read_text, remove_leftovers, remove_scratch, replacing, write_file


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("content", ["text with \u00e4 and\r\n", b"\x00\xff"])
def test_what_is_written_is_read_and_nothing_else_is_left(tmp_path: Path, content: str | bytes) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    write_file(path, content)
    assert path.read_bytes() == (content.encode() if isinstance(content, str) else content)
    if isinstance(content, str):
        assert read_text(path) == content
    assert _names(tmp_path) == ["file"]


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt()])
def test_a_write_that_fails_changes_nothing(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(type(error)), replacing(path) as temporary:
        temporary.write_text("half")
        assert path.read_text() == "old"
        raise error
    assert path.read_text() == "old"
    assert _names(tmp_path) == ["file"]


def test_files_get_the_mode_of_the_umask_whoever_wrote_them(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with replacing(tmp_path / "file") as temporary:
            temporary.unlink()
            temporary.touch(mode=0o600)  # as safetensors does
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640


def test_a_link_is_replaced_and_not_followed(tmp_path: Path) -> None:
    target = tmp_path / "elsewhere"
    target.write_text("mine")
    (tmp_path / "file").symlink_to(target)
    write_file(tmp_path / "file", "theirs")
    assert target.read_text() == "mine"
    assert not (tmp_path / "file").is_symlink()


def test_a_name_of_the_greatest_length_can_be_written(tmp_path: Path) -> None:
    path = tmp_path / ("x" * 255)
    write_file(path, "content")
    assert read_text(path) == "content"


def test_what_is_no_regular_file_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(OSError, match="Not a regular file"):
            read_text(path)
    with pytest.raises(IsADirectoryError):
        read_text(tmp_path)
    with pytest.raises(FileNotFoundError):
        read_text(tmp_path / "absent")


def test_a_file_too_large_for_memory_is_refused_at_once(tmp_path: Path) -> None:
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(OSError, match="Larger than 256 MiB"):
        read_text(tmp_path / "sparse")


def test_a_write_without_space_names_the_file(tmp_path: Path) -> None:
    # An error without a name, as that of every write that fails.
    with (
        pytest.raises(OSError, match=r"No space left on device: '.*/file'"),
        replacing(tmp_path / "file"),
        open("/dev/full", "wb", buffering=0) as full,
    ):
        full.write(b"x")


def _aged(path: Path, seconds: float) -> Path:
    moment = time.time() - seconds
    os.utime(path, (moment, moment), follow_symlinks=False)
    return path


LEFTOVER = ".model.safetensors.0123456789abcdef.tmp"


def test_what_killed_processes_left_is_removed_after_a_day(tmp_path: Path) -> None:
    old = _aged(_touched(tmp_path / LEFTOVER), 90_000)
    fresh = _touched(tmp_path / LEFTOVER.replace("0", "f"))
    others = [_aged(_touched(tmp_path / name), 90_000) for name in ("file", ".file.tmp", ".x.0123.tmp", LEFTOVER[1:])]
    link = tmp_path / LEFTOVER.replace("0", "e")
    link.symlink_to(tmp_path / "file")
    _aged(link, 90_000)
    remove_leftovers(tmp_path)
    assert not old.exists()
    assert all(path.exists() for path in (fresh, link, *others))
    remove_leftovers(tmp_path, older_than=0.0)
    assert not fresh.exists() and link.is_symlink()
    remove_leftovers(tmp_path / "absent")


def test_the_names_that_are_swept_are_those_that_are_written(tmp_path: Path) -> None:
    for name in ("f", "record.json", "x" * 255, "a\nb"):
        with replacing(tmp_path / name) as temporary:
            os.link(temporary, tmp_path / "kept")
            kept = temporary
        (tmp_path / "kept").rename(kept)  # as if the process had been killed
        remove_leftovers(tmp_path, older_than=0.0)
        assert _names(tmp_path) == [name]
        (tmp_path / name).unlink()


def _touched(path: Path) -> Path:
    path.touch()
    return path


@pytest.mark.parametrize("there", [True, False])
def test_scratch_folders_go_and_give_back_what_they_had_taken(tmp_path: Path, there: bool) -> None:
    model = tmp_path / "model"
    scratch = tmp_path / ".model-ab12_xyz"
    (scratch / "new").mkdir(parents=True)
    (scratch / "old").mkdir()
    _touched(scratch / "old" / "before")
    foreign = tmp_path / ".model-ab12_xyy"
    (foreign / "mine").mkdir(parents=True)
    if there:
        model.mkdir()
    for path in (scratch, foreign):
        _aged(path, 90_000)
    (tmp_path / ".model-ab12_new").mkdir()  # of a process at work
    remove_scratch(model)
    assert _names(tmp_path) == [".model-ab12_new", ".model-ab12_xyy", "model"]
    assert _names(model) == ([] if there else ["before"])


def test_sizes_are_by_the_path_within_the_folder(tmp_path: Path) -> None:
    write_file(tmp_path / "b", b"12")
    (tmp_path / "a").mkdir()
    write_file(tmp_path / "a" / "c", b"1")
    (tmp_path / "link").symlink_to("/dev/zero")
    assert file_sizes(tmp_path) == {"a/c": 1, "b": 2}


@pytest.mark.parametrize("name", ["run", "svd llm", "größe=3,x", "x" * 200, "a..b", "~"])
def test_plain_names(name: str) -> None:
    assert name_fault(name) is None


@pytest.mark.parametrize(
    "name", ["", " ", ".", "..", ".x", "../x", "/x", "a/b", "a\\b", "a\0", "a\x1b[2J", "a\nb", "ä" * 101]
)
def test_names_that_leave_their_folder_or_cannot_be_seen(name: str) -> None:
    assert name_fault(name)


def test_a_file_that_does_not_tell_its_size_is_limited_too() -> None:
    with pytest.raises(OSError, match=r"Larger than .* MiB"):
        read_text(Path("/proc/self/status"), most_bytes=10)
