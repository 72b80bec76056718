"""An installed bs_exp is known to Transformers without being imported, and costs other uses of Python nothing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest
import torch

import bs_exp_autoload
from bs_exp import save_model
from bs_exp.models import modeling_basis_sharing
from bs_exp.types import LoadedModel
from tests.support.factorised import compressed_twin, logits_of

REPOSITORY = Path(modeling_basis_sharing.__file__).parents[2]
HOOK_FILES = {"bs_exp_autoload.py", "bs_exp_autoload.pth"}

# What the site module does with every folder of installed packages, before the program starts.
START = "import site, sys; site.addsitedir(sys.argv[1]); "
# In place of Transformers, which takes seconds to import.
QUICK = "import bs_exp_autoload as hook; hook.TRIGGER = 'colorsys'; import colorsys; "


@pytest.fixture(scope="module")
def site_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of installed packages with what the wheel puts beside the package."""
    folder = tmp_path_factory.mktemp("site")
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    included = project["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    for source, target in included.items():
        if "/" not in target:
            shutil.copyfile(REPOSITORY / source, folder / target)
    assert {path.name for path in folder.iterdir()} == HOOK_FILES
    return folder


def start(
    site_folder: Path, program: str, *arguments: object, package: Path | None = REPOSITORY
) -> subprocess.CompletedProcess[str]:
    """A program in a fresh, isolated Python that finds the hook, and bs_exp in the given folder."""
    path = f"sys.path[:] = [p for p in sys.path if p != {str(REPOSITORY)!r}]; "
    path += f"sys.path.append({str(package)!r}); " if package else ""
    return subprocess.run(
        # -S leaves the environment's own .pth files out, -I what the user has set.
        [
            sys.executable,
            "-I",
            "-S",
            "-c",
            _packages() + path + START + program,
            str(site_folder),
            *map(str, arguments),
        ],
        capture_output=True,
        text=True,
        check=False,
        cwd=site_folder,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(torch.get_num_threads())},
    )


def _packages() -> str:
    return f"import sys; sys.path += {[p for p in sys.path if p.endswith('-packages')]!r}; "


def test_the_environment_has_the_hook() -> None:
    installed = metadata.distribution("bs-exp").files or []
    assert {str(file) for file in installed} >= HOOK_FILES, "install the project again: its files have changed"


def test_start_up_imports_nothing_heavy(site_folder: Path) -> None:
    done = start(site_folder, "print([m for m in ('bs_exp', 'torch', 'transformers', 'typing') if m in sys.modules])")
    assert (done.returncode, done.stdout, done.stderr) == (0, "[]\n", "")


def test_without_bs_exp_everything_else_works(site_folder: Path) -> None:
    done = start(site_folder, QUICK + "print(colorsys.rgb_to_hsv(0, 0, 0)[2])", package=None)
    assert (done.returncode, done.stdout, done.stderr) == (0, "0\n", "")


@pytest.mark.parametrize(
    ("content", "error"),
    [
        ("import absent_dependency", "ModuleNotFoundError: No module named 'absent_dependency'"),
        ("def cut(", "SyntaxError: "),
        ("len(5)", "TypeError: object of type 'int' has no len()"),
        ("raise RuntimeError('no')", "RuntimeError: no"),
    ],
)
@pytest.mark.parametrize("warnings", ["", "import warnings; warnings.simplefilter('error'); "], ids=["", "-W error"])
def test_a_broken_bs_exp_stops_nothing_and_says_so(
    site_folder: Path, tmp_path: Path, content: str, error: str, warnings: str
) -> None:
    (tmp_path / "bs_exp").mkdir()
    (tmp_path / "bs_exp" / "__init__.py").write_text(content + "\n")
    done = start(site_folder, warnings + QUICK + "print(colorsys.rgb_to_hsv(0, 0, 0)[2])", package=tmp_path)
    assert (done.returncode, done.stdout) == (0, "0\n"), done.stderr
    assert f"bs_exp.models.modeling_basis_sharing cannot be imported ({error}" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_an_interrupted_import_is_tried_again(site_folder: Path, tmp_path: Path) -> None:
    """Ctrl-C in the middle of the plug-in's import ends that import; the next one finds the hook again."""
    models = tmp_path / "bs_exp" / "models"
    models.mkdir(parents=True)
    (tmp_path / "bs_exp" / "__init__.py").write_text("")
    (models / "__init__.py").write_text("import sys\nif not hasattr(sys, 'again'):\n    raise KeyboardInterrupt\n")
    (models / "modeling_basis_sharing.py").write_text("print('registered')\n")
    program = """
import bs_exp_autoload as hook
hook.TRIGGER = "colorsys"
try:
    import colorsys
except KeyboardInterrupt:
    print("interrupted")
sys.again = True
import colorsys
"""
    done = start(site_folder, program, package=tmp_path)
    assert (done.returncode, done.stdout) == (0, "interrupted\nregistered\n"), done.stderr


