# The whole loop of the project. `make help` lists it.
SHELL := /bin/bash
BUILD := build/release
BENCH_MODEL := build/peers/model
JOBS ?= $(shell nproc)
FUZZ_SECONDS ?= 60
SUDO := $(if $(filter 0,$(shell id -u)),,sudo)
PORT ?= 8000

.DEFAULT_GOAL := help
.PHONY: help deps build run test check format bench bench-peers fuzz asan tsan clang clean

help:  ## This list
	@grep -E '^[a-z -]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 10

deps:  ## Install the Debian packages of packages.txt that are missing
	@missing=$$(for p in $$(grep -v '^#' packages.txt); do \
	  dpkg-query -W -f='$${Status}' $$p 2>/dev/null | grep -q 'ok installed' || echo $$p; done); \
	missing=$$(for p in $$missing; do \
	  case $$p in nodejs|npm) command -v $${p/nodejs/node} >/dev/null && continue;; esac; echo $$p; done); \
	if [ -n "$$missing" ]; then echo "installing:" $$missing; \
	  $(SUDO) apt-get update -qq && DEBIAN_FRONTEND=noninteractive $(SUDO) apt-get install -y -qq --no-install-recommends $$missing; fi

build: deps  ## Release build in build/release
	@cmake --preset release >/dev/null && cmake --build --preset release -j $(JOBS) --target elasticmoe

run: build  ## Serve the bundled model at http://127.0.0.1:8000 on two devices; ARGS="--autoscale slo" adds flags
	@exec $(BUILD)/elasticmoe serve models/demo --host 127.0.0.1 --port $(PORT) --devices 2 --served-model-name demo $(ARGS)

test: deps  ## Build and run all tests
	@cmake --preset fuzz >/dev/null && cmake --build --preset fuzz -j $(JOBS) --target fuzzers
	@cmake --preset release >/dev/null && cmake --build --preset release -j $(JOBS)
	@cd tests/clients && npm ci --silent --no-audit --no-fund --ignore-scripts
	@ctest --test-dir $(BUILD) --output-on-failure -j $(JOBS) --no-tests=error

check: deps  ## Layering, purity of core, formatting
	@python3 tools/check_layers.py
	@git ls-files '*.cc' '*.h' | xargs clang-format-14 --dry-run --Werror

format: deps  ## Format all sources
	@git ls-files '*.cc' '*.h' | xargs clang-format-14 -i

bench: build $(BENCH_MODEL)/config.json  ## This machine's tables: kernels, experts, prefill, decode, serve, load, llama.cpp
	@cmake --build --preset release -j $(JOBS) --target bench_expert_tables
	@$(BUILD)/elasticmoe bench kernels
	@$$(find $(BUILD) -name bench_expert_tables -type f)
	@$(BUILD)/elasticmoe bench prefill $(BENCH_MODEL) --tokens 128,512
	@$(BUILD)/elasticmoe bench decode $(BENCH_MODEL)
	@$(BUILD)/elasticmoe bench serve --start $(BENCH_MODEL) --concurrency 32 --requests 64 --input-tokens 128 --output-tokens 64
	@$(BUILD)/elasticmoe bench load $(BENCH_MODEL)
	@$(MAKE) --no-print-directory bench-peers

bench-peers:  ## ElasticMoE beside llama.cpp on the same weights (JSON=1: JSON on stdout alone; QUICK=1: fewer rows and rounds)
	@$(MAKE) --no-print-directory build >&2
	@if [ "$$(uname -m)" != x86_64 ]; then echo "bench-peers: skipped, needs x86-64" >&2; exit 0; fi; \
	if ! (cd bench/peers/llama_cpp && { [ node_modules/.package-lock.json -nt package-lock.json ] || npm install --no-save --silent --no-audit --no-fund --ignore-scripts --omit=optional; }) >&2; then \
	  echo "bench-peers: skipped, npm cannot fetch node-llama-cpp" >&2; exit 0; fi; \
	node bench/peers/llama_cpp/run.mjs $(if $(JSON),--json) $(if $(QUICK),--quick)

$(BENCH_MODEL)/config.json: | build
	@rm -rf $(BENCH_MODEL) && mkdir -p $(dir $(BENCH_MODEL))
	@$(BUILD)/elasticmoe make-model $$(cat bench/model.args) $(BENCH_MODEL)

fuzz: deps  ## Fuzz every decoder of foreign bytes, FUZZ_SECONDS each (default 60)
	@cmake --preset fuzz >/dev/null && cmake --build --preset fuzz -j $(JOBS) --target fuzzers
	@FUZZ_SECONDS=$(FUZZ_SECONDS) tools/run_fuzzers.sh build/fuzz

asan tsan clang: deps  ## The unit tests under address+undefined, thread sanitizer, or clang
	@cmake --preset $@ >/dev/null && cmake --build --preset $@ -j $(JOBS)
	@ctest --test-dir build/$@ --output-on-failure -j $(JOBS) --no-tests=error -LE 'e2e|fuzz'

clean:  ## Remove all builds
	@rm -rf build
