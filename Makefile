# Every target sets up what it needs: a virtual environment in .venv, and this package installed in
# it (editable) under constraints.txt. `make` alone lists the targets.
PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
ARGS ?=

BIN := $(VENV)/bin
FAST := not slow and not cuda and not compile and not exhaustive
SLOW := (slow or compile) and not cuda and not exhaustive
# One BLAS/OpenMP thread per test process: the processes themselves fill the cores.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal
NOTEBOOK_SECONDS ?= 300
TIMEOUT := $(if $(shell command -v timeout),timeout $(NOTEBOOK_SECONDS))

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test slow exhaustive lint format types docs notebooks wheel setup clean cuda-check bench-cuda bench-cpu bench-paper

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' Makefile

demo: $(VENV)/.installed-demo ## set up, then train an S5 on JapaneseVowels (ARGS="--epochs 5" adds options)
	$(BIN)/lrnnx train --dataset JapaneseVowels --layer S5 $(ARGS)

test: $(VENV)/.installed-dev ## set up, then run every quick test (ARGS="-k scan" adds options)
	$(PYTEST) -m "$(FAST)" $(ARGS)

slow: $(VENV)/.installed-dev ## the tests marked slow or compile
	$(PYTEST) -m "$(SLOW)" $(ARGS)

exhaustive: $(VENV)/.installed-dev ## every combination of model, operator and transform; half an hour
	$(PYTEST) -m "exhaustive and not cuda" $(ARGS)

lint: $(VENV)/.installed-dev ## ruff (format and rules), pyright, import-linter
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

format: $(VENV)/.installed-dev ## rewrite the sources with ruff
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(VENV)/.installed-dev ## build the documentation into site/, warnings are errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

notebooks: $(VENV)/.installed-dev ## execute every notebook in a scratch folder
	@out=$$(mktemp -d) && trap 'rm -rf "$$out"' EXIT && \
	ls notebooks/*.ipynb | OMP_NUM_THREADS=1 xargs -P $(JOBS) -I NOTEBOOK $(TIMEOUT) \
		$(BIN)/python -m nbconvert --to notebook --execute \
		--ExecutePreprocessor.kernel_name=python3 --output-dir "$$out" NOTEBOOK

wheel: $(VENV)/.installed-dev ## build dist/*.whl
	rm -rf dist
	$(BIN)/python -m build --wheel --no-isolation

cuda-check: $(VENV)/.installed-check ## compile the CUDA kernels for each architecture, no GPU needed (ARGS=--every: rare ones too)
	$(BIN)/python scripts/check_cuda.py --jobs $(JOBS) $(ARGS)

bench-cuda: $(VENV)/.installed-cuda ## time the CUDA kernels (ARGS="decode --quick": one of them, without peers)
	$(BIN)/python -m benchmarks.cuda $(ARGS)

bench-paper: $(VENV)/.installed-cuda ## the published sweeps of LRU, S5, Mamba on a GPU, beside jax (ARGS="--models S5")
	$(BIN)/python -m benchmarks.paper $(ARGS)

bench-cpu: $(VENV)/.installed-bench ## time the CPU kernels beside other packages, write docs/benchmarks/cpu.md (ARGS="s5 --threads 1")
	$(BIN)/python -m benchmarks.cpu $(ARGS)

setup: $(VENV)/.installed-dev ## set up only, with everything the other targets use

clean: ## remove what was built or installed; runs/ stays
	rm -rf $(VENV) dist site build .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed, this is " + sys.version.split()[0] + "; name another one with make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)

EXTRAS-demo := cpu,demo
EXTRAS-dev := cpu,demo,docs,dev
EXTRAS-check := cuda-check
EXTRAS-cuda := cuda13
EXTRAS-bench := cpu,demo,bench
# Read by tests alone, and installed without what they ask for: attenuate wants the long obsolete
# package pathlib, and audio libraries that the test does without.
BARE := attenuate

# The stamps: installed again whenever a dependency or a pin changes.
$(VENV)/.installed-%: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[$(EXTRAS-$*)]"
	$(if $(filter dev,$*),$(BIN)/python -m pip install --quiet -c constraints.txt --no-deps $(BARE))
	@touch $@ $(if $(filter dev,$*),$(VENV)/.installed-demo)
