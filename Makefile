# make demo   generated data, a trained model and runs/demo/report.html
# make test   lint and tests; make test-all adds the slow ones; make test-gpu runs what needs a GPU, where there is one
# Both create .venv and install what they need first; later runs skip that.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
READY := $(VENV)/.installed

.PHONY: demo test test-all test-gpu lint format wheel clean

demo: $(READY)
	$(BIN)/engine demo --out runs/demo
	@echo "open $(CURDIR)/runs/demo/report.html"

# Three processes: triton's interpreter and its compiler exclude each other, and neither should slow the rest down.
# One worker a core, each on one thread: small tensors gain nothing from more.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses auto

test: lint
	$(PYTEST) --ignore=tests/interpret --ignore=tests/aot $(SLOW)
	TRITON_INTERPRET=1 $(PYTEST) tests/interpret $(SLOW)
	$(PYTEST) tests/aot $(SLOW)

# Last, what judges times, with the machine to itself.
test-all: SLOW := --slow
test-all: test
	$(BIN)/pytest --slow -m alone tests/bench

test-gpu: $(READY)
	$(BIN)/python -m tests.gpu $(TESTS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

wheel: $(READY)
	$(PIP) wheel --no-deps --wheel-dir dist .

clean:
	rm -rf build dist .pytest_cache .ruff_cache

# The stamp is made last, so that an installation that failed half-way is taken up again.
$(READY): pyproject.toml setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "error: $$($(PYTHON) --version 2>&1) is too old; expected 3.10 or newer. Run: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { \
	  echo "error: $(PYTHON) cannot make a virtual environment. On Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@echo "installing into $(VENV); the first time this takes minutes"
	$(PIP) install --quiet --retries 10 --constraint constraints.txt --editable '.[minilm,triton,report,csd,dali,dev]'
	@touch $(READY)
