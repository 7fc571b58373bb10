# Needs only a clone, make and Python 3.11 or newer (make PYTHON=python3.12 to choose one). Every target first makes the
# environment where it is missing or older than pyproject.toml or constraints.txt.
PYTHON ?= python3
VENV := .venv
ARGS :=
# the tests, a file at a time, on as many processes as there are cores, at most four; ARGS='-n 0' for one
SHARED_OUT := -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

BIN := $(VENV)/bin
READY := $(VENV)/.ready
# torchvision, timm and transformers, in a folder of their own: no dependency of theirs gets into the environment
OUTSIDE := $(VENV)/outside
# the tools of a release, in an environment of their own, for the same reason
RELEASE := $(VENV)/release

.DEFAULT_GOAL := help
.PHONY: help demo test outside headline compact picture ablation accuracy map structured regrow recoverable ridge means bench gpu paper bench-repair bench-large bench-walk bench-memory docs dist lint format clean

help: ## list the targets
	@echo "make TARGET [ARGS='options of the command behind it'], where TARGET is"
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/  \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 17

demo: $(READY) ## a network collapses and comes back, in about a minute
	@$(BIN)/resuscitate demo $(ARGS)

test: lint $(OUTSIDE)/.ready ## lint, every test, some of `outside`, then the Triton kernels in Triton's interpreter
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(SHARED_OUT) -m "not outside" $(ARGS)
	@echo "a few networks from outside; make outside takes them all"
	@OMP_NUM_THREADS=1 PYTHONPATH=$(OUTSIDE) $(BIN)/python -m pytest $(SHARED_OUT) --dist load tests/outside -m "not slow"
	@echo "the kernels again, and the walk with them, in Triton's interpreter"
	@OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(BIN)/python -m pytest $(SHARED_OUT) tests/asr_kernels tests/resuscitate/runtime/test_activations.py -k triton

outside: $(OUTSIDE)/.ready ## forty networks of torchvision, timm and transformers, pruned, repaired and compressed; ten minutes
	@OMP_NUM_THREADS=1 PYTHONPATH=$(OUTSIDE) $(BIN)/python -m pytest $(SHARED_OUT) --dist load tests/outside \
		--table benchmarks/results/outside.md $(ARGS)

headline: $(READY) ## what each tool brings back on real networks, and how fast; several hours, and goes on where it was stopped
	@$(BIN)/python benchmarks/accuracy/headline.py $(ARGS)

COMPACT := --nets mobilenet_v1,mobilenet_v2

compact: $(READY) ## trains two compact networks, and adds their rows to headline; an hour, and goes on where it was stopped
	@$(BIN)/python benchmarks/published/train.py $(COMPACT) --epochs 8 --batch-size 128 --output build/compact
	@$(BIN)/python benchmarks/accuracy/headline.py $(COMPACT) --targets 50%,70%,80%,90%,95% --draws 1 $(ARGS)

picture: $(READY) ## the picture of a run in README.md; a quarter of a minute
	@$(BIN)/python benchmarks/accuracy/picture.py $(ARGS)

ablation: $(READY) ## what each part of the compression is worth; an hour, and goes on where it was stopped
	@$(BIN)/python benchmarks/accuracy/ablation.py $(ARGS)

accuracy: $(READY) ## the accuracy table on real networks and images
	@$(BIN)/python benchmarks/accuracy/accuracy.py $(ARGS)

map: $(READY) ## where sparsity may go and which repair holds it; an hour, or less with ARGS='--workers 2'
	@$(BIN)/python benchmarks/accuracy/recoverability.py $(ARGS)

structured: $(READY) ## channels out of real networks, and what comes back; fifteen minutes
	@$(BIN)/python benchmarks/accuracy/structured.py $(ARGS)

regrow: $(READY) ## one shot, in steps, or past the target and back, on real networks; half an hour
	@$(BIN)/python benchmarks/accuracy/regrow.py $(ARGS)

