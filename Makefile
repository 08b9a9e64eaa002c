.PHONY: help setup setup-dev serve check test unit clean

CONFIG ?= configs/quickstart.yaml

help: ## what there is
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

setup: ## make .venv with everything a CPU host runs
	@scripts/setup.sh

setup-dev:
	@scripts/setup.sh --dev

serve: setup ## serve CONFIG (configs/quickstart.yaml)
	@.venv/bin/dynamo-lite serve $(CONFIG)

check: setup-dev ## ruff, mypy --strict, import rules
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/pytest -q tests/unit/test_imports.py

unit: setup-dev ## the tests that need no other process
	.venv/bin/pytest -q tests/unit

test: setup-dev ## every test that runs without a GPU
	.venv/bin/pytest -q -m "not gpu" tests

clean: ## remove .venv and caches
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache
