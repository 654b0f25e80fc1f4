# Every target sets up its own environment in .venv; nothing is installed by hand.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test bench lint types docs dist android-test android-apk aarch64-parity clean

demo: .venv/installed
	$(BIN)/gemma-mtp-export demo

test: .venv/installed-dev
	$(BIN)/pytest

bench: .venv/installed
	$(BIN)/python -m exporter.studies.two_stage_speed
	$(BIN)/python -m exporter.studies.cluster_acceptance
	$(BIN)/python -m exporter.studies.kmeans_comparison
	$(BIN)/python -m exporter.studies.recipe_speed
	$(BIN)/python -m exporter.studies.draft_planning

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo
	$(BIN)/codespell

types: .venv/installed-dev
	$(BIN)/mypy

docs: .venv/installed
	$(BIN)/python -m exporter.cli.command_reference > docs/cli.md

# REPOSITORY is where its files can be read, such as https://HOST/OWNER/NAME/blob/main: PyPI shows README.md alone.
dist: .venv/installed-dev
	@test -n "$(REPOSITORY)" || { echo "make dist REPOSITORY=https://HOST/OWNER/NAME/blob/main"; exit 2; }
	REPOSITORY=$(REPOSITORY) $(BIN)/pip wheel --quiet --no-deps --wheel-dir dist .

# See android_demo/README.md: none of these needs the Android SDK or a phone.
android-test: .venv/installed-dev
	$(MAKE) -j2 -C android_demo test BIN=$(abspath $(BIN))

android-apk: .venv/installed-dev
	$(MAKE) -C android_demo apk BIN=$(abspath $(BIN))

aarch64-parity: .venv/installed-dev
	$(MAKE) -C android_demo aarch64-parity BIN=$(abspath $(BIN))

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "gemma-mtp-export needs Python 3.11 or later: make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv .venv

.venv/installed: .venv/bin/python pyproject.toml setup.py
	$(BIN)/pip install --quiet --disable-pip-version-check --editable .
	touch $@

.venv/installed-dev: .venv/installed
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv demo-bundle demo-bundle.costs.json
