"""Local files: what is read, exactly; and what is refused, with the reason."""

from __future__ import annotations

import gzip
import json
import lzma
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from bs_exp.corpora.text_files import TextFiles
from bs_exp.errors import ConfigError, DataError

TEXT = "  First line.\r\n\n\nÄ second one,\ttabbed.\n"


def _lines(*rows: object) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def _read(*files: Path, **settings: str) -> str:
    return TextFiles(files=[str(file) for file in files], **settings).read()[0]


def test_a_single_file_is_taken_as_open_reads_it(tmp_path: Path) -> None:
    """With the line ends of Windows, a tokenizer saw another text: 15.8 instead of a perplexity of 10.5."""
    file = tmp_path / "a.txt"
    file.write_bytes(b"\xef\xbb\xbf" + TEXT.encode() + b"old\rMac")
    with file.open(encoding="utf-8-sig") as opened:
        assert _read(file) == opened.read() == TEXT.replace("\r\n", "\n") + "old\nMac"


def test_several_files_are_joined_by_a_blank_line(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.txt").write_text("two")
    assert _read(tmp_path / "b.txt", tmp_path / "a.txt") == "two\n\none"
    assert _read(tmp_path / "b.txt", tmp_path / "a.txt", joiner=" ") == "two one"


def test_a_single_name_may_stand_without_a_list(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    assert TextFiles(files=str(tmp_path / "a.txt")).read()[0] == "one"


@pytest.mark.parametrize(
    ("suffix", "compress"), [(".xz", lzma.compress), (".gz", gzip.compress), (".GZ", gzip.compress)]
)
def test_packed_files_are_unpacked(tmp_path: Path, suffix: str, compress: Callable[[bytes], bytes]) -> None:
    text, lines = tmp_path / f"a.txt{suffix}", tmp_path / f"b.jsonl{suffix}"
    text.write_bytes(compress(TEXT.encode()))
    lines.write_bytes(compress(_lines({"text": "one"}, {"text": "two"}).encode()))
    assert _read(text) == TEXT.replace("\r\n", "\n")
    assert _read(lines) == "one\n\ntwo"


def test_json_lines_take_the_field_of_every_line(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(_lines({"body": "one\u2028still one", "text": "no"}) + "\n" + _lines({"body": "two"}))
    assert _read(file, field="body") == "one\u2028still one\n\ntwo"


def test_json_holds_lines_or_one_array(tmp_path: Path) -> None:
    """C4 calls its lines .json.gz, Alpaca is one array: both were read as prose, quotes and URLs too."""
    rows = [{"text": "one\u2028still", "url": "u"}, {"text": "two"}]
    c4, alpaca, capitals = (tmp_path / name for name in ("c4.00000-of-01024.json.gz", "alpaca.json", "B.JSONL"))
    c4.write_bytes(gzip.compress(_lines(*rows).encode()))
    alpaca.write_text(json.dumps(rows, indent=1))
    capitals.write_text(_lines(*rows))
    assert _read(c4) == _read(alpaca) == _read(capitals) == "one\u2028still\n\ntwo"


@pytest.mark.parametrize("name", ["a.csv", "a.parquet", "a.html", "a.txt.zst", "a.zip", "a.pdf", "a.PKL", "a.tsv.gz"])
def test_other_formats_are_refused_with_what_is_read(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("a text")
    with pytest.raises(DataError, match=r"are not read\. Read are .*\.jsonl.*name it \.txt.*path=csv"):
        _read(tmp_path / name)


def test_the_home_folder_has_its_sign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.txt").write_text("at home")
    assert _read(Path("~/a.txt")) == "at home"


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(DataError, match="no regular file"):
        _read(tmp_path / "pipe.txt")


def test_the_fingerprint_follows_the_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("same")
    (tmp_path / "b.txt").write_text("same")
    (tmp_path / "c.txt").write_text("other")
    a, b, c = (TextFiles(files=[str(tmp_path / f"{name}.txt")]).read()[1] for name in "abc")
    assert a["fingerprint"] == b["fingerprint"] != c["fingerprint"]
    assert a["files"] == [str(tmp_path / "a.txt")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "holds no text"),
        ("a.txt", b" \n\n", "holds no text"),
        ("a.txt", b"abc\0def", "binary file .*offset 3"),
        ("a.txt", b"caf\xe9 au lait", "not UTF-8 text: byte 0xe9 at offset 3"),
        ("a.txt.xz", b"no archive", r"no complete \.xz file"),
        ("a.txt.xz", lzma.compress(b"text" * 100)[:-20], r"no complete \.xz file"),
        ("a.txt.gz", gzip.compress(b"text" * 100, mtime=0)[:-10], r"no complete \.gz file"),
        ("a.jsonl", b'{"text": "a"}\n\n{"body": "b"}\n', "line 3: the key 'text' must hold text, found nothing.*body"),
        ("a.jsonl", b'{"text": 5}\n', "line 1: the key 'text' must hold text, found int"),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', "line 2: not JSON"),
        ("a.jsonl", b'["text"]\n', "line 1: expected an object"),
        ("a.json", b'["text"]\n', "element 1: expected an object"),
        ("a.json", b'[{"text": "a"},\n {"text"', "not JSON"),
        ("a.json", b'[{"text": "a"},\n {"body": "b"}]', "element 2: the key 'text' must hold text, found nothing"),
        ("a.jsonl", b'{"text": "a \\ud83d b"}\n', r"line 1: .*half of a surrogate pair \('\\ud83d' at character 2\)"),
        ("a.jsonl", b'{"text": ' + b"[" * 100_000, "line 1: (JSON nested|not JSON)"),
    ],
)
def test_bad_files_say_what_is_wrong(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        _read(tmp_path / name)
    assert name in str(error.value)


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.txt does not exist"):
        _read(tmp_path / "nowhere.txt")
    with pytest.raises(DataError, match="cannot be read"):
        _read(tmp_path)


def test_no_files_is_a_wrong_setting() -> None:
    with pytest.raises(ConfigError, match="files is empty"):
        TextFiles(files=[])
