"""The data of the task `docs_cloze` (tasks/docs_cloze.yaml): which of four texts continues a piece of documentation?"""

from __future__ import annotations

import random
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from datasets import Dataset, DatasetDict

from bs_exp.demo.documentation import read_python_docs
from bs_exp.errors import DataError

_WORD = re.compile(r"\S+")
_DISTRACTORS = 3


@dataclass(frozen=True)
class Passage:
    """A stretch of document number `document`, split in two at a space."""

    document: int
    context: str
    continuation: str


def docs_cloze(
    *, items: int, context_characters: int, continuation_characters: int, seed: int, **metadata: object
) -> DatasetDict:
    """The task's `test` split from held-out documentation; lm-eval calls it with the task's settings and metadata."""
    documents = read_python_docs("heldout").documents
    rows = cloze_items(
        documents,
        items=items,
        context_characters=context_characters,
        continuation_characters=continuation_characters,
        seed=seed,
    )
    return DatasetDict({"test": Dataset.from_list(rows)})


def cloze_items(
    documents: Sequence[str], *, items: int, context_characters: int, continuation_characters: int, seed: int
) -> list[dict[str, object]]:
    """`context`, four `choices` of equal length, and the index of the `answer`, in an order drawn from `seed`.

    Distractors continue passages of other documents, so they too begin in the middle of a sentence. Raises DataError if
    the documents give fewer than `items`.
    """
    passages = [
        passage
        for number, document in enumerate(documents)
        for passage in _passages(number, document, context_characters, continuation_characters)
    ]
    by_length = defaultdict(list)
    for passage in passages:
        by_length[len(passage.continuation)].append(passage)
    generator = random.Random(seed)
    generator.shuffle(passages)
    rows: list[dict[str, object]] = []
    for passage in passages:
        if len(rows) == items:
            break
        others = {p.continuation for p in by_length[len(passage.continuation)] if p.document != passage.document}
        others.discard(passage.continuation)
        if len(others) >= _DISTRACTORS:
            # Sorted: the order of a set of strings differs between processes.
            choices = generator.sample(sorted(others), _DISTRACTORS)
            answer = generator.randint(0, _DISTRACTORS)
            choices.insert(answer, passage.continuation)
            rows.append({"context": passage.context, "choices": choices, "answer": answer})
    if len(rows) < items:
        raise DataError(
            f"docs_cloze needs {items} items, but {len(documents)} held-out documents give only {len(rows)}. "
            "Evaluate with other tasks, or without any: evaluation=perplexity."
        )
    return rows


def _passages(number: int, document: str, context_characters: int, continuation_characters: int) -> Iterator[Passage]:
    """Consecutive passages of at least the given lengths, in characters, that begin and end with whole words."""
    words = list(_WORD.finditer(document))
    begin = 0
    while True:
        cut = _reach(words, begin, context_characters)
        # Cut at a plain space: a line break or an indent would have to be part of the continuation.
        while cut < len(words) and document[words[cut - 1].end() : words[cut].start()] != " ":
            cut += 1
        end = _reach(words, cut, continuation_characters)
        if end >= len(words):
            return
        yield Passage(
            document=number,
            context=document[words[begin].start() : words[cut - 1].end()],
            continuation=document[words[cut].start() : words[end - 1].end()],
        )
        begin = end


def _reach(words: Sequence[re.Match[str]], begin: int, characters: int) -> int:
    """Index after the first word with which the text from word `begin` has that many characters; the end if none."""
    for index in range(begin, len(words)):
        if words[index].end() - words[begin].start() >= characters:
            return index + 1
    return len(words)
