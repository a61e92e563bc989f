# Thin: each target sets up what it needs, then calls one command. `make help` lists them.
SHELL := /bin/bash
.DEFAULT_GOAL := help
# The first of these that runs and is a Python that every pinned version has been resolved for.
PYTHON ?= $(shell for python in python3.11 python3.12 python3.13 python3; do \
  $$python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2> /dev/null && command -v $$python && break; done)
export PATH := $(CURDIR)/.venv/bin:$(PATH)
export AXOLOTL_DO_NOT_TRACK := 1

.PHONY: help setup lock demo demo-distill graph example test test-slow test-gpu test-fake-gpu lint format bench bench-preprocess bench-merge bench-kernel bench-train cv siamese compare ladder

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: .venv/installed .venv-kaggle/installed .venv-keras/installed .venv-gptq/installed .venv-graph/installed  ## create the five environments; each is made by every target that needs it

demo: .venv/installed .venv-kaggle/installed .venv-graph/installed  ## raw rows to submission.csv on two CPU cores, in minutes
	@python -m tests.demo

demo-distill: .venv/installed .venv-kaggle/installed .venv-graph/installed  ## votes, a teacher's labels and a pool to a student's submission.csv, in minutes
	@python -m tests.demo.distill

test: setup  ## the tests, without the slow ones
	@python -m pytest -n 2 --dist worksteal -m "not slow"

test-slow: setup  ## the slow proofs: two processes, the whole demo, 48,000 rows, the hidden test at full size, every spec published
	@python -m pytest -n 2 --dist worksteal -m slow

test-gpu: .venv/installed  ## the proofs that need a GPU: formats, 9B and 14B shapes, training; writes outputs/gpu.json
	@python -m pytest tests/gpu -rs

test-fake-gpu: .venv-fake-gpu/installed  ## large models on two T4s without data: devices, dtypes, memory; sets up 8 GB of its own
	@.venv-fake-gpu/bin/python -m pytest tests/fake_gpu/two_t4s.py --confcutdir tests/fake_gpu -s

