"""The *python_docs* corpus: English documentation found beside the running interpreter.

Docstrings of the standard library and of the installed numerical packages are read from source by `ast`: nothing is
imported, downloaded or executed. One document holds the docstrings of one module, in source order.
"""

import ast
import hashlib
import importlib.metadata
import importlib.util
import platform
import re
import sysconfig
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Literal, TypeAlias, get_args

Split: TypeAlias = Literal["heldout", "calibration", "train"]

# In order of precedence: a paragraph that two splits share stays in the first of them.
SPLIT_SHARES: Mapping[Split, float] = MappingProxyType({"heldout": 0.04, "calibration": 0.08, "train": 0.88})

# Import name -> distribution name.
PACKAGES: Mapping[str, str] = MappingProxyType(
    {
        "torch": "torch",
        "transformers": "transformers",
        "numpy": "numpy",
        "scipy": "scipy",
        "sklearn": "scikit-learn",
        "pandas": "pandas",
        "sympy": "sympy",
    }
)
NOT_INSTALLED = "not installed"
# The standard library and the language reference, beside the packages.
PYTHON = "python"

TOPICS_MODULE = "pydoc_data.topics"
_SKIPPED_FOLDERS = frozenset({"test", "tests", "idlelib", "lib2to3", "site-packages", "__pycache__"})
_MIN_ENGLISH = 0.6
_LONG_PARAGRAPH = 50

_FENCED_CODE = re.compile(r"^[ \t]*```.*?^[ \t]*```[ \t]*$", re.DOTALL | re.MULTILINE)
_BLANK_LINES = re.compile(r"\n\s*\n")
_NOT_ALPHANUMERIC = re.compile(r"[\W_]+")


@dataclass(frozen=True)
class PythonDocs:
    """One split of the corpus, and where it came from."""

    split: Split
    modules: tuple[str, ...]
    """The module of each document; `pydoc_data.topics.NAME` for a topic of the language reference."""
    documents: tuple[str, ...]
    sources: Mapping[str, str]
    """Package (and `python`) -> version; absent packages say `not installed`."""
    unparsed: tuple[str, ...]
    """Modules whose source this interpreter could not parse: skipped."""

    @cached_property
    def text(self) -> str:
        """All documents, a blank line between them."""
        return "\n\n".join(self.documents)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the text, in hex."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    def of(self, packages: Collection[str]) -> "PythonDocs":
        """The documents of some packages alone (`python` is one).

        A paragraph that several packages hold belongs to the first one in the corpus, whichever packages are asked for.
        """
        kept = [pair for pair in zip(self.modules, self.documents, strict=True) if package_of(pair[0]) in packages]
        return PythonDocs(
            self.split,
            tuple(module for module, _ in kept),
            tuple(document for _, document in kept),
            {name: version for name, version in self.sources.items() if name in {PYTHON, *packages}},
            tuple(module for module in self.unparsed if package_of(module) in packages),
        )


@cache
def read_python_docs(split: Split) -> PythonDocs:
    """One split of the documentation; no paragraph longer than 50 characters occurs twice, within or across splits.

    Modules are dealt to splits by a hash of their names, so a module keeps its split over versions and machines.
    `heldout` and `calibration` take seconds to read; `train` parses every file and takes minutes.
    """
    if split not in SPLIT_SHARES:
        raise ValueError(f"split must be one of {', '.join(get_args(Split))}, got {split!r}.")
    documents, unparsed = _deduplicated(split)
    return PythonDocs(split, tuple(documents), tuple(documents.values()), source_versions(), unparsed)


