"""Turns pip's installation report (JSON on stdin) into the text of requirements.lock (on stdout): `make lock`."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from typing import Any

HEADER = """\
# Exact versions, read by pip as constraints: pip install -c requirements.lock -e ".[dev]". Renewed by: make lock
# torch has no local tag and its CUDA packages are not listed: a CPU index gives the CPU build, PyPI the CUDA build.
"""
# What torch brings along, by index and device.
_OF_TORCH = re.compile(r"(nvidia|cuda|triton|pytorch-triton)\b.*", re.IGNORECASE)


def lock(report: Mapping[str, Any]) -> str:
    """The versions that pip would install, one a line; what it would install from a folder (this project) is left out.

    Raises ValueError if pip chose nothing, or a version from anywhere but an index.
    """
    versions: dict[str, str] = {}
    for package in report["install"]:
        name, version = package["metadata"]["name"], package["metadata"]["version"]
        if "dir_info" in package["download_info"] or _OF_TORCH.fullmatch(name):
            continue
        if package["is_direct"]:
            raise ValueError(f"{name} comes from {package['download_info']['url']} and not from an index: not locked.")
        versions[name] = version.partition("+")[0]
    if not versions:
        raise ValueError("pip's report names no package: is it that of an installation into an empty environment?")
    return HEADER + "".join(f"{name}=={versions[name]}\n" for name in sorted(versions, key=str.lower))


if __name__ == "__main__":
    sys.stdout.write(lock(json.load(sys.stdin)))
