# Each target shows the pip and pytest lines that it runs; they work by hand just as well.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: demo test torture bench memory lint lock audit clean

# Everything that is installed, once: torch first, since the native kernels build against it.
$(VENV)/installed: pyproject.toml setup.py CMakeLists.txt $(wildcard csrc/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip setuptools wheel cmake ninja
	$(BIN)/pip install --quiet torch torchvision
	$(BIN)/pip install --quiet --no-build-isolation --editable '.[test]'
	touch $@

demo: $(VENV)/installed
	$(BIN)/fastembed demo --out demo_out

test: $(VENV)/installed lint
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal

# The tests of faults, ten minutes of kills and faults at random moments, and memory over 100,000
# samples; FASTEMBED_TORTURE_SECONDS and FASTEMBED_TORTURE_SEED choose.
torture: $(VENV)/installed
	$(BIN)/python -m pytest tests/faults --quiet
	$(BIN)/python tests/faults/torture.py
	$(BIN)/python tests/faults/memory.py --format npy
	$(BIN)/python tests/faults/memory.py --format zarr

bench: $(VENV)/installed
	$(BIN)/python -m pytest benchmarks --benchmark-enable --benchmark-columns=median --quiet

memory: $(VENV)/installed
	$(BIN)/pip install --quiet 'matplotlib>=3.9'
	$(BIN)/python benchmarks/memory.py --photos 2000

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror csrc/* tests/faults/*.c

# The versions that `make test` just ran with. CI installs these: PIP_CONSTRAINT=requirements-ci.lock
lock: $(VENV)/installed
	{ head -n 2 requirements-ci.lock; $(BIN)/pip freeze --all --exclude-editable; } >$(VENV)/lock
	mv $(VENV)/lock requirements-ci.lock

# Known vulnerabilities of the locked versions. Asks PyPI; --strict: what cannot be asked fails.
audit:
	$(PYTHON) -m venv $(VENV)-audit
	$(VENV)-audit/bin/pip install --quiet pip-audit
	$(VENV)-audit/bin/pip-audit --strict --disable-pip --no-deps --requirement requirements-ci.lock

clean:
	rm -rf $(VENV) $(VENV)-audit build demo_out *.egg-info fastembed/_native.so
