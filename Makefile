# Every target sets up what it needs: the first call makes .venv, later calls see that nothing changed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TEST_STAMP := $(VENV)/.installed-for-tests
RIVALS_STAMP := $(VENV)/.installed-rivals
SERVE_STAMP := $(VENV)/.installed-serve
TORCH := $(shell grep '^torch==' constraints.txt)
HY3DGEN := $(shell grep '^hy3dgen==' constraints.txt)
TENSORRT := $(shell grep '^tensorrt_' constraints.txt)
CUDA := $(shell grep -E '^(cuda-|nvidia-cuda-)' constraints.txt)
FASHION_MNIST ?= /usr/share/datasets/fashion-mnist

.PHONY: demo serve test test-slow torture torture-quick lint format bench models matrix readme evidence evidence-quick data train clean
.DEFAULT_GOAL := test

# torch comes first and alone, so that pip takes the wheel it is given instead of resolving it with everything else.
$(STAMP): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt "$(TORCH)"
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[cpu,compile]"
	@touch $@

# What the tests alone need.
# hy3dgen comes without its dependencies, of which one file is needed and none is wanted; where it is not to be had, its
# tests are skipped. So are those of TensorRT where its packages are not: TensorRT-RTX, which builds engines without a
# GPU, and the bindings of TensorRT 11, without its libraries, which show that what is called is there; and the same of the
# bindings of CUDA's driver, and its compiler NVRTC, which runs without a GPU.
$(TEST_STAMP): $(STAMP)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[cpu,compile,test,hunyuan3d]"
	-$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps "$(HY3DGEN)"
	-$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps $(TENSORRT)
	-$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps $(CUDA)
	@touch $@

demo: $(STAMP)
	$(BIN)/python -m examples.fashion_mnist.demo --output demo

# Ray Serve and what the example of a server needs beside it.
$(SERVE_STAMP): $(STAMP)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[cpu,compile,serve]"
	@touch $@

demo/served.edit: $(STAMP)
	@mkdir -p demo
	$(BIN)/python -m examples.serve.bundle $@

# A server at http://127.0.0.1:8000 until it is interrupted: docs/serving.md. OPTIONS="--replicas 4 --port 9000"
serve: $(SERVE_STAMP) demo/served.edit
	$(BIN)/python -m examples.serve.server demo/served.edit $(OPTIONS)

# The tests run even where a check fails, so that one run shows everything; the summary of pytest comes last.
test: $(TEST_STAMP)
	@status=0; $(MAKE) --no-print-directory lint || status=$$?; $(BIN)/python -m pytest || status=$$?; exit $$status

test-slow: $(TEST_STAMP) data
	$(BIN)/python -m pytest -m slow

# Campaigns against bundles, writers and long runs, with what came of them: docs/reliability.md. The quick ones are in `test`.
torture: $(TEST_STAMP)
	$(BIN)/python -m tests.torture.bundles
	$(BIN)/python -m tests.torture.operators
	$(BIN)/python -m tests.torture.models
	$(BIN)/python -m tests.torture.kills
	$(BIN)/python -m tests.torture.long_runs

torture-quick: $(TEST_STAMP)
	$(BIN)/python -m pytest -n 0 tests/test_torture.py

lint: $(TEST_STAMP)
	@status=0; for check in "ruff format --check" "ruff check" mypy lint-imports; do \
		echo "$$check"; $(BIN)/$$check || status=1; done; exit $$status

format: $(TEST_STAMP)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: $(STAMP)
	$(BIN)/python -m benchmarks.flux_mid
	$(BIN)/python -m benchmarks.readme

# Every transformer of diffusers, compiled and compared: docs/models.md.
models: $(STAMP)
	$(BIN)/python -m benchmarks.models

# The tests that depend on other libraries, with the oldest and the newest of them: docs/deploy.md. In environments of their own.
matrix: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.matrix
	$(BIN)/python -m benchmarks.readme

readme: $(STAMP)
	$(BIN)/python -m benchmarks.readme

# cache-dit, without its dependencies, is a rival beside the others; where it is not to be had, it is left out.
$(RIVALS_STAMP): $(STAMP)
	-$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps cache-dit==1.5.3 pyyaml
	@touch $@

# All figures of docs/evidence.md, made again: about two hours of one core, goes on where it stopped (runs/evidence).
evidence: $(RIVALS_STAMP) data
	OMP_NUM_THREADS=1 $(BIN)/python -m examples.fashion_mnist.evidence

# The headline rows alone: status 1 where one lies outside of the interval that was recorded for it.
evidence-quick: $(STAMP) data
	OMP_NUM_THREADS=1 $(BIN)/python -m examples.fashion_mnist.evidence --quick

# Only training, the evidence and the slow tests read the images: the demo's weights and statistics are in the repository.
data:
	@if [ -e $(FASHION_MNIST)/train-images-idx3-ubyte.gz ]; then true; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then apt-get install -y dataset-fashion-mnist; \
	else echo "Fashion-MNIST is missing: install the Debian package dataset-fashion-mnist" >&2; exit 1; fi

train: $(STAMP) data
	$(BIN)/python -m examples.fashion_mnist.train_dense --output runs/dense

clean:
	rm -rf $(VENV) demo build dist *.egg-info
