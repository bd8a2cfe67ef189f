# make demo        sample a shipped cascade, six images of each class, into samples.png
# make app         try a shipped cascade out in a web page; APP=FOLDER for another
# make test        run the tests but for the slow ones; what CI runs
# make test-all    run all of them; each slow one says why it is slow, where it is defined
# make train-demo  train a small cascade on Fashion-MNIST from nothing, all stages, and sample it
# make lint        what CI checks besides the tests
# make docs        the site of these documents, into build/docs

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# The folder of Debian's package dataset-fashion-mnist; without it, the data set comes from the Hub.
FASHION_MNIST ?= /usr/share/datasets/fashion-mnist
TRAIN_DEMO ?= runs/train-demo
APP ?= checkpoints/avatars-256
AVATARS = 0 1 2 3 4 5 6 7 8 9 10 11 12  # `cdm sample` shows ten classes unless it is told which

.PHONY: demo app test test-all train-demo lint docs
.DELETE_ON_ERROR:

# torch comes first and by exact version: its own index decides between builds for CPU and GPU.
define install
test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
$(BIN)/pip install --quiet "$$(grep '^torch==' constraints.txt)"
$(BIN)/pip install --quiet --constraint constraints.txt --editable ".$(if $(1),[$(1)])"
touch $@
endef

$(VENV)/installed: setup.cfg constraints.txt
	$(call install,)

$(VENV)/installed-%: setup.cfg constraints.txt
	$(call install,$*)

demo: $(VENV)/installed
	$(BIN)/cdm sample checkpoints/avatars-256-distilled --class_labels $(AVATARS) --num_images_per_label 6 --output samples.png

app: $(VENV)/installed-app
	$(BIN)/cdm app $(APP)

test: $(VENV)/installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 -m "not slow"

test-all: $(VENV)/installed-test $(VENV)/installed-browser $(VENV)/installed-docs
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2

lint: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

docs: $(VENV)/installed-docs
	$(BIN)/python -m sphinx -W --keep-going -q -c docs -d build/doctrees . build/docs

train-demo: $(VENV)/installed-train
	PATH="$(abspath $(BIN)):$$PATH" FASHION_MNIST="$(FASHION_MNIST)" OUTPUT="$(TRAIN_DEMO)" bash examples/train_demo.sh
