# Everything here needs Python >= 3.11, make and pip; `make help` lists it. All that is made lies in .venv and .cache.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check --quiet
UV     := uv==0.13.9
SCRIPTS := .cache/lua

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test check prove chaos soak bench growth profile bench-clients bench-peers lint format lock clean
.PHONY: docs pictures verify-upgrade verify-deploy fuzz-admin

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' Makefile | expand -t 22

demo: $(VENV)/.installed  ## three fake accounts, two workers, one killed in the middle, and the proof (ARGS="--keep")
	$(BIN)/balancer demo $(ARGS)

test: $(VENV)/.developed  ## all tests that need only wheels; what needs more is listed as `not run` (ARGS="-k word")
	$(BIN)/python -m pytest $(ARGS)

prove: $(VENV)/.developed  ## millions of decisions under faults, on every topology, each of them replayed
	$(BIN)/python -m benchmarks.prove $(ARGS)

chaos: $(VENV)/.developed  ## a fleet under every fault; each error traced to its fault, each token counted
	$(BIN)/python -m benchmarks.chaos $(ARGS)

soak: $(VENV)/.developed  ## an hour of the same, and whether memory grows
	$(BIN)/python -m benchmarks.chaos --soak 60 $(ARGS)

bench: $(VENV)/.benched  ## us beside others, and what each feature costs; 20 minutes (BENCH_QUICK=1: 4)
	$(BIN)/python -m benchmarks.bench $(ARGS)

profile: $(VENV)/.benched  ## where a worker's time goes, under small requests and under streams
	$(BIN)/python -m benchmarks.profile $(ARGS)

bench-clients: $(VENV)/.benched  ## what HTTP client libraries cost, ours among them
	$(BIN)/python -m benchmarks.clients $(ARGS)

bench-peers: $(VENV)/.benched  ## installs whom we are compared with, in BENCH_PEERS (else the user's cache)
	$(BIN)/python -m benchmarks.bench.peers $(ARGS)

growth: $(VENV)/.benched  ## how costs grow with rules, services, pins, streams, and what should not (GROWTH_QUICK=1)
	$(BIN)/python -m benchmarks.growth $(ARGS)

docs: $(VENV)/.developed  ## what is made out of the program and checked in; fails, having made it, if some was stale
	$(BIN)/python -m docs.build

pictures: $(VENV)/.benched  ## docs/pictures anew: the dashboards' panels over a fleet that lives and fails, 3 minutes
	$(BIN)/python -m benchmarks.pictures $(ARGS)

verify-upgrade: $(VENV)/.developed  ## two versions at once, there and back, under load (OLD=REVISION); 2 minutes
	@test -n "$(OLD)" || { echo 'say which: make verify-upgrade OLD=REVISION' >&2; exit 2; }
	$(BIN)/python -m benchmarks.upgrade $(OLD) $(ARGS)

verify-deploy: $(VENV)/.developed  ## the image built on a Debian root and run in it (as root; apt: buildah debootstrap)
	$(BIN)/python -m deploy.verify $(ARGS)

fuzz-admin: $(VENV)/.developed  ## Schemathesis at the admin API for five minutes (FUZZ_S=SECONDS)
	BALANCER_TEST_FUZZ_S=$(or $(FUZZ_S),300) $(BIN)/python -m pytest -o faulthandler_timeout=0 tests/admin/test_openapi.py $(ARGS)

check: lint test  ## what the gate runs

lint: $(VENV)/.developed  ## ruff, mypy, and luacheck on the expanded scripts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	@rm -rf $(SCRIPTS)
	$(BIN)/python -m balancer.store.scripts --expand $(SCRIPTS)
	@if command -v luacheck >/dev/null; then \
	  echo luacheck $(SCRIPTS); luacheck --quiet --config .luacheckrc $(SCRIPTS); \
	elif [ -n "$$CI" ]; then \
	  echo 'luacheck is missing, and the gate needs it: apt-get install lua-check' >&2; exit 1; \
	else \
	  echo 'not run: luacheck on the expanded scripts (needs apt:lua-check)'; \
	fi

format: $(VENV)/.developed  ## ruff's formatter and its safe fixes
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# One resolution for all five files: the first one has everything, the others are held to its versions.
COMPILE = $(BIN)/uv pip compile --no-config --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
  --no-emit-find-links --no-annotate --no-header --quiet $(UPGRADE)

lock: $(VENV)/.made  ## the five requirements files anew (UPGRADE=--upgrade for the newest versions)
	$(PIP) install $(UV)
	@mkdir -p .cache/lock
	@for name in -dev "" -otel -build -bench; do cp requirements$$name.txt .cache/lock/ 2>/dev/null || true; done
	$(COMPILE) --extra dev requirements-build.in pyproject.toml --output-file .cache/lock/requirements-dev.txt
	$(COMPILE) --constraint .cache/lock/requirements-dev.txt pyproject.toml --output-file .cache/lock/requirements.txt
	$(COMPILE) --constraint .cache/lock/requirements-dev.txt --extra otel pyproject.toml \
	  --output-file .cache/lock/requirements-otel.txt
	$(COMPILE) --constraint .cache/lock/requirements-dev.txt requirements-build.in \
	  --output-file .cache/lock/requirements-build.txt
	$(COMPILE) --constraint .cache/lock/requirements-dev.txt --extra bench pyproject.toml \
	  --output-file .cache/lock/requirements-bench.txt
	@for name in -dev "" -otel -build -bench; do \
	  { echo '# Made by `make lock`; do not edit.'; grep -v '^#' .cache/lock/requirements$$name.txt; } \
	    >requirements$$name.txt || exit 1; \
	done

clean:  ## everything that these targets made
	rm -rf $(VENV) .cache build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Debian's python3 has venv without ensurepip; then the system's pip fills the environment.
$(VENV)/.made: requirements-build.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo '$(PYTHON) is missing or older than 3.11; name another: make PYTHON=python3.12' >&2; exit 1; }
	@rm -rf $(VENV)
	@if $(PYTHON) -c 'import ensurepip, venv' 2>/dev/null; then \
	  $(PYTHON) -m venv $(VENV); \
	elif $(PYTHON) -c 'import pip, venv' 2>/dev/null; then \
	  $(PYTHON) -m venv --without-pip $(VENV) && \
	  $(PYTHON) -m pip --python $(BIN)/python --quiet install --require-hashes -r requirements-build.txt; \
	else \
	  echo '$(PYTHON) has neither ensurepip nor pip; on Debian and Ubuntu: apt-get install python3-venv' >&2; exit 1; \
	fi
	$(PIP) install --require-hashes -r requirements-build.txt
	@touch $@

$(VENV)/.installed: $(VENV)/.made pyproject.toml requirements.txt
	$(PIP) install --require-hashes -r requirements.txt
	$(PIP) install --no-deps --no-build-isolation -e .
	@touch $@

$(VENV)/.developed: $(VENV)/.installed requirements-dev.txt
	$(PIP) install --require-hashes -r requirements-dev.txt
	@touch $@

$(VENV)/.benched: $(VENV)/.developed requirements-bench.txt
	$(PIP) install --require-hashes -r requirements-bench.txt
	@touch $@
