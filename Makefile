# `make help` lists what can be done here. The first target that needs it sets up .venv from constraints.txt.
#
# On Linux the default torch wheel brings CUDA along; a CPU build of the same version saves gigabytes. To have it,
# point pip to one by pip's own settings (PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS) before the first `make`.

PYTHON ?= $(shell python3.11 -c '' 2>/dev/null && echo python3.11 || echo python3)
MIN_PYTHON := $(shell sed -n 's/^min_python *= *//p' settings.ini)
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
RECIPE ?= tiny
OUT ?= runs/$(RECIPE)
NB ?= $(sort $(wildcard nbs/[0-9]*.ipynb nbs/*/[0-9]*.ipynb)) $(wildcard nbs/index.ipynb)
# Tests and notebooks that run at the same time, each with one thread; each may take 2 GB of memory.
N_WORKERS ?= 2

# Small models stall when several processes spin for the same cores: let idle threads sleep.
export OMP_WAIT_POLICY := PASSIVE

.PHONY: help setup demo test check export clean-notebooks refresh readme docs lab example models
.DEFAULT_GOAL := help

help:  ## list the targets
	@grep -E '^[a-z-]+:.*## ' Makefile | awk -F ':.*## ' '{ printf "make %-16s %s\n", $$1, $$2 }'

setup: $(STAMP)  ## install the library and its tools, exact versions, into .venv

# Depends on what decides the installation, so that a second call does nothing.
$(STAMP): constraints.txt settings.ini setup.py pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < tuple(map(int, "$(MIN_PYTHON)".split("."))))' || { \
	  echo "Python $(MIN_PYTHON) or newer is needed, '$(PYTHON)' is not: make PYTHON=/path/to/python ..."; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing exact versions into $(VENV): about 2 GB with a CPU torch, more with CUDA; a few minutes."
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	@# A kernel named python3 that is this environment's Python, whatever else the machine has registered.
	$(BIN)/python -m ipykernel install --sys-prefix --name python3
	@touch $@

demo: $(STAMP)  ## run the whole chain on the tiny recipe, on a CPU (RECIPE=..., OUT=...)
	$(BIN)/rlaifv run $(RECIPE) --out $(OUT)
	@echo "Report:" && ls $(OUT)/report*

test: $(STAMP)  ## all checks: style, clean notebooks, library = notebooks, README, tests, every notebook
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(N_WORKERS) --dist loadfile tests
	OMP_NUM_THREADS=1 $(BIN)/nbdev-test --n-workers $(N_WORKERS) --do-print --timing
	$(BIN)/python scripts/check_notebooks.py

check: $(STAMP)  ## the quick part of the checks: style, clean notebooks, library = notebooks, README
	$(BIN)/ruff format --check nbs tests scripts
	$(BIN)/ruff check nbs tests scripts
	$(BIN)/python scripts/check_notebooks.py
	$(BIN)/python scripts/readme.py --check

export: $(STAMP)  ## write the library from the notebooks
	$(BIN)/nbdev-export

clean-notebooks: $(STAMP)  ## strip metadata that only makes diffs noisy
	$(BIN)/nbdev-clean

refresh: $(STAMP)  ## run the notebooks in place to refresh their outputs (NB=nbs/... for some), then README.md
	$(BIN)/python scripts/refresh.py $(NB)
	$(BIN)/nbdev-clean
	$(BIN)/python scripts/readme.py

readme: $(STAMP)  ## write README.md from nbs/index.ipynb
	$(BIN)/python scripts/readme.py

# The steps of nbdev-docs without its README, which scripts/readme.py writes.
docs: $(STAMP)  ## build the documentation in _docs/ (with Quarto if it is there, else a plain preview)
	@if command -v quarto >/dev/null; then \
	  touch nbs/nbdev.yml nbs/styles.css && $(BIN)/nbdev-proc-nbs --n-workers 1 && \
	  (cd _proc && quarto render --no-cache) && rm -rf _docs && mv _proc/_docs _docs; \
	else \
	  echo "No Quarto on the PATH: this is a plain preview, not the documentation site."; \
	  $(BIN)/python scripts/docs_preview.py; \
	fi

lab: $(STAMP)  ## open the notebooks in JupyterLab
	$(BIN)/jupyter lab nbs

example: $(STAMP)  ## make data/example again: the small real run that the notebooks use by default
	$(BIN)/python scripts/make_example.py

# About 50 minutes on two cores; an interrupted training resumes when this is started again.
MODELS ?= runs/models
models: $(STAMP)  ## train the small models of the icon world from scratch (MODELS=folder)
	mkdir -p $(MODELS)
	$(BIN)/papermill nbs/iconworld/03_training.ipynb $(MODELS)/training.ipynb -k python3 \
	  -p out $(abspath $(MODELS)) -p vision_steps 600 -p vlm_steps 800 -p tuning_steps 450 -p splitter_steps 950 -p n_scenes 1000
	@echo "Compare, then copy $(MODELS)/iconworld-vlm and $(MODELS)/iconworld-splitter to data/."
