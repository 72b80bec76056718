"""An estimate as lines of text."""

from __future__ import annotations

from collections.abc import Iterator
from textwrap import wrap

from bs_exp.estimate.estimate import SAVED, Estimate, Windows, seconds_of
from bs_exp.estimate.limits import Room
from bs_exp.estimate.machine import Machine

_WIDTH = 100
_INDENT = 9
_MOST_SHAPES = 12


def lines(
    title: str,
    found: Estimate,
    windows: Windows | None,
    machine: Machine | None,
    there: tuple[Room, ...],
    warnings: list[str],
) -> Iterator[str]:
    """What a run would take: memory, disk, passes, decompositions, time; what is unknown, and what is scarce."""
    yield title
    told = [("memory", _memory(found)), *_device(found), ("disk", _disk(found)), ("passes", _passes(found, windows))]
    told.append(("factor", _decompositions(found)))
    if machine is not None:
        told.append(("time", _time(found, machine)))
    told += [("unknown", text) for text in found.unknown]
    told.append(("free", "; ".join(f"{_size(room.free)} of {room.what}" for room in there)))
    told += [("WARNING", text) for text in warnings]
    for name, text in told:
        yield from wrap(
            text, _WIDTH, initial_indent=f"{name:<{_INDENT}}", subsequent_indent=" " * _INDENT, break_long_words=False
        )


def _memory(found: Estimate) -> str:
    stage, peak = found.host
    others = ", ".join(f"{name} {_size(work.host_bytes)}" for name, work in found.stages.items())
    return f"{_size(peak)} on the host at the peak, in {stage} ({others})"


def _device(found: Estimate) -> list[tuple[str, str]]:
    stage, peak = found.device
    return [("device", f"{_size(peak)} at the peak, in {stage}")] if peak else []


def _disk(found: Estimate) -> str:
    kinds = {kind: size for kind, size in found.disk.items() if kind != SAVED}
    listed = ", ".join(f"{kind} {_size(size)}" for kind, size in sorted(kinds.items(), key=lambda item: -item[1]))
    saved = f"; {_size(found.disk[SAVED])} for the saved model" if SAVED in found.disk else ""
    return (f"{_size(sum(kinds.values()))} in the cache ({listed})" if kinds else "no cache") + saved


def _passes(found: Estimate, windows: Windows | None) -> str:
    if windows is None:
        return "none: no text is read"
    of = f"{windows.count} windows of {windows.length} tokens, {windows.batch_size} at a time"
    return f"{found.forward} forward, {found.backward} backward through all blocks, {of}; {found.rounds.told}"


def _decompositions(found: Estimate) -> str:
    counted = sorted(found.decompositions.items(), key=lambda item: -item[1] * min(item[0][1:]) ** 3)
    shown = [f"{count} {d.kind} of {d.rows} x {d.columns}" for d, count in counted[:_MOST_SHAPES]]
    more = len(counted) - _MOST_SHAPES
    return ", ".join(shown) + (f", and {more} smaller shapes" if more > 0 else "") or "nothing to decompose"


def _time(found: Estimate, machine: Machine) -> str:
    seconds = seconds_of(found, machine)
    by_stage = ", ".join(f"{name} {_duration(each)}" for name, each in seconds.items() if each >= 0.05)
    return f"about {_duration(sum(seconds.values()))} on this machine, evaluation aside ({by_stage})"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e9:.3g} GB" if nbytes >= 1e8 else f"{nbytes / 1e6:.3g} MB"
