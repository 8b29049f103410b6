# One command sets everything up and runs the main job, one sets everything up and runs the tests.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin

.PHONY: run test data lint fuzz setup clean

# --resume auto: a second `make run` continues one that was stopped, and leaves one that is finished as it is.
run: data            ## prepare the data, train a few minutes on the CPU, pack, score the file
	$(BIN)/python train_gpt.py --preset cpu --resume auto $(ARGS)

test: $(VENV)/.ready-ray lint     ## everything that CI runs
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder tests

lint: setup
	$(BIN)/ruff check .

fuzz: setup          ## ten minutes of coverage-guided fuzzing of the artifact reader
	$(BIN)/pip install --quiet --disable-pip-version-check atheris==3.0.0
	$(BIN)/python bench/fuzz.py -max_total_time=600

data: setup
	$(BIN)/python data/prepare.py

setup: $(VENV)/.ready

# torch first: with it installed at the pinned version nothing else pulls another build.
$(VENV)/.ready: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

# The tests run the ablations on a Ray cluster of two local workers as well.
$(VENV)/.ready-ray: $(VENV)/.ready pyproject.toml
	$(BIN)/pip install --quiet --disable-pip-version-check '.[ray]'
	touch $@

clean:
	rm -rf $(VENV) runs data/packages build *.egg-info