def test_plain_from_pretrained_in_a_fresh_process(
    dense: Callable[[str], LoadedModel], site_folder: Path, tmp_path: Path
) -> None:
    model = compressed_twin(dense("llama"))
    save_model(model, dense("llama").tokenizer, tmp_path / "model")
    torch.save(logits_of(model), tmp_path / "logits.pt")
    program = """
import inspect, json, pathlib, torch
from transformers import AutoModelForCausalLM
folder = pathlib.Path(sys.argv[2])
before = "bs_exp.models.modeling_basis_sharing" in sys.modules
model = AutoModelForCausalLM.from_pretrained(folder / "model")
with torch.no_grad():
    logits = model(torch.arange(24).view(2, 12)).logits
import transformers.quantizers.auto as trigger
print(json.dumps({
    "equal": torch.equal(logits, torch.load(folder / "logits.pt")),
    "before": before,
    "source": "AutoHfQuantizer" in inspect.getsource(trigger),
}))
"""
    done = start(site_folder, program, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) == {"equal": True, "before": False, "source": True}


@pytest.mark.slow
@pytest.mark.parametrize(
    "first",
    [
        "transformers.modeling_utils",
        "transformers.quantizers",
        "bs_exp.models.modeling_basis_sharing",
        "peft",
        "bs_exp",
    ],
)
def test_whatever_is_imported_first(site_folder: Path, first: str) -> None:
    """The plug-in is imported in the middle of another import, which may be its own."""
    program = f"import {first}; from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as m; "
    done = start(site_folder, program + "print(m['basis_sharing'].__module__)")
    assert (done.returncode, done.stdout) == (0, "bs_exp.models.modeling_basis_sharing\n"), done.stderr[-3000:]


def test_a_second_installation_of_the_hook_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    monkeypatch.delitem(sys.modules, bs_exp_autoload.TRIGGER)
    bs_exp_autoload.install()
    once = list(sys.meta_path)
    bs_exp_autoload.install()
    assert sys.meta_path == once
    assert isinstance(once[0], bs_exp_autoload.PluginFinder)


@pytest.mark.slow
def test_the_command_line_of_lm_eval_as_it_stands(
    dense: Callable[[str], LoadedModel], site_folder: Path, tmp_path: Path
) -> None:
    save_model(compressed_twin(dense("llama")), dense("llama").tokenizer, tmp_path / "model")
    arguments = f"lm_eval --model hf --model_args pretrained={tmp_path}/model --tasks docs_cloze --limit 4 --device cpu"
    arguments += f" --include_path {REPOSITORY}/bs_exp/evaluation/tasks --output_path {tmp_path}/results.json"
    program = "sys.argv[:] = sys.argv[2:]; from lm_eval.__main__ import cli_evaluate; cli_evaluate()"
    done = start(site_folder, program, *arguments.split())
    assert done.returncode == 0, done.stderr[-3000:]
    assert "docs_cloze" in done.stdout
    results = json.loads(next(tmp_path.glob("results*.json")).read_text())
    assert 0 <= results["results"]["docs_cloze"]["acc,none"] <= 1
