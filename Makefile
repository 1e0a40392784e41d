# `make demo` and `make test` do everything on a fresh machine that has Rust, a C and C++ compiler, and Python 3 with pip and venv.
SHELL := /bin/bash
export CARGO_TARGET_DIR ?= $(HOME)/.cache/rdpo-target
CARGO ?= cargo
MODEL := smollm2-135m-instruct
BINARY := $(CARGO_TARGET_DIR)/release/rdpo
VENV ?= $(HOME)/.cache/rdpo-parity-venv
# What runs on the GPU machine, which needs no Rust; the Python there has torch, transformers and peft.
GPU_DIR ?= build/gpu
GPU_FEATURES ?= cuda
# Of rdpo, it, unit and bench: check.py wants those that its sections run.
GPU_PARTS ?= rdpo it unit bench
PYTHON ?= python3
# The least that every card since Ampere runs.
cuda-check gpu-build: export CUDA_COMPUTE_CAP ?= 80

.PHONY: help build model demo test check unit doc openapi sdk parity bench cuda-check gpu-build gpu-check

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-11s %s\n", $$1, $$2}'

build: ## the release binary (FEATURES=cuda for a GPU)
	$(CARGO) build --release --bin rdpo $(if $(FEATURES),--no-default-features --features $(FEATURES))

model: ## fetch and check the small chat model
	@models/fetch.sh $(MODEL)

demo: build model ## serve, align, swap and compare on this machine, with a live display
	@$(BINARY) demo $(DEMO_ARGS)

test: model check unit doc $(if $(wildcard tests/sdk/run.sh),sdk) ## everything CI runs
	@echo "make test: all passed"

check: ## format and lints
	$(CARGO) fmt --check
	$(CARGO) clippy --release --all-targets -- -D warnings

unit: ## unit and integration tests
	$(CARGO) test --release --lib --bins --tests

doc: ## the API documentation, without warnings
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --release --no-deps --document-private-items --quiet

openapi: ## write openapi.yaml from the code
	UPDATE_OPENAPI=1 $(CARGO) test --release --test it openapi

sdk: build ## the OpenAI SDK, schemathesis and promtool against a live server
	tests/sdk/run.sh

parity: build model ## derive the fixtures again with PyTorch + PEFT and compare, llama.cpp as an endpoint (large downloads)
	python3 -m venv $(VENV)
	$(VENV)/bin/pip install --quiet -r tests/fixtures/requirements.txt
	$(VENV)/bin/python tests/fixtures/check_fixtures.py
	$(CARGO) bench --no-run --bench bench
	$(VENV)/bin/pip install --quiet -r benches/compare/requirements.txt
	$(VENV)/bin/python benches/compare/compare.py export
	$(VENV)/bin/python benches/compare/compare.py interop
	RDPO_TEST_LLAMA_CPP=$(VENV)/bin/python tests/sdk/run.sh test_llama_cpp.py

bench: ## criterion benches
	$(CARGO) bench --bench bench

cuda-check: ## type-check the CUDA build (needs nvcc)
	$(CARGO) check --release --no-default-features --features cuda

gpu-build: ## the executables for gpu-check, into build/gpu (needs nvcc)
	set -o pipefail; flags="--release --no-default-features --features $(GPU_FEATURES) --message-format=json-render-diagnostics"; \
	$(if $(filter-out rdpo,$(GPU_PARTS)),{ $(CARGO) test --no-run --lib --test it $$flags && $(CARGO) bench --no-run --bench bench $${flags/--release /}; },$(CARGO) build --bin rdpo $$flags) \
	| python3 tests/gpu/gather.py $(GPU_DIR) $(GPU_PARTS)

gpu-check: ## check and measure on a GPU, report in gpu-report.md (docs/gpu.md)
	$(PYTHON) tests/gpu/check.py --binaries $(GPU_DIR) $(GPU_ARGS)
