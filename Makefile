# Every target does its own set-up, once, from a bare checkout: a virtual environment in .venv, torch, this project.
#   make demo       real model: chat, then the same requests through stock transformers and through hf_paged
#   make test       the tests (minutes)            make test-all   the slow ones too
#   make test-quantizers   other packages' quantized models under the engine, and our checkpoints read by the formats' own tools
#   make test-page  the server's chat page in a headless Chromium, which is fetched where there is none (CHROMIUM names one)
#   make bench      stock, hf_paged and others side by side (5 minutes; ARGS="--full --readme": README's figures)
#   make models     every family against stock; writes docs/models.md
#   make bench-server   1000 streaming clients at the server, beside the engine alone (6 minutes)
#   make bench-quant   quantized weights and caches on this CPU: speed, memory, perplexity (8 minutes)
#   make gpu        a machine with a GPU: is everything right there, then how fast (10 minutes); results in benchmarks/results/gpu
#   make clean      remove what was made here, .venv included
# PYTHON picks the interpreter for a new .venv; TORCH what is installed where torch is missing; ARGS goes to the command.
# Tests run in WORKERS processes of one thread each (ARGS="-n 0" for one process).
# `make gpu` makes no .venv: it runs in PYTHON with the torch, triton and transformers that are there, and installs nothing.

PYTHON ?= python3
TORCH  ?= torch==2.13.0
ARGS   ?=
WORKERS ?= $(shell n=$$(nproc 2>/dev/null || echo 2); echo $$((n < 8 ? n : 8)))

ROOT   := $(patsubst %/,%,$(dir $(abspath $(lastword $(MAKEFILE_LIST)))))
VENV   := $(ROOT)/.venv
PY     := $(VENV)/bin/python
STAMP  := $(VENV)/.hf_paged-installed
PYTEST := OMP_NUM_THREADS=1 '$(PY)' -m pytest -n $(WORKERS) --dist worksteal
QUANTIZERS := $(ROOT)/.venv-quantizers
BROWSER := $(ROOT)/.venv-browser
MIN    := import sys; sys.exit(sys.version_info < (3, 11))

export PIP_DISABLE_PIP_VERSION_CHECK = 1
export PYTHONUNBUFFERED = 1

.PHONY: help setup demo test test-all test-quantizers test-page bench bench-server bench-quant models gpu clean
.DEFAULT_GOAL := help

help:
	@sed -n 's/^#   //p' '$(ROOT)/Makefile'

setup: $(STAMP)

demo: $(STAMP)
	@cd '$(ROOT)' && '$(PY)' -m hf_paged demo $(ARGS)

test: $(STAMP)
	@cd '$(ROOT)' && $(PYTEST) -m 'not slow' $(ARGS)

test-all: $(STAMP)
	@cd '$(ROOT)' && $(PYTEST) $(ARGS)

test-quantizers: $(QUANTIZERS)/.installed
	@cd '$(ROOT)' && '$(QUANTIZERS)/bin/python' -m pytest -W ignore tests/quantizers/packages.py tests/quantizers/tools.py $(ARGS)

test-page: $(STAMP) $(BROWSER)/.installed
	@cd '$(ROOT)' && HF_PAGED_PYTHON='$(PY)' '$(BROWSER)/bin/python' -m pytest --noconftest -c /dev/null --rootdir=. \
	  -p no:cacheprovider tests/server/page_browser.py $(ARGS)

bench: $(STAMP)
	@cd '$(ROOT)' && '$(PY)' -m hf_paged bench $(ARGS)

bench-server: $(STAMP)
	@cd '$(ROOT)' && '$(PY)' benchmarks/run.py server $(ARGS)

bench-quant: $(STAMP)
	@cd '$(ROOT)' && '$(PY)' benchmarks/run.py quant.engine $(ARGS)

models: $(STAMP)
	@cd '$(ROOT)' && '$(PY)' tests/families/coverage.py --write $(ARGS)

gpu:
	@'$(PYTHON)' -c 'import torch, triton, transformers; assert torch.cuda.is_available(), "torch finds no GPU"'
	@'$(PYTHON)' '$(ROOT)/benchmarks/run.py' gpu.check
	@'$(PYTHON)' '$(ROOT)/benchmarks/run.py' gpu $(ARGS)

clean:
	rm -rf '$(VENV)' '$(QUANTIZERS)' '$(BROWSER)' '$(ROOT)/build' '$(ROOT)/dist' '$(ROOT)/hf_paged.egg-info' '$(ROOT)/.pytest_cache' \
	  '$(ROOT)/.hypothesis' '$(ROOT)/.ruff_cache'
	find '$(ROOT)' -name __pycache__ -type d -prune -exec rm -rf {} +

# A .venv that is already there is used as it is, if its Python will do.
$(STAMP): $(ROOT)/pyproject.toml $(ROOT)/setup.py
	@if [ ! -e '$(PY)' ]; then \
	  command -v '$(PYTHON)' >/dev/null || { echo "hf_paged: '$(PYTHON)' was not found; name a Python 3.11 or newer: make PYTHON=..."; exit 1; }; \
	  '$(PYTHON)' -c '$(MIN)' || { echo "hf_paged needs Python 3.11 or newer, '$(PYTHON)' is $$('$(PYTHON)' -V); name another: make PYTHON=..."; exit 1; }; \
	  echo "[set-up 1/3] virtual environment in $(VENV)"; \
	  '$(PYTHON)' -m venv '$(VENV)' || { rm -rf '$(VENV)'; echo "hf_paged: '$(PYTHON) -m venv' failed (on Debian: apt-get install python3-venv)"; exit 1; }; \
	else \
	  echo "[set-up 1/3] using $(VENV)"; \
	fi
	@'$(PY)' -c '$(MIN)' || { echo "hf_paged needs Python 3.11 or newer, $(VENV) has $$('$(PY)' -V); 'make clean' removes it"; exit 1; }
	@if '$(PY)' -c 'import torch' 2>/dev/null; then \
	  echo "[set-up 2/3] torch is there: $$('$(PY)' -c 'import torch; print(torch.__version__)')"; \
	else \
	  echo "[set-up 2/3] installing $(TORCH)"; '$(PY)' -m pip install '$(TORCH)'; \
	fi
	@echo "[set-up 3/3] installing hf_paged and what it needs"
	@'$(PY)' -m pip install -q -e '$(ROOT)[demo,bench,test]'
	@touch '$@'
	@echo "[set-up] done"

# An environment of its own: these packages want each other's and torch's versions. Of the tools only the layers that read
# checkpoints are used, which need little of what the tools ask for; two no longer work beside transformers 5 as a whole.
TOOLS := auto-gptq==0.7.1 autoawq==0.2.9 gptqmodel==7.7.0 \
  defuser device-smi kernels logbar pillow pypcre threadpoolctl tokenicer
$(QUANTIZERS)/.installed: $(ROOT)/pyproject.toml $(ROOT)/tests/quantizers/requirements.txt
	@[ -e '$(QUANTIZERS)/bin/python' ] || '$(PYTHON)' -m venv '$(QUANTIZERS)'
	@'$(QUANTIZERS)/bin/python' -c 'import torch' 2>/dev/null || '$(QUANTIZERS)/bin/python' -m pip install '$(TORCH)'
	@'$(QUANTIZERS)/bin/python' -m pip install -q -e '$(ROOT)[test]' -r '$(ROOT)/tests/quantizers/requirements.txt' \
	  "torch==$$('$(QUANTIZERS)/bin/python' -c 'import torch; print(torch.__version__)')"
	@'$(QUANTIZERS)/bin/python' -m pip install -q --no-deps setuptools wheel
	@GPTQMODEL_BUILD_CUDA_EXT=0 '$(QUANTIZERS)/bin/python' -m pip install -q --no-deps --no-build-isolation $(TOOLS)
	@touch '$@'

# An environment of its own: the browser's driver needs nothing of the project, which it sees through its server.
$(BROWSER)/.installed:
	@[ -e '$(BROWSER)/bin/python' ] || '$(PYTHON)' -m venv '$(BROWSER)'
	@'$(BROWSER)/bin/python' -m pip install -q 'playwright>=1.50' 'pytest>=8'
	@[ -n "$$CHROMIUM" ] || command -v chromium chromium-browser google-chrome >/dev/null || '$(BROWSER)/bin/playwright' install --with-deps chromium
	@touch '$@'
