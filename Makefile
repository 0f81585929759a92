# Two commands matter: `make demo` and `make test`. Both install what a fresh Debian or Ubuntu machine
# lacks (as root), build what is not cached, and leave everything they made in $(CACHE).

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c

CACHE := $(or $(GCS_CACHE),$(or $(XDG_CACHE_HOME),$(HOME)/.cache)/gcsagent)
# A system interpreter, so that the tests see what a user's machine has; the newest there is from 3.11 on.
PYTHON ?= $(lastword $(sort $(wildcard /usr/bin/python3.1[1-9])))
VENV = $(CACHE)/venv/$(shell { cat tests/requirements.txt; echo $(PYTHON); } | sha256sum | cut -c1-16)
RUN = $(VENV)/bin/python
PYTEST = $(RUN) -m pytest -q

.PHONY: help
help:
	@echo "make demo        build everything, boot a VM, run containers in it"
	@echo "make test        every check and test that fits into minutes: what CI runs"
	@echo "make unit | runc | vm     one tier of the tests;  PYTEST_ARGS=... is passed on"
	@echo "make chaos       kills the agent under load, at every step of every request, and in a VM"
	@echo "make scale       200 containers and 1,000 processes at once, 30 containers in a VM, in figures"
	@echo "make spine       every case in a VM, those as well that need no kernel of their own"
	@echo "make copy        1 GiB into a guest and out of it, in figures"
	@echo "make boot-failures     VMs broken on purpose, and what is said of each"
	@echo "make test-long   all of these"
	@echo "make tour        runs README's tour in real VMs and keeps what came in tests/tour.txt"
	@echo "make bench       what it costs beside runc and plain sockets; OUT= a directory for JSON, table, plot"
	@echo "make fuzz        hostile bytes, arguments, archives at every door; SECONDS= for all of them together"
	@echo "make soak        mixed load, the agent killed, and what has grown; MINUTES=, SOAK_ARGS=--vm, OUT="
	@echo "make lint | format        ruff, mypy, import directions | ruff format"
	@echo "make image | tools | demo-rootfs | venv    what the tests and the demo are made of"

.PHONY: deps
deps:
	@scripts/install-deps.sh

# Made under another name and renamed: an interrupted install leaves nothing that looks whole.
.PHONY: venv
venv: deps
	@test -x $(RUN) || { \
	    echo "venv: $(VENV)"; rm -rf "$(VENV).new"; mkdir -p "$(CACHE)/venv"; \
	    p=$(PYTHON); [ -n "$$p" ] || p=$$(ls /usr/bin/python3.1[1-9] | tail -n 1); \
	    "$$p" -m venv "$(VENV).new"; \
	    "$(VENV).new/bin/python" -m pip install -q --disable-pip-version-check -r tests/requirements.txt; \
	    mv "$(VENV).new" "$(VENV)"; }

.PHONY: tools image demo-rootfs
tools: deps
	@scripts/fetch-tools.sh
image: deps
	@scripts/build-rootfs.sh
demo-rootfs: deps
	@scripts/make-demo-rootfs.sh

.PHONY: lint format
lint: venv
	$(PYTEST) tests/unit/test_house.py
format: venv
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

.PHONY: unit runc vm test
unit: venv
	$(PYTEST) tests/unit $(PYTEST_ARGS)
runc: venv demo-rootfs
	$(PYTEST) tests/runc $(PYTEST_ARGS)
vm: venv tools image demo-rootfs
	$(PYTEST) tests/vm $(PYTEST_ARGS)

test: venv tools image demo-rootfs
	$(RUN) -m tests.side_by_side

# The promise at full length; prints what it did.
.PHONY: chaos
chaos: venv tools image demo-rootfs
	GCS_CHAOS=long $(PYTEST) -s tests/runc/test_promise.py tests/runc/test_fault_points.py \
	    tests/runc/test_reload.py tests/vm/test_promise.py tests/vm/test_checkpoint.py

# Many containers and processes at once; prints what they cost.
.PHONY: scale
scale: venv tools image demo-rootfs
	GCS_SCALE=long $(PYTEST) -s tests/runc/test_scale.py tests/vm/test_scale.py $(PYTEST_ARGS)

# 1 GiB in and out of a guest as files do; prints how long it took.
.PHONY: copy
copy: venv demo-rootfs
	GCS_FILES=long $(PYTEST) -s tests/runc/test_copy.py -k large $(PYTEST_ARGS)

# Ratios to baselines taken in the same run. BENCH_ARGS='--only exec --samples 50' takes less, or more.
.PHONY: bench
bench: OUT = $(CACHE)/bench
bench: venv tools image demo-rootfs
	$(RUN) -m tests.bench --out "$(OUT)" $(BENCH_ARGS)

# By coverage, where atheris can be had for this Python; else by what is answered. The exit status tells.
.PHONY: fuzz
fuzz: SECONDS = 600
fuzz: OUT = $(CACHE)/fuzz
fuzz: venv demo-rootfs
	@test -e "$(VENV).fuzz/whole" || { rm -rf "$(VENV).fuzz"; $(PYTHON) -m venv "$(VENV).fuzz"; \
	    "$(VENV).fuzz/bin/python" -m pip install -q --disable-pip-version-check -r tests/requirements.txt; \
	    "$(VENV).fuzz/bin/python" -m pip install -q --disable-pip-version-check --only-binary :all: atheris \
	        || echo "fuzz: no atheris for $(PYTHON): guided by outcomes"; \
	    touch "$(VENV).fuzz/whole"; }
	"$(VENV).fuzz/bin/python" -m tests.fuzz --seconds $(SECONDS) --out "$(OUT)" $(FUZZ_ARGS)

# A mixed load, the agent killed in its first half; SOAK_ARGS=--vm has it in a VM.
.PHONY: soak
soak: MINUTES = 60
soak: OUT = $(CACHE)/soak
soak: export GCS_DEPS = gcc libc6-dev
soak: venv demo-rootfs $(if $(findstring --vm,$(SOAK_ARGS)),tools image)
	$(RUN) -m tests.soak --minutes $(MINUTES) --out "$(OUT)" $(SOAK_ARGS)

# VMs broken in more ways, and what the launcher says of them.
.PHONY: boot-failures
boot-failures: venv tools image
	GCS_BOOT=long $(PYTEST) tests/vm/test_boot_failures.py $(PYTEST_ARGS)

# Every case of the list in a VM, too.
.PHONY: spine
spine: venv tools image demo-rootfs
	GCS_SPINE=long $(PYTEST) tests/vm/test_spine.py $(PYTEST_ARGS)

# What make test has in short, at full length.
.PHONY: test-long
test-long: spine scale chaos copy boot-failures

# README's tour, line by line as it stands there.
.PHONY: tour
tour: venv tools image demo-rootfs
	$(RUN) -m tests.tour >tests/tour.txt.new
	@mv tests/tour.txt.new tests/tour.txt

.PHONY: demo
demo: venv tools image demo-rootfs
	@GCSCTL="$(RUN) -m gcsagent.host" scripts/demo.sh
