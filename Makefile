# One verb per job. Each line only calls meson, pytest, ruff or a tool in its room; the logic lives there.
# Everything made goes to .build/ (and .venv/ for Python). Bare `make` lists the verbs.

PYTHON := .venv/bin/python
PYTEST := .venv/bin/pytest

.DEFAULT_GOAL := help
.PHONY: help setup build demo test test-unit test-net test-image lint fmt bench bench-gate rfc fuzz prove image image-lock image-diff audit boot flash clean

help: ## list the verbs
	@awk -F':.*## ' '/^[a-z][a-z-]*:.*## /{printf "  %-11s %s\n",$$1,$$2}' $(MAKEFILE_LIST)

setup: ## install Debian packages and the Python environment; says what it will do first
	@tests/setup.sh

build: setup .build/engine/build.ninja .build/engine-debug/build.ninja ## compile the engine: release, and with ASan and UBSan
	@ninja -C .build/engine && ninja -C .build/engine-debug

# A folder changes when a file is added or removed, and meson finds files by their folder.
FOLDERS := dataplane $(wildcard dataplane/core dataplane/ctl dataplane/io dataplane/io/*)
.build/engine/build.ninja: $(FOLDERS)
	@meson setup $(if $(wildcard $@),--reconfigure) .build/engine dataplane --buildtype=release && touch $@

.build/engine-debug/build.ninja: $(FOLDERS)
	@meson setup $(if $(wildcard $@),--reconfigure) .build/engine-debug dataplane --buildtype=debug -Db_sanitize=address,undefined && touch $@

demo: setup ## build, boot, provision and translate, end to end; KEEP=1 leaves the lab up
	@$(PYTHON) -m tests.system.demo $(if $(KEEP),--keep)

test: test-unit ## all three rings: unit, net, image
	@$(PYTEST) -m "net or image"

test-unit: build ## ring 1: lint, types, C data structures, replay; no root
	@$(PYTEST) -m unit --numprocesses auto --quiet

test-net: build ## ring 2: real programs in network namespaces; root
	@$(PYTEST) -m net

test-image: build ## ring 3: the image in QEMU; root
	@$(PYTEST) -m image

lint: build ## ruff, mypy --strict, clang-format, and the rules of the house
	@$(PYTEST) tests/repo

fmt: setup ## format Python and C in place
	@.venv/bin/ruff format && .venv/bin/ruff check --fix && git ls-files '*.[ch]' | xargs .venv/bin/clang-format -i

prove: setup ## machine-checked proofs: checksum, port sets, index, rewriting; says what and for which bounds
	@$(PYTHON) -m tests.prove

bench: build ## what a packet costs, beside the peers: .build/bench/bench.json and cycles.svg
	@$(PYTHON) -m tests.bench.all

bench-gate: build ## red when the work tree is slower than BASE=commit (default: where it left origin/main)
	@$(PYTHON) -m tests.bench.gate $(BASE)

rfc: setup ## which RFC requirements are met, in which mode, and which test saw it
	@$(PYTHON) -m tests.rfc

fuzz: setup .build/fuzz/build.ninja ## look for crashes in packets and configuration; FOR=60 seconds each
	@tests/fuzz.sh $(or $(FOR),60)

.build/fuzz/build.ninja: $(FOLDERS)
	@CC=clang meson setup $(if $(wildcard $@),--reconfigure) .build/fuzz dataplane --buildtype=debugoptimized -Dfuzz=true -Ddpdk=disabled -Db_sanitize=address,undefined -Db_lundef=false && touch $@

image: setup ## build the gateway image into .build/image; FLAVOUR=generic for hardware, KEYS=folder signs it
	@$(PYTHON) -m image.build $(if $(FLAVOUR),--profile $(FLAVOUR)) $(if $(KEYS),--keys $(KEYS))

image-lock: setup ## write the packages of the built image, with their hashes, to image/packages.lock
	@$(PYTHON) -m image.build --lock

image-diff: setup ## what changed between two images: A=OLD.raw B=NEW.raw
	@$(PYTHON) -m image.diff $(A) $(B)

audit: setup ## inspect the built image: packages, size, units, keys
	@$(PYTHON) -m image.audit

boot: setup ## boot the built image in QEMU with its serial console here
	@$(PYTHON) -m image.boot

flash: setup ## write the built image to DEVICE=/dev/...
	@$(PYTHON) -m image.flash $(DEVICE)

clean: ## remove everything that was built; .venv stays
	@rm -rf .build
