# kvmtrace: `make help` lists the targets.
SHELL := /bin/bash
.DEFAULT_GOAL := help
# bcc is Debian's python3-bpfcc and belongs to the system Python: the virtual environment is made from that one.
PYTHON ?= /usr/bin/python3
VENV := .venv
BIN := $(VENV)/bin
SUDO := $(shell [ "$$(id -u)" = 0 ] || echo sudo)

APT_PACKAGES := python3-venv python3-dev python3-bpfcc gcc libc6-dev trace-cmd linux-perf \
	qemu-system-x86 qemu-system-arm seabios bochs bochsbios vgabios isolinux syslinux-common xorriso \
	busybox-static kmod cpio xz-utils zstd e2fsprogs groff-base mmdebstrap strace bpftrace chromium chromium-driver graphviz \
	prometheus clang libclang-rt-dev
# kernels and KVM's selftests for arm64, which only the exhaustive tests build
LAB_PACKAGES := bc bison flex gcc-aarch64-linux-gnu libc6-dev-arm64-cross
install_missing = missing=$$(for p in $(1); do dpkg-query -W -f='$${Status}' $$p 2>/dev/null | grep -q 'ok installed' || echo $$p; done); \
	if [ -n "$$missing" ]; then echo "installing: $$missing"; \
	  $(SUDO) apt-get update -qq && DEBIAN_FRONTEND=noninteractive $(SUDO) apt-get install -y -qq --no-install-recommends $$missing >/dev/null; fi

.PHONY: help setup demo man test test-lab test-oldest bench bench-record fuzz fixtures lint clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sort | awk -F':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

setup: $(VENV)/.installed ## install what kvmtrace needs (apt, pip), compile what changed; quick the second time
	@$(BIN)/python kvmtrace/_native/compiling.py --if-changed

$(VENV)/.apt: Makefile
	@$(call install_missing,$(APT_PACKAGES))
	@mkdir -p $(VENV) && touch $@

$(VENV)/.installed: $(VENV)/.apt pyproject.toml .ci/constraints.txt kvmtrace/_native/build_hook.py
	@[ -x $(BIN)/python ] || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c .ci/constraints.txt -e '.[dev]'
	@ln -sfn /usr/lib/python3/dist-packages/bcc $$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/bcc
	@$(BIN)/python -c 'import bcc' && touch $@

demo: setup ## record a real VM on this machine (or on an emulated host) and print its report
	@mkdir -p demo
	@if [ -e /dev/kvm ] && $(SUDO) $(BIN)/kvmtrace record --guest lifecycle --force -o demo/lifecycle.dat; then :; else \
	  echo "This machine's own KVM cannot be recorded (see \`kvmtrace doctor\`): recording on an emulated AMD host."; \
	  $(BIN)/kvmtrace lab record --isa svm --guest lifecycle --force -o demo/lifecycle.dat; fi
	$(BIN)/kvmtrace report demo/lifecycle.dat | cat
	@$(BIN)/kvmtrace report --format json --no-model demo/lifecycle.dat \
	  | $(BIN)/python -c 'import json, sys; sys.exit(not json.load(sys.stdin)["exits"])' || { \
	  printf '\n%s\n%s\n\n' "This machine's KVM traces no kvm_entry and kvm_exit (PVM does not). Beside it, the same guest on" \
	    "real kvm_intel, recorded by kvmtrace in its lab:"; \
	  $(BIN)/kvmtrace report fixtures/vmx-6.1-lifecycle.dat | cat; }
	$(BIN)/kvmtrace report --format html demo/lifecycle.dat -o demo/lifecycle.html
	@echo "Open demo/lifecycle.html in a browser for the same with charts and a timeline."

# first what needs nothing of this machine, side by side; then what needs its KVM, a lab or a browser, one at a time
ALONE := lab_smoke or kvm or browser
test: setup lint ## run the tests (with one recording in each lab)
	$(BIN)/python -m pytest -q -n 2 -m 'not (lab or slow or $(ALONE))'
	$(BIN)/python -m pytest -q -m 'not (lab or slow) and ($(ALONE))'

OLDEST := .venv-oldest
test-oldest: setup ## the unit tests with the oldest versions that pyproject.toml allows
	@[ -x $(OLDEST)/bin/python ] || $(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check -c .ci/oldest.txt -e '.[dev]'
	@ln -sfn /usr/lib/python3/dist-packages/bcc $$($(OLDEST)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/bcc
	$(OLDEST)/bin/python -m pytest -q -n 2 -m 'not (lab or slow or $(ALONE))'

bench: setup ## speed and memory against trace-cmd and perf, and against BASE=COMMIT, on recordings it makes itself
	$(BIN)/python tests/bench/bench.py $(if $(BASE),--base $(BASE))

bench-record: setup ## what recording costs, against perf, bpftrace and trace-cmd
	$(BIN)/python tests/bench/bench_record.py -o bench-results/record.json

$(VENV)/.apt-lab: Makefile
	@$(call install_missing,$(LAB_PACKAGES))
	@mkdir -p $(VENV) && touch $@

test-lab: setup $(VENV)/.apt-lab ## the exhaustive tests: the lab matrix (VMX, SVM, arm64, 6.1, 6.12, all guests, Linux boots), all mutations
	$(BIN)/python -m pytest -q -m 'lab or lab_smoke or slow' tests

fixtures: setup ## record the fixtures again, in the labs
	$(BIN)/python tests/lab/make_fixtures.py

lint: setup ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

man: setup ## write the manual pages to man/
	$(BIN)/python -m kvmtrace.cli.man_pages man

MINUTES ?= 30
fuzz: setup ## fuzz everything that reads a file, for MINUTES=30
	$(BIN)/python -W error tests/fuzz/fuzz.py --minutes $(MINUTES)

clean: ## remove what the other targets made here
	rm -rf $(VENV) $(OLDEST) demo man bench-results build dist