lint: .venv/installed  ## style, recipes, and that generated kernels and schemas are up to date
	@ruff format --check . && ruff check . && lint-imports --no-logo --cache-dir .ruff_cache/imports && python -m recipes.pairwise recipes/*.yml && python -m kaggle_kernels build demo --kernels kaggle_kernels/examples --check
	@python docs/build_architecture.py --check && python -m recipes.pairwise.config.json_schema --check && python -m kaggle_kernels.build.json_schema --check

example: .venv/installed  ## build the one generated kernel that is committed
	@python -m kaggle_kernels build demo --kernels kaggle_kernels/examples

format: .venv/installed  ## put the code into house style
	@ruff check --fix . ; ruff format .

bench: .venv/installed .venv-kaggle/installed  ## what is claimed to be fast, measured side by side
	@python -m tests.bench input

bench-preprocess: .venv/installed  ## pairs of 50,000, 200,000 and 1,000,000 generated rows: seconds and peak memory; half an hour and 8 GB of disk
	@python -m tests.bench preprocess --rows 50000 --rows 200000 --rows 1000000

bench-merge: .venv/installed  ## merging and quantising a billion weights: ours beside PEFT, bitsandbytes, Axolotl (12 GB of disk)
	@python -m tests.bench.merge compare 2>/dev/null

bench-kernel: .venv/installed  ## scoring beside transformers' pipeline and the notebooks' way, and the planner: make bench-kernel PAIRS=data/pairs.parquet
	@python -m tests.bench.kernel $(if $(PAIRS),--pairs $(PAIRS)) $(if $(BASE),--base $(BASE)) $(ARGS)
	@$(if $(PAIRS),python -m tests.bench.planner $(PAIRS))

bench-train: .venv/installed  ## training beside TRL's RewardTrainer and transformers' Trainer; on a GPU 9B and 14B shapes too: make bench-train PAIRS=data/pairs.parquet BASE=FOLDER
	@python -m tests.bench.train --pairs $(or $(PAIRS),data/pairs.parquet) $(if $(BASE),--base $(BASE)) $(ARGS) 2>/dev/null
	@python -m tests.bench.train.shapes --pairs $(or $(PAIRS),data/pairs.parquet)

graph: .venv/installed .venv-kaggle/installed .venv-graph/installed  ## bring a recipe and all it needs up to date: make graph R=gemma2_cls ARGS=--dry-run
	@$(if $(R),,echo "error: R is missing; name a recipe: make graph R=gemma2_cls" >&2; exit 2;) pairwise make $(R) $(ARGS)

cv: .venv/installed  ## train all folds: make cv R=gemma2_cls ARGS="--base-model FOLDER"
	@$(if $(R),,echo "error: R is missing; name a recipe: make cv R=gemma2_cls" >&2; exit 2;) python -m recipes.pairwise.cv recipes/$(R).yml $(ARGS)

siamese: .venv-keras/installed  ## the Siamese LSTMs: make siamese PAIRS=data/pairs.parquet TEST=data/test.parquet
	@.venv-keras/bin/python recipes/siamese.py $(if $(PAIRS),--pairs $(PAIRS)) $(if $(TEST),--test $(TEST)) $(ARGS)

compare: .venv/installed .venv-keras/installed  ## methods side by side on one fold: make compare PAIRS=data/pairs.parquet FOLD=0
	@python -m tests.bench.compare $(or $(PAIRS),data/pairs.parquet) --fold $(or $(FOLD),0) $(if $(BASE),--base $(BASE)) $(ARGS)

ladder: .venv/installed  ## what teachers, a pool and extra rows add, measured on a lockbox: make ladder PAIRS=data/pairs.parquet BASE=FOLDER
	@python -m tests.bench.ladder $(or $(PAIRS),data/pairs.parquet) $(if $(BASE),--base $(BASE)) $(ARGS)

# One environment for everything, one with Kaggle's versions for rehearsals, one with TensorFlow for recipes/siamese.py,
# one for GPTQ, whose library wants another numpy, one for Snakemake, which wants another packaging. One more, with torch's build for CUDA, is for `make test-fake-gpu` only.
# Each is current while its marker is newer than what it was installed from.
.venv/installed: requirements.lock requirements.txt pyproject.toml
	@$(call create,.venv,requirements,5 minutes and 5 GB)
	@.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

.venv-kaggle/installed: kaggle_kernels/requirements.lock kaggle_kernels/requirements.txt
	@$(call create,.venv-kaggle,kaggle_kernels/requirements,1 minute and 2 GB)
	@touch $@

.venv-keras/installed: recipes/siamese.requirements.lock recipes/siamese.requirements.txt
	@$(call create,.venv-keras,recipes/siamese.requirements,1 minute and 2 GB)
	@touch $@

.venv-gptq/installed: postprocess/gptq/requirements.lock postprocess/gptq/requirements.txt
	@$(call create,.venv-gptq,postprocess/gptq/requirements,1 minute and 2 GB)
	@touch $@

.venv-graph/installed: recipes/graph.requirements.lock recipes/graph.requirements.txt
	@$(call create,.venv-graph,recipes/graph.requirements,15 seconds and 0.2 GB)
	@touch $@

.venv-fake-gpu/installed: tests/fake_gpu/requirements.lock tests/fake_gpu/requirements.txt
	@$(call create,.venv-fake-gpu,tests/fake_gpu/requirements,5 minutes and 8 GB)
	@touch $@

# $(1) the environment, $(2) its requirements file without ending, $(3) how long and how large.
# torch comes first and alone, in the build that suits the machine; then every other distribution, by its hash.
define create
fail() { echo "error: $$1" >&2; rm -f $(1)/installed; exit 2; }; \
[ -n "$(PYTHON)" ] || fail "no Python 3.11, 3.12 or 3.13 found; install one, or name it: make PYTHON=/path/to/python3.11"; \
$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' \
  || fail "$(PYTHON) is $$($(PYTHON) -V 2>&1); Python 3.11, 3.12 or 3.13 is needed: make PYTHON=/path/to/python3.11"; \
echo "installing $(2).lock into $(1) (about $(3)); the log is $(1)/install.log"; \
$(PYTHON) -m venv $(1) || fail "could not create $(1); on Debian and Ubuntu: apt install python3-venv"; \
pip="$(1)/bin/python -m pip install --disable-pip-version-check"; torch=$$(grep '^torch==' $(2).txt || true); \
{ [ -z "$$torch" ] || $$pip $$torch; } > $(1)/install.log 2>&1 \
  && $$pip --no-deps --require-hashes -r $(2).lock >> $(1)/install.log 2>&1 \
  || { grep -i '^error' $(1)/install.log | tail -5 >&2; fail "pip could not install $(2).lock; see $(1)/install.log"; }
endef

# The tool that resolves the pins, for every Python and platform at once.
UV := uv==0.13.9
LOCK := --universal --python-version 3.11 --generate-hashes --no-annotate --no-emit-package torch \
  --custom-compile-command "make lock"

lock: .venv/installed  ## pin every distribution again, with hashes, from the six requirements files
	@.venv/bin/python -m pip install --quiet --disable-pip-version-check $(UV)
	@for file in requirements kaggle_kernels/requirements recipes/siamese.requirements recipes/graph.requirements postprocess/gptq/requirements tests/fake_gpu/requirements; do \
	  .venv/bin/uv pip compile --quiet $(LOCK) $$file.txt --output-file $$file.lock || exit 2; done
