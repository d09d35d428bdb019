# Every target sets itself up first: it needs Python >= 3.10 and make, nothing else.
PYTHON    ?= python3#   interpreter that creates .venv
VENV      ?= .venv#     an existing environment with torch may be named instead: its torch is kept
INDEX_URL ?=#           where torch comes from, e.g. https://download.pytorch.org/whl/cpu (no CUDA libraries)
JOBS      ?= 2#         test processes, one torch thread each
STAGE     ?= all#       make teachers STAGE=classifier|references|text|clip|vae|dit|reals|unet|card
ARGS      ?=#           passed on to pytest, or to tests.mutants
REASON    ?=#           make golden REASON="..."
OWN       := $(if $(filter .venv,$(strip $(VENV))),yes)
VENV      := $(strip $(VENV))
PY        := $(VENV)/bin/python
READY     := $(VENV)/.fewstep_ready
PYTEST    := $(PY) -m pytest -q -n $(strip $(JOBS)) --dist worksteal
# Beside the environment, not in it: torchvision's build must fit torch's and slows every import of diffusers, and
# clean-fid calls scipy's sqrtm with an argument that 1.18 no longer takes.
ORACLES   := clean-fid==0.1.35 torch-fidelity==0.4.0 torchvision==0.29.1 'scipy<1.18' torchmetrics==1.9.0 \
             lightning-utilities==0.15.3 open_clip_torch==3.3.0 ftfy==6.3.1 wcwidth==0.9.4
OFFLINE   := not gpu and not network
MARKS     ?= $(OFFLINE)

.DEFAULT_GOAL := help
.PHONY: help setup clock demo test test-all oracles mutants compare bench golden check format smoke index notebooks docs \
        teachers clean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 12
demo: setup  ## distil the embedded teacher, evaluate it, draw a grid (about 6 minutes on 2 cores)
	$(PY) -m eval.demo
test: setup  ## the default tests: CPU, offline
	$(PYTEST) $(ARGS)
test-all: setup  ## the slow ones too
	$(PYTEST) -m "$(MARKS)" $(ARGS)
oracles: setup  ## the metrics against their libraries' own (with torchvision, 180 MB into build/oracles)
	test -d build/oracles/wcwidth || $(PY) -m pip install -q --no-deps --upgrade --target build/oracles $(ORACLES)
	PYTHONPATH=build/oracles $(PY) -c "import cleanfid.fid, torch_fidelity.metric_fid, open_clip"
	PYTHONPATH=build/oracles $(PY) -m pytest -q tests/unit/metrics $(ARGS)
mutants: setup  ## put known bugs in, one by one, and see that a test catches each
	$(PY) -m tests.mutants $(ARGS)
compare: setup  ## every method on the embedded teachers, 20 minutes each (ARGS=NAME for some; hours in all)
	$(PY) -m eval.compare_methods $(ARGS)
bench: setup  ## the fused operators beside plain torch and torch.compile (ARGS=NAME for some)
	$(PY) -m eval.bench_ops $(ARGS)
	$(if $(ARGS),,$(PY) -m eval.bench_step)
golden: setup  ## record the methods' trajectories again: make golden REASON="why the numbers change" [ARGS=METHOD]
	$(PY) -m tests.golden.trajectories "$(REASON)" $(ARGS)
check: setup  ## formatting, lint, types, import rules
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m pyright --pythonpath $(PY)
	$(PY) -m pytest -q tests/test_imports.py -k rules
format: setup  ## let ruff format and fix
	$(PY) -m ruff check --fix-only .
	$(PY) -m ruff format .
smoke: setup  ## a toy distillation through the command line
	$(PY) -m fewstep.cli distill --teacher mixture --method dmd2 --iterations 20 --out runs/smoke --overwrite
index: setup  ## write fewstep/index.json again, after adding a method or teacher
	$(PY) -m fewstep.index
notebooks: setup  ## run the notebooks and store what their cells show (ARGS=NAME for some)
	$(PY) -m tests.notebooks $(ARGS)
docs: setup  ## the documents as pages in build/site; a warning is an error
	$(PY) -c "import mkdocs, material, mkdocstrings_handlers.python" 2>/dev/null || { pins=$$(mktemp); \
	    $(PY) -c "$$PINS" $(OWN) > $$pins; $(PY) -m pip install -q -c $$pins -e '.[docs]'; rm $$pins; }
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict
teachers: setup  ## train the embedded teacher again, or one STAGE of it
	$(PY) -m fewstep.teachers.fashion_build --stage $(strip $(STAGE))
clean:  ## caches and packaging left-overs; .venv, runs/ and the teachers' build/ stay
	rm -rf build/lib build/bdist.* dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find fewstep fewstep_cuda tests eval -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

# --- set-up: one stamp per environment; it names the checkout that is installed there -----------------------------
setup: $(READY)
ifneq ($(shell cat $(READY) 2>/dev/null),$(CURDIR))
.PHONY: $(READY)
endif

clock:  # the demo reports these seconds; they stay 0 when there was nothing to install
	@if test -d $(VENV); then echo 0 > $(VENV)/.install_seconds; fi

$(READY): pyproject.toml setup.py constraints.txt | clock
	@set -e; start=$$(date +%s); \
	$(if $(OWN),test -x $(PY) || $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "$$NO_VENV"; exit 1; };) \
	test -x $(PY) || { echo "VENV=$(VENV): there is no bin/python in it"; exit 1; }; \
	$(PY) -m pip --version >/dev/null || { echo "$(VENV) has no pip: $(PY) -m ensurepip, or VENV=another"; exit 1; }; \
	pins=$$(mktemp); $(PY) -c "$$PINS" $(OWN) > $$pins; \
	$(if $(strip $(INDEX_URL)),$(PY) -m pip install --no-deps --index-url $(INDEX_URL) -c $$pins torch;) \
	$(PY) -m pip install -c $$pins -e '.[dev]'; rm $$pins; \
	echo $$(($$(date +%s) - start)) > $(VENV)/.install_seconds
	@echo "$(CURDIR)" > $@

define NO_VENV
Could not create .venv: $(PYTHON) is missing, or it has no venv and ensurepip modules.
  Debian, Ubuntu:    apt install python3-venv
  another Python:    make PYTHON=python3.12 ...
  an environment:    make VENV=path/to/environment ...   (one that has pip, e.g. from virtualenv or conda)
endef

# The pins of constraints.txt; in a borrowed environment only for what is not yet installed there, and its own torch.
define PINS
import sys, importlib.metadata as m
have = set() if "yes" in sys.argv else {d.name.lower().replace("_", "-") for d in m.distributions()}
print(*[line for line in open("constraints.txt") if line.split("==")[0] not in have], sep="")
if "torch" in have: print("torch==" + m.version("torch"))
endef
export NO_VENV PINS
