# Every target that runs something first makes .venv (tools/install.sh); where it is up to date
# that takes no time. PYTHON= names the interpreter, TORCH_INDEX= the package index for torch.

export PYTHON TORCH_INDEX
VENV_PYTHON := .venv/bin/python
PYTEST := $(VENV_PYTHON) -m pytest

# Runs the tests with one mark; pytest exits with 5 where there are none.
marked = $(PYTEST) -m $(1) || { [ $$? = 5 ] && echo "No test is marked '$(1)' yet."; }

.PHONY: help install eval_vlmevalkit demo test test-full soak test-browser bench peers lint

help:
	@echo "make install       create .venv with everything in it (the other targets do it too)"
	@echo "make eval_vlmevalkit  create .venv-vlmevalkit, for eval/run.py --backend vlmevalkit"
	@echo "make demo          the recipe in miniature: two donors, graft, two stages, chat, score"
	@echo "make test          the tests, in minutes"
	@echo "make test-full     the slow tests and those for a GPU as well, then the demo"
	@echo "make soak          the tests with long counts"
	@echo "make test-browser  the tests that drive a browser"
	@echo "make bench         every script in bench/ (ARGS=--quick: their smallest sizes)"
	@echo "make peers         bench/peers beside ms-swift, in .venv-swift (ARGS= for its options)"
	@echo "make lint          formatting and lint, without changing a file"

install:
	@bash tools/install.sh

eval_vlmevalkit:
	@bash tools/install.sh vlmevalkit

demo: install
	$(VENV_PYTHON) -m examples.digits.run $(ARGS)

test: install
	$(PYTEST) -m "not slow and not soak and not browser and not gpu" $(ARGS)

test-full: install eval_vlmevalkit
	$(PYTEST) -m "not soak and not browser"
	$(VENV_PYTHON) -m examples.digits.run

soak: install
	@$(call marked,soak)

test-browser: install
	@$(call marked,browser)

bench: install
	$(VENV_PYTHON) -m bench $(ARGS)

peers: install
	@bash tools/install.sh swift
	$(VENV_PYTHON) -m bench.peers $(ARGS)

lint: install
	$(VENV_PYTHON) -m ruff format --check .
	$(VENV_PYTHON) -m ruff check .
