# Everything a developer runs. Targets work in a fresh clone: they make .venv when they need it.
# Variables: PYTHON (the interpreter for .venv), JOBS (test processes), ARGS (more arguments),
# MINUTES (of soak, and of each target of fuzz), TARGETS (of fuzz), FAMILY (where the model family is
# kept), FAMILY_ARGS (how to make it).

VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
PYTEST := $(BIN)/python -m pytest
JOBS   ?= 2
# Each process begins with its part in order, so that few make the same fixtures twice.
SPREAD := -n $(JOBS) --dist worksteal
ARGS   ?=
TARGETS ?=
TORCH  ?= torch==2.13.0
CODE   := fragfs tests tools
FAMILY ?= build/family
MINUTES ?= 3
SOAK   ?=

# The first interpreter that is new enough; PYTHON=... on the command line overrides the search.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 /usr/bin/python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)

.DEFAULT_GOAL := help
.PHONY: help venv venv-torch demo test test-fast test-mount lint check fix fuzz bench bench-read family bench-storage soak \
	unmount clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

venv: $(READY) ## make .venv with fragfs and everything its tests need

# pyfuse3 is compiled where its index has no wheel: hence a compiler, libfuse3 and Python's headers.
$(READY): pyproject.toml $(wildcard fragfs/*/*.[ch])
	@sh tools/system_packages.sh "$(PYTHON)"
	@python="$(PYTHON)"; "$${python:-python3}" -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[test,dev]'
	@touch $@

venv-torch: $(READY) ## add torch and transformers, for the tests that load with them (large)
	$(BIN)/python -m pip install --quiet '$(TORCH)'
	$(BIN)/python -m pip install --quiet transformers

demo: $(READY) ## see it work: a real model family, added, mounted, read back and compared
	@$(BIN)/python -m tools.demo $(ARGS)

# Two halves, so that the soak runs beside the one that mounts nothing.
test: $(READY) ## run the whole suite; with SOAK=3, so many minutes of soak beside the second half
	@status=0; soak=; \
	$(PYTEST) $(SPREAD) -m mount $(ARGS) || status=$$?; \
	if [ -n "$(SOAK)" ]; then $(BIN)/python -m tools.soak --minutes $(SOAK) & soak=$$!; fi; \
	$(PYTEST) $(SPREAD) -m "not mount" $(ARGS) || status=$$?; \
	if [ -n "$$soak" ]; then wait $$soak || status=$$?; fi; \
	exit $$status

test-fast: $(READY) ## run what needs no mount and is quick
	@$(PYTEST) $(SPREAD) -m "not slow and not mount" $(ARGS)

test-mount: $(READY) ## run what mounts a real filesystem
	@$(PYTEST) $(SPREAD) -m mount $(ARGS)

lint: $(READY) ## check format, style, types and layers
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/ruff check $(CODE)
	$(BIN)/mypy
	@$(PYTEST) -q tests/test_layering.py

check: lint test-fast ## what to run before a commit: lint and test-fast

fix: $(READY) ## format, and repair what ruff can
	$(BIN)/ruff check --fix $(CODE)
	$(BIN)/ruff format $(CODE)

# MINUTES each; TARGETS names some of them. Finds are kept below build/fuzz.
fuzz: $(READY) ## fuzz parsers, pack and catalog readers with atheris
	@$(BIN)/python -m pip install --quiet --editable '.[fuzz]'
	@$(BIN)/python -m tools.fuzz --minutes $(MINUTES) $(TARGETS)

bench: $(READY) ## measure on this machine; prints machine, date and command
	@$(BIN)/python -m tools.bench $(ARGS)

bench-read: $(READY) ## measure reading through a mount, beside other servers (8 minutes)
	@$(BIN)/python -m tools.bench --section read --section read-many $(ARGS)

# Trained where torch is installed (make venv-torch), else made up. Kept: it takes some minutes.
family: $(FAMILY)/family.json ## make the model family that bench-storage measures, 1.1 GB

$(FAMILY)/family.json: | $(READY)
	@rm -rf $(FAMILY).part
	@$(BIN)/python -m tools.make_family $(FAMILY).part $(FAMILY_ARGS)
	@rm -rf $(FAMILY) && mv $(FAMILY).part $(FAMILY)

bench-storage: $(READY) family ## measure what a model family takes, beside other tools (long)
	@$(BIN)/python -m tools.bench --section storage --section family --family $(FAMILY) $(ARGS)

soak: $(READY) ## run everything at once for MINUTES=3, with random kills
	@$(BIN)/python -m tools.soak --minutes $(MINUTES) $(ARGS)

# Only mounts of tests and demos: those below the temporary directory or this one.
unmount: ## detach the mounts that a killed test or demo left behind
	@awk -v tmp="$${TMPDIR:-/tmp}/" -v here="$(CURDIR)/" \
		'$$3 == "fuse.fragfs" && (index($$2, tmp) == 1 || index($$2, here) == 1) {print $$2}' \
		/proc/mounts | while read -r point; do \
			echo "unmounting $$point"; fusermount3 -u -z "$$(printf '%b' "$$point")"; done

clean: ## remove .venv and everything that was built
	rm -rf $(VENV) .demo .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist *.egg-info
	find $(CODE) -name __pycache__ -type d -prune -exec rm -rf {} +
