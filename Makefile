# `make demo` and `make test` need Python 3.11 and nothing else: each makes .venv on first use.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= $(shell command -v python3.11 || command -v python3)
JOBS ?= 2
ARGS ?=
BENCHMARKS ?= benchmarks/run.py
MATRIX_TESTS ?= tests/test_configuration.py tests/test_goldens.py tests/test_models.py tests/test_generation.py tests/test_loading.py tests/test_calibration.py tests/test_calibration_goldens.py tests/test_backbones.py tests/test_layout.py tests/test_packing.py tests/test_modes.py tests/test_codes.py
MATRIX_MARKS := (not slow or rest) and not gpu

VENV := .venv
OLD_VENV := .venv-transformers4
RUN := $(VENV)/bin/python
OLD_RUN := $(OLD_VENV)/bin/python

.PHONY: help demo demo-llm notebooks test test-slow test-matrix quality style bench tables checkpoints docs clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' Makefile | sed -E 's/^([a-z-]+):.*## (.*)/\1\t\2/' | expand -t 14

demo: $(VENV)/.installed ## convert a real BERT on real sentences and run it as a spiking network (ARGS="--help" for flags)
	OMP_WAIT_POLICY=PASSIVE $(RUN) -m training.demo $(ARGS)

demo-llm: $(VENV)/.installed-llm ## make a real small Llama spike without training, and let both answer (ARGS="--help" for flags)
	OMP_WAIT_POLICY=PASSIVE $(RUN) -m training.demo_llm $(ARGS)

notebooks: $(VENV)/.installed-llm ## run the notebooks of examples/ and write their outputs into them (ARGS="FILE" for one)
	OMP_WAIT_POLICY=PASSIVE $(RUN) examples/execute.py $(ARGS)

test: $(VENV)/.installed ## the default tests: offline, under 4 minutes on two cores
	$(RUN) -m pytest -n $(JOBS) --dist worksteal $(ARGS)

test-slow: $(VENV)/.installed ## the tests marked slow
	$(RUN) -m pytest -n $(JOBS) --dist worksteal -m slow $(ARGS)

test-matrix: $(VENV)/.installed $(OLD_VENV)/.installed ## model tests and exchanged checkpoints under transformers 4.57 and 5.23
	$(OLD_RUN) -m pytest -n $(JOBS) --dist worksteal -m "$(MATRIX_MARKS)" $(MATRIX_TESTS)
	$(RUN) -m pytest -n $(JOBS) --dist worksteal -m "$(MATRIX_MARKS)" $(MATRIX_TESTS)
	$(RUN) tests/matrix.py $(OLD_RUN) $(RUN)

quality: $(VENV)/.installed ## formatting, lint and types, changing nothing
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .
	$(RUN) -m mypy

style: $(VENV)/.installed ## format, and fix what lint can fix
	$(RUN) -m ruff format .
	$(RUN) -m ruff check --fix .

bench: $(VENV)/.installed ## the benchmarks of speed, one CPU thread (BENCHMARKS="benchmarks/x.py" for one)
	for script in $(BENCHMARKS); do OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} PYTHONPATH=. $(RUN) $$script $(ARGS); done

tables: $(VENV)/.installed ## write every generated part of README and docs (ARGS=--check: only say what is out of date)
	$(RUN) -m benchmarks.tables $(ARGS)

checkpoints: $(VENV)/.installed-llm ## make the checkpoints that model_cards/ describes, and their cards (ARGS=NAME for one; an hour)
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(RUN) -m benchmarks.checkpoints $(ARGS)

docs: $(VENV)/.installed ## build the documentation site, offline; a broken link or docstring fails (build/docs/index.html)
	$(RUN) -m sphinx -W --keep-going -q -c docs . build/docs
	@echo "The site is in build/docs/index.html"

clean: ## remove the virtual environments and the tools' caches
	rm -rf $(VENV) $(OLD_VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache

# A virtual environment is made anew when what it is made from changes.
$(VENV)/.installed: constraints.txt
$(VENV)/.installed: EXTRAS := dev,demo,docs
$(OLD_VENV)/.installed: constraints-transformers4.txt
$(OLD_VENV)/.installed: EXTRAS := dev

%/.installed: pyproject.toml
	@echo "Installing into $* (once; minutes)"
	@$(PYTHON) -m venv --clear $*
	@$*/bin/python -m pip install --quiet -c $(filter constraints%,$^) -e ".[$(EXTRAS)]"
	@touch $@

$(VENV)/.installed-llm: $(VENV)/.installed
	@$(RUN) -m pip install --quiet -c constraints.txt -e ".[llm]"
	@touch $@
