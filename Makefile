# make demo     generated data, a trained model and runs/demo/report.html
# make test     lint, types and tests; make test-all adds the slow ones
# make test-gpu the tests that need a GPU, on a machine that has one
# make quick    lint, types and the tests of settings, command line, data and documentation
# make docs     the documentation as a site, in site/
# make lock     constraints.txt after a change of pyproject.toml; LOCK=--upgrade moves it to the newest versions
# make newest   make test with the newest version of everything but torch, in .venv-newest
# Each creates .venv and installs what it needs first; later runs skip that.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
READY := $(VENV)/.installed
# The exact version of everything, or of torch alone (make newest).
VERSIONS := --constraint constraints.txt

.PHONY: demo test test-all test-gpu quick newest lint types format docs lock wheel clean

demo: $(READY)
	$(BIN)/engine demo --out runs/demo
	@echo "open $(CURDIR)/runs/demo/report.html"

# Three processes: triton's interpreter and its compiler exclude each other, and neither should slow the rest down.
# One worker a core (fewer where memory is short: tests/conftest.py), each on one thread: small tensors gain nothing from
# more. A worker keeps to neighbouring tests, which share fixtures, and takes over some of another's when it is done.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses auto --dist worksteal

test: lint types
	$(PYTEST) --ignore=tests/interpret --ignore=tests/aot $(SLOW)
	TRITON_INTERPRET=1 $(PYTEST) tests/interpret $(SLOW)
	$(PYTEST) tests/aot $(SLOW)

# Last, what judges times, with the machine to itself.
test-all: SLOW := --slow
test-all: test
	$(BIN)/pytest --slow -m alone tests/bench

test-gpu: $(READY)
	$(BIN)/python -m tests.gpu $(TESTS)

QUICK := tests/docs tests/loaders tests/test_cli.py tests/test_config.py tests/test_metrics.py tests/test_packaging.py
quick: lint types
	$(PYTEST) $(QUICK)

newest:
	ENGINE_NEWEST=1 $(MAKE) VENV=.venv-newest VERSIONS="$$(grep '^torch==' constraints.txt)" test

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell

# A user's code against the public API, strictly; the package itself, less so ([tool.mypy] in pyproject.toml). Both at
# once, each with a cache of its own: what one keeps of a module the other, with other settings, cannot use.
types: $(READY)
	@$(BIN)/mypy --strict --follow-imports=silent --cache-dir .mypy_cache/strict tests/docs/typed_usage.py & strict=$$!; \
	  $(BIN)/mypy; package=$$?; wait $$strict && exit $$package

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "open $(CURDIR)/site/index.html"

lock: $(READY)
	$(BIN)/python tools/lock.py $(LOCK)

wheel: $(READY)
	$(PIP) wheel --no-deps --wheel-dir dist .

clean:
	rm -rf build dist site .pytest_cache .ruff_cache .mypy_cache

# The stamp is made last, so that an installation that failed half-way is taken up again.
$(READY): pyproject.toml setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "error: $$($(PYTHON) --version 2>&1) is too old; expected 3.10 or newer. Run: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { \
	  echo "error: $(PYTHON) cannot make a virtual environment. On Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@echo "installing into $(VENV); the first time this takes minutes"
	$(PIP) install --quiet --retries 10 $(VERSIONS) --editable '.[minilm,triton,report,csd,dali,tune,docs,dev]'
	@touch $(READY)
