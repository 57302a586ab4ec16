# Two commands on a fresh machine with Python (>= 3.10) and g++: `make demo` and `make test`.
# Every target does its own set-up in .venv.

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.14.1
WORKERS ?= auto
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# What is imported is compiled then: 25 s less than all of torch ahead.
INSTALL := $(PIP) install -q --no-compile
SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh') \
  setup.py tools/cuda_build.py pyproject.toml

# Threads that spin while they wait take the cores from those that work.
export OMP_WAIT_POLICY ?= passive

# The grid of benchmarks/grid.py: BENCH=--quick for a look, BENCH='--compare old.json' after a change.
BENCH ?=

# The GPU machine's Python where there is one.
GPU_PYTHON ?= $(shell python3.12 -c "" 2>/dev/null && echo python3.12 || echo $(PYTHON))
GPU_VENV ?= .venv-gpu
# Options of the run: GPU='--budget 290 --stages facts,build,plans'.
GPU ?=

.PHONY: demo test bench models scaling matrix lint format accuracy sass gpu gpu-rehearsal clean

demo: $(VENV)/built
	$(BIN)/python -m bnext demo --output demo.png

# In as many processes as there are cores; a test that waits for a build lets others go ahead.
test: $(VENV)/built
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

# docs/bench/: times beside eager, torch.compile, oneDNN and a copy, against the targets; 15 minutes.
bench: $(VENV)/built
	$(BIN)/python -m benchmarks.suite $(BENCH)

# docs/bench/models.md: training steps of ResNet-18, MobileNetV2 and a tabular network.
models: $(VENV)/built
	$(BIN)/python -m benchmarks.models

# docs/bench/scaling.md: the kernels from 1 MiB to 1 GiB; 7 GiB of memory.
scaling: $(VENV)/built
	$(BIN)/python -m benchmarks.scaling

# The table of docs/accuracy.md: running_var and outputs of bnext and PyTorch against float64.
accuracy: $(VENV)/built
	$(BIN)/python -m benchmarks.accuracy --table docs/accuracy.md

# docs/models.md, docs/fusion.md: bnext.convert on networks of torchvision, timm and others; what it
# computes, and what it fuses.
matrix: $(VENV)/built
	$(BIN)/python -W ignore -m tools.model_matrix
	$(BIN)/python -W ignore -m tools.fusion_survey --output docs/fusion.md

# docs/sass.md: registers, occupancy and instructions per element, off the built machine code.
sass: $(VENV)/built
	$(BIN)/python -m tools.sass_table

# All that needs a GPU, built for the one at hand, in gpu-report/: docs/gpu.md. The same without make:
# python -m tools.gpu_run --output DIR, with any interpreter that has torch.
gpu: $(VENV)/requirements
	$(BIN)/python -m tools.gpu_run --output gpu-report $(GPU)

# The same without a GPU: the executor and the CPU stand in. In an environment of its own, without
# a network; on 2 cores half an hour.
gpu-rehearsal: $(GPU_VENV)/requirements
	$(GPU_VENV)/bin/python -m tools.gpu_run.rehearse --output gpu-report/rehearsal $(GPU)

$(GPU_VENV)/requirements: tools/gpu_run/machine.txt
	$(GPU_PYTHON) -m venv $(GPU_VENV)
	$(GPU_VENV)/bin/python -m pip --disable-pip-version-check install -q --no-compile -r $<
	touch $@

lint: $(VENV)/built
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files '*.cpp' '*.h' '*.cu' '*.cuh')
	$(BIN)/mypy

format: $(VENV)/built
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files '*.cpp' '*.h' '*.cu' '*.cuh')

# The extras first: they change less often than the sources, and bring what the build needs: for a
# CUDA build of torch, nvcc too.
$(VENV)/requirements: pyproject.toml tools/extras.py
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) "$(TORCH)" numpy
	$(INSTALL) "$(TORCH)" $$($(BIN)/python tools/extras.py build test bench cli demo models dev \
	  $$($(BIN)/python -c 'import torch; print("cuda" if torch.version.cuda else "")'))
	touch $@

$(VENV)/built: $(VENV)/requirements $(SOURCES)
	$(INSTALL) --no-build-isolation --no-deps -e .
	touch $@

clean:
	rm -rf $(VENV) $(GPU_VENV) build gpu-report bnext/*.so bnext/_build_info.py