recoverable: $(READY) ## training for pruning, and means of what was pruned, on digits; five minutes
	@$(BIN)/python benchmarks/accuracy/recoverable.py $(ARGS)

ridge: $(READY) ## the ridge of a refit, fixed or cross-validated, by the number of images; half an hour
	@$(BIN)/python benchmarks/accuracy/ridge.py $(ARGS)

means: $(READY) ## means of pruned weights on real networks; a quarter of an hour
	@$(BIN)/python benchmarks/accuracy/means.py $(ARGS)

bench: $(READY) ## the kernels on this CPU against PyTorch's own; four minutes
	@$(BIN)/python benchmarks/speed/cpu_kernels.py $(ARGS)

gpu: ## on a GPU, with the Python that is there: tests, the kernel table, a whole repair; nine minutes a call, the next goes on (make gpu PYTHON=python3)
	@PYTHONPATH=.:python $(PYTHON) benchmarks/speed/gpu.py $(ARGS)

bench-repair: $(READY) $(if $(ARGS),,bench-large) ## the whole repair against bare forward passes and peers; an hour
	@$(BIN)/python benchmarks/speed/repair.py $(ARGS)

bench-large: $(OUTSIDE)/.ready ## refits of networks of ImageNet's size against bare forward passes; half an hour
	@PYTHONPATH=$(OUTSIDE) $(BIN)/python benchmarks/speed/large.py $(ARGS)

bench-walk: $(READY) ## networks without a graph, passes beside one another, page faults; ten minutes
	@$(BIN)/python benchmarks/speed/walk.py $(ARGS)

bench-memory: $(READY) ## peak memory under a budget; five minutes
	@$(BIN)/python benchmarks/speed/memory.py $(ARGS)

paper: ## with the Python that is there: trains four networks, then the published comparison; goes on where it was stopped
	@PYTHONPATH=.:python $(PYTHON) benchmarks/published/train.py --output build/networks $(ARGS)
	@PYTHONPATH=.:python $(PYTHON) benchmarks/published/paper_table.py --checkpoints build/networks $(ARGS)
	@PYTHONPATH=.:python $(PYTHON) benchmarks/published/paper_table.py --checkpoints build/networks --speed $(ARGS)

docs: $(READY) ## the API reference, into build/docs
	@$(BIN)/pdoc --output-directory build/docs --docformat google resuscitate asr_kernels

dist: $(RELEASE)/.ready ## source distribution and wheel, into dist, both checked
	@rm -rf dist
	@$(RELEASE)/bin/python -m build --outdir dist .
	@$(RELEASE)/bin/twine check --strict dist/*
	@$(RELEASE)/bin/check-wheel-contents dist/*.whl

lint: $(READY) ## ruff and mypy, changing nothing
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy

format: $(READY) ## put every file into its form
	@$(BIN)/ruff check --fix
	@$(BIN)/ruff format

clean: ## remove what these targets made, the environment too
	@rm -rf $(VENV) build dist demo.png .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
		"the pinned environment needs Python 3.11 or newer; name one with: make PYTHON=python3.11")'
	@echo "installing the development environment into $(VENV), once; this takes a few minutes"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -qq --no-input --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

$(OUTSIDE)/.ready: tests/outside/requirements.txt $(READY)
	@echo "installing torchvision, timm and transformers into $(OUTSIDE), once; this takes half a minute"
	@rm -rf $(OUTSIDE)
	@$(BIN)/python -m pip install -qq --no-input --disable-pip-version-check --no-deps --target $(OUTSIDE) -r $<
	@touch $@

$(RELEASE)/.ready:
	@echo "installing the tools of a release into $(RELEASE), once"
	@$(PYTHON) -m venv --clear $(RELEASE)
	@$(RELEASE)/bin/python -m pip install -qq --no-input --disable-pip-version-check build twine check-wheel-contents
	@touch $@
