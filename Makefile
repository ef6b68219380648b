# Two commands are the whole set-up: `make demo` and `make test`. Each creates the virtual environment when it is missing.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# With `make journeys`: any text, by which one journey and one notebook are chosen.
TURN ?=
# More for pytest in `make test-slow`, such as the files that it is to run.
SLOW ?=
# Spinning threads starve their neighbours; one thread per test worker is fastest.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: demo test test-slow journeys lint docs bench bench-quick coldstart coldstart-tools clean

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

$(VENV)/ready-dev: $(VENV)/ready
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: $(VENV)/ready
	$(BIN)/foveate demo

test: $(VENV)/ready-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow"

test-slow: $(VENV)/ready-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m "slow and not journey" $(SLOW)

# The first runs of README and docs/first_runs.md and the notebooks, as they stand; with TURN=text one of each.
journeys: $(VENV)/ready-dev
	OMP_NUM_THREADS=1 FOVEATE_TEST_TURN=$(TURN) $(BIN)/python -m pytest -m journey tests/test_journeys.py --durations=0

lint: $(VENV)/ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

# The pages of docs/ as a site in build/site; a warning is an error.
docs: $(VENV)/ready-dev
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet --site-dir build/site

# Side by side with TRL, verl, transformers and vLLM, each in an environment of its own under build/peers; rewrites
# docs/performance.md and the section "Measured" of README. Over two hours of one core.
bench: $(VENV)/ready
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/bench.py

# What may become slower by accident, beside the figures that landed last: two minutes of one core.
bench-quick: $(VENV)/ready
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/quick.py

# Makes the weights that are shipped as the demo's cold start again: about an hour and a half on one idle core. The two
# last stages repeat the two before them, for longer: after the first time the relation words were only half learned.
coldstart: $(VENV)/ready
	$(BIN)/foveate prepare tiny runs/coldstart-tiny
	$(BIN)/foveate prepare shapes runs/coldstart-data --train 100000 --kinds single,attribute,pair --shortcut 0.4
	$(BIN)/foveate prepare shapes runs/coldstart-relations-data --train 32000 --kinds pair --seed 3
	$(BIN)/foveate prepare shapes runs/coldstart-shortcut-data --train 10000 --kinds pair --seed 2 --shortcut 0.4
	$(BIN)/foveate sft shapes_coldstart
	$(BIN)/foveate sft shapes_coldstart_relations
	$(BIN)/foveate sft shapes_coldstart_shortcut
	$(BIN)/foveate prepare shapes runs/coldstart-relations-data-2 --train 100000 --kinds pair --seed 3
	$(BIN)/foveate sft shapes_coldstart_relations run=runs/coldstart-relations-2 model.path=runs/coldstart-shortcut/final \
		'data.train=[runs/coldstart-relations-data-2/train.parquet]' train.steps=2000
	$(BIN)/foveate sft shapes_coldstart_shortcut run=runs/coldstart-shortcut-2 model.path=runs/coldstart-relations-2/final

# The cold start of `foveate demo --tools`.
coldstart-tools: $(VENV)/ready
	$(BIN)/foveate prepare tiny runs/zoom-coldstart-tiny --from demo --calls --max-tiles 1
	$(BIN)/foveate prepare zoom runs/zoom-coldstart-data --marks pattern --cells 3 --tile 112 --train 0 --test 0 \
		--traces 6000 --read 0.5 --search 0.12 --direct 0.38 --loose 0.5
	$(BIN)/foveate sft zoom_coldstart
	$(BIN)/foveate prepare zoom runs/zoom-coldstart-loose-data --marks pattern --cells 3 --tile 112 --train 0 --test 0 \
		--traces 3600 --read 0.5 --search 0.1 --direct 0.4 --loose 2 --seed 1
	$(BIN)/foveate sft zoom_coldstart run=runs/zoom-coldstart-loose model.path=runs/zoom-coldstart/final \
		'data.train=[runs/zoom-coldstart-loose-data/traces.parquet]' optim.lr=5e-4 optim.warmup_steps=10 \
		train.steps=300 train.save_every=100
	$(BIN)/foveate export runs/zoom-coldstart-loose/checkpoints/step_000100 runs/demo-tools-start

clean:
	rm -rf $(VENV) .ruff_cache
