# make run: initialise adapters for the demo model (SAMPLES=256 reads more). make test: all tests, in two processes (JOBS=8 for more).
# make check: format, lint, types, layers.
# make nightly: thousands of fuzzed examples and 200 runs in one process. make mutation: mutation tests (SAMPLE=140 SEED=0 draws 140 changes).
# make audit: known vulnerabilities of what is installed; it asks the network (AUDIT=--allow-unreachable where there may be none).
PYTHON ?= python3
SAMPLES ?= 64
JOBS ?= 2
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --constraint constraints.txt

# make compatibility: the table of docs/compatibility.md, from the results of the tests that it names (ONLY=test_sharded runs some again);
# it fetches DeepSpeed into build/zero3.
# make peft-suite: PEFT's own tests of LoRA from our start; fetches PEFT's sources and diffusers into build/peft.
# make servers: other programs read our adapters; fetches them (vLLM has half a gigabyte) into build/servers.
.PHONY: run test check nightly compatibility peft-suite servers mutation audit format clean

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

ZERO3 := deepspeed==0.19.* einops hjson msgpack ninja py-cpuinfo

compatibility: .venv/installed
	rm -rf build/zero3
	$(BIN)/python -m pip install --quiet --no-deps --target build/zero3 $(ZERO3)
	PATH="$(CURDIR)/build/zero3/bin:$$PATH" PYTHONPATH=tests:$(CURDIR)/build/zero3 $(BIN)/python -c "import sys, compatibility_table as it; sys.exit(it.main(sys.argv[1:]))" $(ONLY)

peft-suite: .venv/installed
	rm -rf build/peft
	$(BIN)/python -m pip download --quiet --no-deps --no-binary :all: --dest build/peft \
		"peft==$$($(BIN)/python -c 'import importlib.metadata as m; print(m.version("peft"))')"
	$(BIN)/python -m pip install --quiet --no-deps --target build/peft/diffusers diffusers
	PYTHONPATH=$(CURDIR)/build/peft/diffusers LORA_DA_PEFT_SOURCE="$$(echo $(CURDIR)/build/peft/peft-*.tar.gz)" \
		$(BIN)/python -m pytest tests/test_peft_suite.py -s

SWIFT := ms-swift==4.6.0 modelscope==1.40.2 modelscope-hub json-repair cryptography cffi pycparser \
	aiohttp multidict yarl propcache aiohappyeyeballs aiosignal frozenlist

servers: .venv/installed
	rm -rf build/servers
	$(BIN)/python -m pip download --quiet --no-deps --dest build/servers axolotl==0.19.0 llamafactory==0.9.5 vllm==0.33.0
	$(BIN)/python -m pip install --quiet --no-deps --target build/servers/parsers omegaconf antlr4-python3-runtime==4.9.*
	$(BIN)/python -m pip install --quiet --no-deps --target build/servers/swift $(SWIFT)
	$(BIN)/python -m pip install --quiet --no-deps --target build/servers/unsloth unsloth==2026.10.9 unsloth_zoo==2026.10.9
	PYTHONPATH=$(CURDIR)/build/servers/parsers LORA_DA_SERVER_WHEELS=$(CURDIR)/build/servers \
		$(BIN)/python -m pytest tests/test_server_parsers.py

mutation: .venv/installed
	$(BIN)/python .ci/mutation.py $(if $(SAMPLE),--sample $(SAMPLE)) $(if $(SEED),--seed $(SEED)) \
		$(addprefix --only ,$(ONLY)) $(if $(RESUME),--resume)

audit: .venv/installed
	$(BIN)/python .ci/audit.py $(AUDIT)

format: .venv/installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# torch first, so that nothing else chooses its build. The group `bare` goes in without what its metadata asks for:
# torchvision, llama-cpp-python and the like, which nothing here uses.
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
