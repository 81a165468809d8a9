# make run: initialise adapters for the demo model (SAMPLES=256 reads more). make test: all tests, in two processes (JOBS=8 for more).
# make check: format, lint, types, layers.
# make nightly: thousands of fuzzed examples and 200 runs in one process. make mutation: mutation tests (SAMPLE=140 SEED=0 draws 140 changes).
# make audit: known vulnerabilities of what is installed; it asks the network (AUDIT=--allow-unreachable where there may be none).
PYTHON ?= python3
SAMPLES ?= 64
JOBS ?= 2
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --constraint constraints.txt

.PHONY: run test check nightly mutation audit format clean

run: .venv/installed
	$(BIN)/lora-da init --model "$$($(BIN)/python examples/demo_model.py)" \
		--data examples/data/word_problems.jsonl --samples $(SAMPLES) --output runs/demo --overwrite

# A file's tests stay in one process, where they share what they set up.
test: .venv/installed
	$(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile

check: .venv/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

nightly: .venv/installed
	$(BIN)/python -m pytest tests/test_fuzz_pipeline.py tests/test_fuzz_options.py tests/test_long_runs.py \
		--hypothesis-profile=nightly --hypothesis-show-statistics -p no:logging
	$(BIN)/python -m pytest -m nightly

mutation: .venv/installed
	$(BIN)/python .ci/mutation.py $(if $(SAMPLE),--sample $(SAMPLE)) $(if $(SEED),--seed $(SEED))

audit: .venv/installed
	$(BIN)/python .ci/audit.py $(AUDIT)

format: .venv/installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# torch first, so that nothing else chooses its build. The group `bare` goes in without what its metadata asks for:
# torchvision and llama-cpp-python, which nothing here uses.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(INSTALL) --upgrade "pip>=25.1"
	$(INSTALL) torch
	$(INSTALL) --editable ".[gguf]" --group dev --group docs
	$(INSTALL) --no-deps --group bare
	touch $@

clean:
	rm -rf .venv runs build dist site

# The documentation, into site/.
.PHONY: docs
docs: .venv/installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet
