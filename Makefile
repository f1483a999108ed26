# Two commands do everything: `make demo` and `make test`. Both make the environment in .venv first.
# On a machine without an NVIDIA GPU, `make demo UV=1` installs with uv, which takes torch's CPU wheels.
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python
EXTRAS := x86,litert,distill,demo,dev
STAMP := $(VENV)/.edgekd-installed
CONVERTERS := $(VENV)/.edgekd-converters-installed
INSTALL = $(if $(UV),$(VENV)/bin/uv pip install --quiet --python $(RUN) --torch-backend=cpu -c constraints.txt setuptools,\
	$(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0 "setuptools>=77")
CHECKED := edgekd targets converters profiles tests benchmarks examples

# Where `make test-converters` keeps the environments of converters: made once, 5.6 GB, about six minutes.
ENVIRONMENTS ?= $(if $(XDG_CACHE_HOME),$(XDG_CACHE_HOME),$(HOME)/.cache)/edgekd/environments

.PHONY: demo test test-slow test-converters matrix check format env clean goldens

env: $(STAMP)

$(STAMP): setup.cfg pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "edgekd needs Python 3.11 or newer, this is %s; next step: make PYTHON=python3.11" % sys.version.split()[0])'
	@start=$$(date +%s); \
	$(PYTHON) -m venv $(VENV) && \
	if [ -n "$(UV)" ]; then $(RUN) -m pip install --quiet --disable-pip-version-check uv; fi && \
	$(INSTALL) -e ".[$(EXTRAS)]" && touch $@ && echo "environment: $$(( $$(date +%s) - start )) s"

$(CONVERTERS): $(STAMP)
	$(INSTALL) -e ".[$(EXTRAS),android]"
	touch $@

demo: $(STAMP)
	$(VENV)/bin/edgekd demo --run-dir runs/demo-$$(date +%Y%m%d-%H%M%S)

test: $(STAMP)
	$(RUN) -m pytest -m "not slow and not environments" -n 2 --dist loadfile

# The tests that take more than five seconds each: whole runs, interrupts, installs.
test-slow: $(STAMP)
	$(RUN) -m pytest -m "slow and not environments" -n 2 --dist loadfile

# Adds the converters to TFLite to .venv and makes the environments that are missing; a skipped test fails.
test-converters: $(CONVERTERS)
	$(VENV)/bin/edgekd env create onnx2tf --path $(ENVIRONMENTS)
	$(VENV)/bin/edgekd env create onnx-tf --path $(ENVIRONMENTS)
	$(VENV)/bin/edgekd env create tensorflow --path $(ENVIRONMENTS)
	$(RUN) -m pytest tests/environments -m environments --environments $(ENVIRONMENTS) --no-skips -n 2 --dist loadfile

# docs/matrix.md: every network in every format; goes on where it was stopped. WORDS="--retime" takes all latencies anew, "--only vit" redoes cells.
matrix: $(CONVERTERS)
	$(VENV)/bin/edgekd env create onnx2tf --path $(ENVIRONMENTS)
	$(VENV)/bin/edgekd env create onnx-tf --path $(ENVIRONMENTS)
	$(VENV)/bin/edgekd env create tensorflow --path $(ENVIRONMENTS)
	$(RUN) benchmarks/conversion_matrix.py --environments $(ENVIRONMENTS) $(WORDS)

check: $(STAMP)
	$(VENV)/bin/ruff check $(CHECKED)
	$(VENV)/bin/ruff format --check $(CHECKED)
	$(VENV)/bin/mypy

format: $(STAMP)
	$(VENV)/bin/ruff check --fix $(CHECKED)
	$(VENV)/bin/ruff format $(CHECKED)

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache

# Record anew what every road makes of the golden networks (docs/converting.md): after a version in constraints.txt moved.
goldens: $(CONVERTERS)
	$(RUN) -m tests.golden.record $(WORDS)
