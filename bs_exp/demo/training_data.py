"""The training data of the demo model: its tokenizer, the token stream, and the batch of each step."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from bs_exp.demo import documentation
from bs_exp.demo.documentation import PythonDocs, read_python_docs
from bs_exp.files import replacing

END_OF_TEXT = "<|endoftext|>"
END_OF_TEXT_ID = 0


@dataclass(frozen=True, eq=False)  # holds arrays: compare by identity
class TrainingData:
    """The corpus as token ids, with the tokenizer that made them."""

    tokenizer: Tokenizer
    train: npt.NDArray[np.uint16]
    """All training documents, one end-of-text token before each."""
    heldout: npt.NDArray[np.uint16]
    """The held-out text as one stream, without special tokens, as a perplexity evaluator reads it."""
    fingerprint: str
    """SHA-256 over tokenizer and ids: equal fingerprints, equal batches."""


def load_training_data(folder: Path, vocab_size: int) -> TrainingData:
    """Tokenizer and token streams, read once and then kept in `folder` under a key of everything they depend on."""
    key = _cache_key(vocab_size)
    ids_file, tokenizer_file = folder / f"tokens-{key}.npz", folder / f"tokenizer-{key}.json"
    if not (ids_file.is_file() and tokenizer_file.is_file()):
        corpus = read_python_docs("train")
        tokenizer = train_tokenizer(corpus, vocab_size)
        train = encode_documents(tokenizer, corpus)
        heldout = encode_text(tokenizer, read_python_docs("heldout").text)
        with replacing(tokenizer_file) as partial:
            tokenizer.save(str(partial))
        # Last, so that a finished file means a finished pair. An open file: savez adds .npz to names.
        with replacing(ids_file) as partial, partial.open("wb") as file:
            np.savez(file, train=train, heldout=heldout)
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    with np.load(ids_file) as ids:
        train, heldout = ids["train"], ids["heldout"]
    digest = hashlib.sha256(tokenizer.to_str().encode() + train.tobytes() + heldout.tobytes()).hexdigest()
    return TrainingData(tokenizer, train, heldout, digest)


def _cache_key(vocab_size: int) -> str:
    code = [Path(file).read_text(encoding="utf-8") for file in (documentation.__file__, __file__)]
    ingredients = json.dumps([dict(documentation.source_versions()), vocab_size, code])
    return hashlib.sha256(ingredients.encode()).hexdigest()[:16]


def train_tokenizer(corpus: PythonDocs, vocab_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer; it never adds its one special token by itself."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],  # the first token: id 0
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus.documents, trainer)
    return tokenizer


def encode_documents(tokenizer: Tokenizer, corpus: PythonDocs) -> npt.NDArray[np.uint16]:
    """One stream of ids, an end-of-text token before every document."""
    ids: list[int] = []
    for encoding in tokenizer.encode_batch(list(corpus.documents)):
        ids += [END_OF_TEXT_ID, *encoding.ids]
    return np.array(ids, dtype=np.uint16)


def encode_text(tokenizer: Tokenizer, text: str) -> npt.NDArray[np.uint16]:
    """Ids of a text, nothing added."""
    return np.array(tokenizer.encode(text).ids, dtype=np.uint16)


@dataclass(frozen=True, kw_only=True, eq=False)
class Batches:
    """Windows of the stream as (input, target) batches that depend on the step alone, so a run can resume anywhere.

    Every epoch shifts the window borders and shuffles the windows by its own seed; a last short batch is left out.
    """

    stream: npt.NDArray[np.uint16]
    batch_size: int
    length: int
    seed: int

    def __post_init__(self) -> None:
        if self.steps_per_epoch < 1:
            raise ValueError(
                f"The stream must fill a batch of {self.batch_size} windows of {self.length} tokens, "
                f"got {len(self.stream)} tokens; use a smaller batch or more text."
            )

    @property
    def windows_per_epoch(self) -> int:
        """Number of windows of `length` + 1 tokens that fit at every shift of an epoch."""
        return (len(self.stream) - self.length) // self.length

    @property
    def steps_per_epoch(self) -> int:
        """Full batches in an epoch."""
        return self.windows_per_epoch // self.batch_size

    def at(self, step: int) -> tuple[Tensor, Tensor]:
        """Inputs and next-token targets of a step, int64, [batch_size, length]."""
        epoch, position = divmod(step, self.steps_per_epoch)
        generator = np.random.default_rng((self.seed, epoch))
        shift = generator.integers(self.length)
        order = generator.permutation(self.windows_per_epoch)
        chosen = order[position * self.batch_size : (position + 1) * self.batch_size]
        starts = shift + chosen * self.length
        windows = torch.from_numpy(self.stream[starts[:, None] + np.arange(self.length + 1)].astype(np.int64))
        return windows[:, :-1], windows[:, 1:]
