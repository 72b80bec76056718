"""Claims about quality, on the trained model that ships: nothing about quality can be seen on random weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from bs_exp.allocation.uniform import UniformAllocation
from bs_exp.allocation.water_filling import WaterFilling
from bs_exp.cache import Cache
from bs_exp.corpora.python_docs import PythonDocs
from bs_exp.corpora.windows import CalibrationSet
from bs_exp.evaluation.accuracy import Accuracy
from bs_exp.evaluation.perplexity import Perplexity
from bs_exp.importance.none import NoImportance
from bs_exp.layout.pivoted import PivotedLayout
from bs_exp.layout.plain import PlainLayout
from bs_exp.models.loading import DemoModel
from bs_exp.models.surgery import factors_of, replace_matrices, twin
from bs_exp.pipeline import Recipe, compress
from bs_exp.progress import Progress
from bs_exp.protocols import Sharing
from bs_exp.schedule.single import SingleRound
from bs_exp.sharing.adjacent import AdjacentSharing
from bs_exp.sharing.none import NoSharing
from bs_exp.types import LoadedModel, SharedFactors, WeightGroup
from bs_exp.update.none import NoUpdate
from bs_exp.whitening.gram import GramWhitening
from bs_exp.whitening.identity import IdentityWhitening
from bs_exp.whitening.two_sided import TwoSidedWhitening
from bs_exp.workspace import Workspace

SVD_LLM = Recipe(
    calibration=CalibrationSet(
        corpus=PythonDocs(split="calibration"),
        num_sequences=64,
        sequence_length=512,
        order="random",
        batch_size=8,
        seed=2023,
        special_tokens=False,
    ),
    sharing=NoSharing(),
    whitening=GramWhitening(ridge=1e-6),
    importance=NoImportance(),
    allocation=UniformAllocation(fill=False),
    layout=PlainLayout(),
    schedule=SingleRound(),
    update=NoUpdate(),
    retain_ratio=0.8,
)
PAIRS = AdjacentSharing(matrices=("q", "k", "v", "up", "gate"), group_size=2)
BEYOND = replace(
    SVD_LLM,
    whitening=TwoSidedWhitening(ridge=1e-6, damping=1e-4, temper=1.0),
    allocation=WaterFilling(min_ratio=0.0),
    layout=PivotedLayout(),
)


@pytest.fixture(scope="module")
def demo() -> LoadedModel:
    return DemoModel(device="cpu").load()


@pytest.fixture(scope="module")
def perplexity(demo: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Recipe | None], float]:
    """Held-out perplexity of the demo model (None) or of what a recipe makes of it, on 48 windows."""
    cache, known = Cache(tmp_path_factory.mktemp("cache")), dict[str, float]()
    judge = Perplexity(
        corpora={"docs": PythonDocs(split="heldout")},
        sequence_length=512,
        stride=None,
        tail="drop",
        average="tokens",
        max_windows=48,
        batch_size=8,
        special_tokens=False,
    )

    def measure(recipe: Recipe | None) -> float:
        if repr(recipe) not in known:
            module = compress(demo, recipe, Workspace(cache, Progress(quiet=True))).module if recipe else demo.module
            known[repr(recipe)] = float(judge.evaluate(replace(demo, module=module))["ppl/docs"])
        return known[repr(recipe)]

    return measure


def test_it_is_small_and_has_a_card(demo: LoadedModel) -> None:
    folder = Path(str(demo.provenance["name"]))
    folder = folder if folder.is_dir() else Path(__file__).parents[2] / "bs_exp" / "demo" / "model"
    assert sum(file.stat().st_size for file in folder.iterdir()) < 10 * 2**20
    assert "perplexity" in (folder / "README.md").read_text(encoding="utf-8").lower()
    assert demo.architecture.num_layers >= 8 and 2e6 <= demo.module.num_parameters() <= 4e6
    assert demo.tokenizer("A text").input_ids == demo.tokenizer("A text", add_special_tokens=False).input_ids


def test_greedy_samples_are_words_of_documentation(demo: LoadedModel) -> None:
    prompt = demo.tokenizer("Return the", return_tensors="pt").input_ids
    text = demo.tokenizer.decode(demo.module.generate(prompt, max_new_tokens=20, do_sample=False)[0])
    assert text.startswith("Return the") and len(set(text.split())) >= 5


@pytest.mark.slow
def test_it_has_learned(perplexity: Callable[[Recipe | None], float]) -> None:
    assert perplexity(None) < 50


@pytest.mark.slow
@pytest.mark.parametrize("ratio", [0.8, 0.6])
def test_whitening_beats_plain_svd_by_far(perplexity: Callable[[Recipe | None], float], ratio: float) -> None:
    """SVD-LLM (2403.07378), Table 1: the order of methods, at either ratio."""
    svd_llm = replace(SVD_LLM, retain_ratio=ratio)
    plain = replace(svd_llm, whitening=IdentityWhitening())
    assert perplexity(None) < perplexity(svd_llm) < 0.7 * perplexity(plain)


@pytest.mark.slow
def test_basis_sharing_visibly_hurts(perplexity: Callable[[Recipe | None], float]) -> None:
    assert perplexity(replace(SVD_LLM, sharing=PAIRS)) > 1.1 * perplexity(None)


@pytest.mark.slow
@pytest.mark.parametrize("sharing", [NoSharing(), PAIRS], ids=["alone", "pairs"])
def test_the_pivoted_layout_loses_nothing(demo: LoadedModel, sharing: Sharing) -> None:
    """The same factors in both layouts: the same logits and right answers, and k^2 fewer numbers."""
    recipe = replace(SVD_LLM, sharing=sharing, whitening=IdentityWhitening())
    made = compress(demo, recipe, Workspace(Cache(None), Progress(quiet=True)))
    groups = [planned for planned in made.plan.groups if planned.rank is not None]
    pivoted = twin(demo.module)
    factors = [_factors(made.module, demo, planned.group) for planned in groups]
    replace_matrices(pivoted, demo.architecture, factors, PivotedLayout())

    ids = recipe.calibration.windows(demo.tokenizer).ids[:4]
    with torch.no_grad():
        one, other = (module(ids).logits for module in (made.module, pivoted))
    assert float((one - other).norm() / one.norm()) < 1e-4
    assert made.module.num_parameters() - pivoted.num_parameters() == sum((p.rank or 0) ** 2 for p in groups)
    judge = Accuracy(tasks=["docs_cloze"], limit=100, num_fewshot=None, batch_size=8, seed=0, include_path=[])
    assert judge.evaluate(replace(demo, module=made.module)) == judge.evaluate(replace(demo, module=pivoted))


def _factors(module: PreTrainedModel, demo: LoadedModel, group: WeightGroup) -> SharedFactors:
    stored = factors_of(module, demo.architecture, group)
    return stored.layout.restore(stored)


@pytest.mark.slow
@pytest.mark.parametrize("ratio", [0.8, 0.6])
def test_loss_in_nats_spent_over_all_matrices_halves_the_damage(
    perplexity: Callable[[Recipe | None], float], ratio: float
) -> None:
    """Excess loss, ln ppl - ln dense ppl, at the same stored parameters."""
    dense = torch.tensor(perplexity(None)).log()
    published = min(perplexity(replace(SVD_LLM, sharing=s, retain_ratio=ratio)) for s in (NoSharing(), PAIRS))
    beyond = perplexity(replace(BEYOND, retain_ratio=ratio))
    assert torch.tensor(beyond).log() - dense < 0.5 * (torch.tensor(published).log() - dense)
