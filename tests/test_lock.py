"""The lock is made of pip's report: exact versions from an index, without what differs by device."""

from __future__ import annotations

import re
from importlib import util
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
SPEC = util.spec_from_file_location("lock", ROOT / "tools" / "lock.py")
assert SPEC is not None and SPEC.loader is not None
tool = util.module_from_spec(SPEC)
SPEC.loader.exec_module(tool)


def _package(name: str, version: str, **info: Any) -> dict[str, Any]:
    found = {"url": f"https://index/{name}.whl", "archive_info": {"hash": "sha256=0"}, **info}
    return {"metadata": {"name": name, "version": version}, "download_info": found, "is_direct": "dir_info" in info}


def test_versions_are_listed_without_those_of_a_device() -> None:
    report = {
        "install": [
            _package("torch", "2.13.0+cpu"),
            _package("nvidia-cublas", "13.0"),
            _package("triton", "3.6.0"),
            _package("Jinja2", "3.1.6"),
            _package("aiohttp", "3.14.5"),
            _package("bs-exp", "0.1.0", dir_info={"editable": True}),
        ]
    }
    assert tool.lock(report) == tool.HEADER + "aiohttp==3.14.5\nJinja2==3.1.6\ntorch==2.13.0\n"


def test_what_comes_from_nowhere_or_elsewhere_is_not_locked() -> None:
    with pytest.raises(ValueError, match="names no package"):
        tool.lock({"install": []})
    odd = {**_package("odd", "1", url="git+https://x"), "is_direct": True}
    with pytest.raises(ValueError, match=r"odd comes from git\+https://x"):
        tool.lock({"install": [odd]})


def test_the_lock_of_the_repository_is_one_that_the_tool_writes() -> None:
    text = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    assert text.startswith(tool.HEADER)
    lines = text.removeprefix(tool.HEADER).splitlines()
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[^+\s]+", line) for line in lines)
    assert lines == sorted(lines, key=lambda line: line.partition("==")[0].lower())
