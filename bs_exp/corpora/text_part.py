"""Local text in two parts that do not overlap: one to calibrate, one to evaluate."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from bs_exp.corpora.provenance import describe
from bs_exp.corpora.sampling import evenly_spaced
from bs_exp.corpora.text_files import TextFiles, is_readable
from bs_exp.errors import DataError
from bs_exp.validation import check_at_least, check_choice

Part: TypeAlias = Literal["calibration", "evaluation"]

# Of so many blocks one is evaluated, the last.
_ONE_IN = 5
_FEWEST_BLOCKS = 10
# A block has so many characters, or such a share of the text if that is less.
_BLOCK, _SHARE = 16_384, 20
_FEWEST_CHARACTERS = 10_000
# What is shorter, such as a heading, may stand in both parts.
_LONG = 80
# What blocks are made of if documents are too few, coarsest first: where to cut, and what stands between them again.
_UNITS = (("paragraphs", r"\n[^\S\n]*\n\s*", "\n\n"), ("lines", r"\n", "\n"), ("words", r"\s+", " "))


@dataclass(frozen=True, kw_only=True)
class TextPart:
    """The calibration or the evaluation part of files, or of all readable files of folders in the order of their names.

    The text is cut into documents (rows of `.jsonl`, files), or into paragraphs, lines or words if there are too few of
    the former, and these are gathered into blocks of 16,384 characters, or of a twentieth of the text if that is less.
    Every fifth block belongs to the evaluation, without what stands in the other part as well (units of 80 characters
    or more). `max_characters` takes blocks at even distances.
    """

    files: Sequence[str]
    part: Part
    field: str = "text"
    joiner: str = "\n\n"
    max_characters: int | None = None

    def __post_init__(self) -> None:
        check_choice("part", self.part, get_args(Part))
        check_at_least(1, max_characters=self.max_characters)
        object.__setattr__(self, "files", TextFiles(files=self.files).files)

    def read(self) -> tuple[str, Mapping[str, Any]]:
        """The part, and its provenance; DataError if a file cannot be read, or there is too little text for two."""
        documents = self._texts().documents()
        where = ", ".join(self.files)
        split = split_blocks(documents, self.joiner, where)
        blocks = getattr(split, self.part)
        found = len(blocks)
        if self.max_characters is not None:
            mean = sum(map(len, blocks)) / found
            blocks = [blocks[i] for i in evenly_spaced(found, max(1, int(self.max_characters / mean)))]
        text = split.joiner.join(blocks)
        return text, describe(
            "text_part",
            text,
            files=list(self.files),
            part=self.part,
            documents=len(documents),
            unit=split.unit,
            blocks=len(blocks),
            available=found,
        )

    def stamp(self) -> str:
        """SHA-256 of the names and the bytes of all files that are read; DataError if one cannot be read."""
        return self._texts().stamp()

    def _texts(self) -> TextFiles:
        files = [str(file) for name in self.files for file in _files(Path(name).expanduser())]
        return TextFiles(files=files, field=self.field, joiner=self.joiner)


@dataclass(frozen=True)
class Split:
    """Blocks of both parts, what they are made of, and what stands between them."""

    unit: str
    joiner: str
    calibration: list[str] = field(default_factory=list)
    evaluation: list[str] = field(default_factory=list)


def split_blocks(documents: Sequence[str], joiner: str, where: str) -> Split:
    """The same split for the same documents; DataError if the text is too short, or repeats itself."""
    total = sum(map(len, documents))
    if total < _FEWEST_CHARACTERS:
        raise DataError(
            f"{where} holds {total:,} characters, too little to calibrate on one part and to evaluate another: at "
            f"least {_FEWEST_CHARACTERS:,} are needed. Use more text, or a file for each: calibration=text "
            "'calibration.files=[A.txt]' evaluation=text 'evaluation.files=[B.txt]'."
        )
    unit, between, blocks = _blocks(documents, joiner, min(_BLOCK, total // _SHARE))
    split = Split(unit, between)
    calibrated = [block for number, block in enumerate(blocks, start=1) if number % _ONE_IN]
    known = {text.strip() for text in chain.from_iterable(calibrated) if len(text) >= _LONG}
    split.calibration.extend(between.join(block) for block in calibrated)
    for block in blocks[_ONE_IN - 1 :: _ONE_IN]:
        if new := [text for text in block if text.strip() not in known]:
            split.evaluation.append(between.join(new))
    if not any(block.strip() for block in split.evaluation):
        raise DataError(
            f"{where} repeats itself: all {unit} that would be evaluated stand among those that calibrate as well. Use "
            "a text of different ones."
        )
    return split


def _blocks(documents: Sequence[str], joiner: str, size: int) -> tuple[str, str, list[list[str]]]:
    """Units gathered into blocks of at least `size` characters; the coarsest that give enough blocks."""
    units: Sequence[str] = documents
    name, between = "documents", joiner
    for finer, pattern, joined in _UNITS:
        blocks = list(_gathered(units, size))
        if len(blocks) >= _FEWEST_BLOCKS:
            break
        units = [unit for document in documents for unit in re.split(pattern, document) if unit.strip()]
        name, between = finer, joined
    else:
        blocks = list(_gathered(units, size))
    return name, between, blocks


def _gathered(units: Sequence[str], size: int) -> Iterator[list[str]]:
    block: list[str] = []
    length = 0
    for unit in units:
        block.append(unit)
        length += len(unit)
        if length >= size:
            yield block
            block, length = [], 0
    if block:
        yield block


def _files(path: Path) -> list[Path]:
    """The file itself, or the files below a folder that can be read as text; DataError if it has none."""
    if not path.is_dir():
        return [path]
    inside = (file for file in sorted(path.rglob("*")) if file.is_file())
    found = [f for f in inside if is_readable(f) and not any(p.startswith(".") for p in f.relative_to(path).parts)]
    if not found:
        raise DataError(f"the folder {path} holds no text files. Name a file, or a folder with .txt or .jsonl files.")
    return found
