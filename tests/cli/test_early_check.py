"""What is refused before torch is imported is what the run would refuse, in the same words; and nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from bs_exp.cli import early_check
from bs_exp.cli.conf_root import root_folder
from bs_exp.cli.config import RootConfig, check_objectives, maker, strategy_keys
from bs_exp.cli.early_check import check_early, early_checks
from bs_exp.cli.explain import explain
from bs_exp.errors import BsExpError, ConfigError

CONF = root_folder() / "conf"
ROOT = Path(__file__).parents[2]
GROUPS = sorted(RootConfig.__dataclass_fields__.keys() & {path.name for path in CONF.iterdir() if path.is_dir()})

# One slip of each kind, where a constructor looks: a bound, a choice, a type, an unknown key, one inside a strategy.
REFUSED = """
calibration.batch_size=0
calibration.num_sequences=some
calibration.order=sorted
calibration.corpus.split=test
sharing.group_size=0
sharing.group_size=two
sharing.matrices=q
sharing.matrices=[q,q]
whitening.ridge=-1
importance=channel importance.p=2
importance=channel importance.a=none
allocation=bayesopt allocation.trials=0
allocation=water_filling allocation.multiple=1.5
schedule=steps schedule.size=0
update=recover update.steps=-1
update=refit_recover update.updates.recover.learning_rate=0
update=lora update.rank=0
evaluation.batch_size=x
evaluation.tail=maybe
evaluation.sequence_length=1
evaluation.stride=9999
evaluation.limit=-2
evaluation.corpora.python_docs.split=all
model.dtype=float99
tracking.mode=sometimes
+sharing.size=3
+model.depth=3
""".strip().splitlines()
# What needs a library, or is right: the run will tell.
LEFT = """
model.device=moon
model.device=cpu
calibration.batch_size=8
sharing.group_size=3
+sharing._convert_=all
""".strip().splitlines()

Compose = Callable[..., DictConfig]


@pytest.fixture
def composed() -> Iterator[Compose]:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield lambda *settings: compose("config", list(settings))


def _refusal(cfg: DictConfig) -> str | None:
    """What the run says of the first strategy that cannot be built."""
    make = maker(cfg)
    for key in strategy_keys(cfg):
        try:
            make(key)
        except BsExpError as error:
            return explain(error)
    return None


@pytest.mark.parametrize("settings", REFUSED)
def test_the_same_words_as_the_run(composed: Compose, settings: str) -> None:
    cfg = composed(*settings.split())
    with pytest.raises(ConfigError) as caught:
        check_early(cfg)
    assert explain(caught.value) == _refusal(cfg)
    assert "unloaded" not in str(caught.value)
    assert not [name for name in sys.modules if name.startswith("bs_exp_unloaded")]


def test_points_of_a_sweep_are_looked_at_once_for_what_they_have_in_common(
    composed: Compose, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[str] = []
    refusal = early_check._refusal

    def counted(make: Callable[[str], object], key: str) -> ConfigError | None:
        looked.append(key)
        return refusal(make, key)

    monkeypatch.setattr(early_check, "_refusal", counted)
    with early_checks() as check:
        check(composed("retain_ratio=0.8"))
        once = len(looked)
        check(composed("retain_ratio=0.6"))
        assert len(looked) == once > 5
        for _ in range(2):
            with pytest.raises(ConfigError, match=r"^sharing\.group_size must be"):
                check(composed("retain_ratio=0.6", "sharing.group_size=0"))
        assert looked[once:] == ["sharing"]


@pytest.mark.parametrize("settings", LEFT)
def test_what_is_right_or_needs_a_library_is_left_to_the_run(composed: Compose, settings: str) -> None:
    check_early(composed(*settings.split()))


@pytest.mark.parametrize("group", GROUPS)
def test_no_option_is_refused(composed: Compose, group: str) -> None:
    for path in sorted((CONF / group).glob("[!_]*.yaml")):
        try:
            files = [f"{group}.files=[a.txt]"] if path.stem in ("text", "text_part") else []
            cfg = composed(f"{group}={path.stem}", *files)
            for key in OmegaConf.missing_keys(cfg):
                OmegaConf.update(cfg, key, "name")
            check_early(cfg)
            check_objectives(cfg)
        except BsExpError as error:
            pytest.fail(f"{group}={path.stem}: {error}")


@pytest.mark.parametrize(
    ("settings", "fits"),
    [
        ("objective=ppl/python_docs", True),
        ("objective=acc/mean", True),
        ("objective=throughput/decode_tok_s_min", True),
        ("objective=[ppl/python_docs,size/bytes,throughput/prefill_tok_s]", True),
        ("evaluation=encoder objective=cosine/python_docs", True),
        ("evaluation.tasks=[arc_easy] objective=exact_match/arc_easy", True),  # lm-eval says what its tasks report
        ("evaluation=papers objective=ppl/c4", True),
        ("objective=ppl/wikitext2", False),
        ("objective=exact_match/docs_cloze", False),
        ("objective=cosine/python_docs", False),
        ("objective=[ppl/python_docs,size/weight]", False),
        ("evaluation=mteb objective=mteb_score/SICK-R", True),
        ("evaluation=mteb +evaluation.pairs.mine=A.csv objective=mteb_score/mine", True),
        ("evaluation=mteb objective=mteb_score/arc_easy", False),
        ("objective=throughput/speed", False),
        ("evaluation=papers objective=ppl/python_docs", False),
        ("evaluation.parts=[accuracy] objective=ppl/python_docs", False),
    ],
)
def test_objectives_are_names_that_evaluators_report(composed: Compose, settings: str, fits: bool) -> None:
    cfg = composed(*settings.split())
    if fits:
        check_objectives(cfg)
        return
    with pytest.raises(
        ConfigError, match=r"^objective must be one of .*size/targeted_bytes, or a list of these, got '"
    ):
        check_objectives(cfg)


# A slip, what else is set, what is said of it, and of which points (of a sweep: all, if nothing is said).
SLIPS = [
    ("retain_ratio=1.5", "", "retain_ratio must be ", ""),
    ("model.dtype=float99", "", "model.dtype must be ", ""),
    ("objective=a/b", "", "objective must be ", ""),
    (
        "retain_ratio=1.5,0.8",
        "-m experiment=svd,svd_llm",
        "retain_ratio must be ",
        "2 of 4 points: experiment=svd retain",
    ),
    ("calibration.batch_size=0", "-m retain_ratio=0.8,0.6", "calibration.batch_size must be ", ""),
    ("objective=a/b", "-m retain_ratio=0.8,0.6", "objective must be ", ""),
    (
        "calibration.batch_size=0",
        "-m hydra/sweeper=optuna retain_ratio=choice(0.8,0.6)",
        "calibration.batch_size must",
        "",
    ),
    (
        "experiment=svd,svdllm",
        "-m",
        "experiment=svdllm does not exist. Did you mean svd_llm? ",
        "1 of 2 points: experiment=svdllm",
    ),
]


@pytest.mark.parametrize(("slip", "more", "said", "points"), SLIPS)
def test_a_slip_is_answered_without_torch_and_leaves_no_folder(
    tmp_path: Path, slip: str, more: str, said: str, points: str
) -> None:
    # What takes the time is imports: of some 500 modules, with Optuna 800; PyTorch and what needs it are thousands.
    program = (
        "import sys; from bs_exp.__main__ import main\ntry: main()\nfinally: "
        "print('torch' in sys.modules, len(sys.modules) < 800)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *more.split(), slip],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (1, "False True\n"), done.stderr
    assert done.stderr.startswith(f"error: {said}") and len(done.stderr.splitlines()) == (3 if points else 1)
    assert points in done.stderr
    assert not list(tmp_path.iterdir())