@cache
def sources_hash(split: Split) -> str:
    """SHA-256 of the names and the bytes of all files that a split is made from, and of the versions that it names.

    Nothing is parsed for it. It includes the files of earlier splits, whose
    paragraphs are left out, and so the order in which splits are dealt.
    """
    splits = list(SPLIT_SHARES)[: list(SPLIT_SHARES).index(split) + 1]
    digest = hashlib.sha256(repr((splits, sorted(source_versions().items()))).encode())
    digest.update(repr(sorted(_topics().items())).encode())
    for name, path in sorted(_source_files().items()):
        if split_of(name) in splits:
            digest.update(f"{name}\0".encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def source_versions() -> Mapping[str, str]:
    """Version of Python and of every package the corpus may read from."""
    versions = {PYTHON: platform.python_version()}
    for package, distribution in PACKAGES.items():
        versions[package] = (
            NOT_INSTALLED if _package_folder(package) is None else importlib.metadata.version(distribution)
        )
    return MappingProxyType(versions)


def package_of(module: str) -> str:
    """The package that a module belongs to; `python` for the standard library and the language reference."""
    package = module.partition(".")[0]
    return package if package in PACKAGES else PYTHON


def split_of(module: str) -> Split:
    """The split that owns a module, from the SHA-256 of its dotted name."""
    position = int.from_bytes(hashlib.sha256(module.encode()).digest()[:8], "big") / 2**64
    for split, share in SPLIT_SHARES.items():
        if position < share:
            return split
        position -= share
    return "train"  # rounding of the shares


def _deduplicated(split: Split) -> tuple[dict[str, str], tuple[str, ...]]:
    """Documents of a split by module, and the modules that could not be parsed.

    Paragraphs that an earlier split, or an earlier document of the same one, already holds are left out.
    """
    seen: set[str] = set()
    for earlier in SPLIT_SHARES:
        if earlier == split:
            break
        for document in read_python_docs(earlier).documents:
            seen.update(_identity(paragraph) for paragraph in document.split("\n\n"))
    documents, unparsed = {}, []
    for module, texts in _modules(split):
        if texts is None:
            unparsed.append(module)
        elif fresh := _fresh_paragraphs(texts, seen):
            documents[module] = "\n\n".join(fresh)
    return documents, tuple(unparsed)


def _fresh_paragraphs(texts: Iterable[str], seen: set[str]) -> list[str]:
    """Clean paragraphs that are not in `seen`, which takes them in; empty if only short ones (headings) are left."""
    paragraphs, has_long = [], False
    for text in texts:
        for paragraph in clean_paragraphs(text):
            if len(paragraph) > _LONG_PARAGRAPH:
                identity = _identity(paragraph)
                if identity in seen:
                    continue
                seen.add(identity)
                has_long = True
            paragraphs.append(paragraph)
    return paragraphs if has_long else []


def clean_paragraphs(docstring: str) -> Iterator[str]:
    """Paragraphs that read like prose: no doctests, fenced code, ruled lines, symbol tables or lone words."""
    for block in _BLANK_LINES.split(_FENCED_CODE.sub("", docstring)):
        lines = []
        for line in block.splitlines():
            if line.lstrip().startswith(">>>"):
                break  # a doctest's output lasts until the next blank line
            if any(map(str.isalnum, line)):
                lines.append(line.rstrip())
        paragraph = "\n".join(lines)
        words = paragraph.split()
        if len(words) > 1 and _english_share(" ".join(words)) >= _MIN_ENGLISH:
            yield paragraph


def _english_share(text: str) -> float:
    return sum(character.isalpha() or character == " " for character in text) / len(text)


def _identity(paragraph: str) -> str:
    """A paragraph's letters and digits, case-folded: two paragraphs with the same ones count as one."""
    return _NOT_ALPHANUMERIC.sub("", paragraph).casefold()


def _modules(split: Split) -> Iterator[tuple[str, list[str] | None]]:
    """Module name and raw docstrings (None: not parsable) of one split, sorted by name."""
    topics = ((f"{TOPICS_MODULE}.{topic}", [text]) for topic, text in _topics().items())
    found: dict[str, Path | list[str]] = {name: texts for name, texts in topics if split_of(name) == split}
    found |= {name: path for name, path in _source_files().items() if split_of(name) == split}
    for module in sorted(found):
        source = found[module]
        yield module, source if isinstance(source, list) else _docstrings(source)


@cache
def _topics() -> Mapping[str, str]:
    """The language reference as `help()` shows it: topic -> text; empty where Python ships without it."""
    path = Path(sysconfig.get_path("stdlib"), *TOPICS_MODULE.split(".")).with_suffix(".py")
    if not path.is_file():
        return {}
    for statement in ast.parse(path.read_bytes()).body:
        if isinstance(statement, ast.Assign | ast.AnnAssign) and isinstance(statement.value, ast.Dict):
            topics: dict[str, str] = ast.literal_eval(statement.value)
            return topics
    raise ValueError(f"{path} holds no dict of topics; python_docs cannot read this Python's language reference.")


@cache
def _source_files() -> Mapping[str, Path]:
    """Dotted module name -> file, for the standard library and the installed packages."""
    roots = [("", Path(sysconfig.get_path("stdlib")))]
    roots += [(package, folder) for package in PACKAGES if (folder := _package_folder(package)) is not None]
    return {name: path for package, folder in roots for name, path in _walk(package, folder)}


def _walk(prefix: str, folder: Path) -> Iterator[tuple[str, Path]]:
    for path in sorted(folder.iterdir()):
        name = f"{prefix}.{path.stem}" if prefix else path.stem
        if path.suffix == ".py" and path.is_file():
            yield name.removesuffix(".__init__"), path
        elif path.name not in _SKIPPED_FOLDERS and path.name.isidentifier() and path.is_dir():
            yield from _walk(name, path)


def _package_folder(package: str) -> Path | None:
    """Folder of a top-level package, found without importing it."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(spec.submodule_search_locations[0])


def _docstrings(path: Path) -> list[str] | None:
    """Every docstring of a file in source order; None if this interpreter cannot parse it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            warnings.simplefilter("ignore", DeprecationWarning)  # invalid escapes, before Python 3.12
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, UnicodeDecodeError):
        return None
    return list(_walk_docstrings(tree))


def _walk_docstrings(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        docstring = ast.get_docstring(node)
        if docstring:
            yield docstring
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt | ast.ExceptHandler):
            yield from _walk_docstrings(child)
