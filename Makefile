# The doors of the repository. `make demo` and `make test` need rustc and cargo, a C++ compiler, make and Python with
# pip; libtorch is fetched the first time (scripts/libtorch.py says from where, and what else is possible).

PYTHON ?= python3
# Every recipe that compiles starts with this: find or fetch libtorch, or stop.
TORCH = LIBTORCH="$$($(PYTHON) scripts/libtorch.py)" || exit 1; export LIBTORCH; unset LIBTORCH_USE_PYTORCH
# nextest shows a failing test sooner; plain `cargo test` does where it is not installed.
TESTS = if cargo nextest --version >/dev/null 2>&1; then echo nextest run; else echo test; fi
PEERS = .venv-peers
LOADERS = .venv-loaders

.PHONY: help build test demo fmt lint unit doc docs restarts two-nodes bench-ranks peers peers-full peers-loaders bench-loaders mixing tiny-base study experiments guard-runs clean-demo

help:
	@echo 'make build   the binary, target/release/rectiflow'
	@echo 'make demo    convert a tiny SDXL to flow matching on the CPU and measure it; report in runs/demo/report.html'
	@echo 'make test    everything that CI checks, cheapest first'
	@echo 'make docs    write the generated pages of docs/ anew'
	@echo "make tiny-base   train the demo's base model anew (an hour) and pack it"
	@echo "make study   the demo's comparison at length, on three seeds (half an hour)"
	@echo 'make experiments   text encoders, objectives, captions: what they are worth on the tiny model (quarter of an hour)'
	@echo 'make guard-runs   what a rewind costs: clean, guarded and unguarded runs of the tiny model (minutes)'
	@echo 'make peers   compare with diffusers (installs pinned versions into $(PEERS), 1.6 GB)'
	@echo 'make peers-loaders   the loader beside four others, same samples, same server (installs them into $(LOADERS), 2.5 GB)'
	@echo 'make restarts   what torchrun restarts: a killed rank, and not a stop by the guard (installs $(PEERS), 1.6 GB)'
	@echo 'make two-nodes   two ranks in two network namespaces with latency and loss; needs root, or is skipped'
	@echo "make bench-ranks   weak scaling at one and two ranks beside PyTorch's FSDP2 (after make demo; quarter of an hour)"
	@echo 'make mixing  what the order of samples is worth: three orders, three seeds, the tiny model (ten minutes)'
	@echo 'make bench-loaders   the loader: samples a second, time to the first step, from a disk and from an object store'

# One set of packages in every recipe: with another, cargo unifies features differently and compiles much anew.
build:
	@$(TORCH); cargo build --release --workspace --bins --examples

demo: build
	sh scripts/demo.sh

# Each step prints nothing of its own unless it fails or takes long; cheapest first.
test: fmt lint doc unit

# rustfmt neither wraps comments nor counts lines. The checks need no libtorch and build in seconds.
fmt:
	cargo fmt --all -- --check
	cargo test --quiet --release -p checks --test limits
	@if command -v typos >/dev/null; then typos; else echo 'typos is not installed: skipped'; fi
	@if command -v cargo-deny >/dev/null; then cargo deny check; else echo 'cargo-deny is not installed: skipped'; fi

lint:
	@$(TORCH); set -x; cargo clippy --release --workspace --all-targets -- -D warnings

# One thread: tests run side by side, and libgomp's spinning threads would fight for the same cores.
unit:
	@$(TORCH); runner=$$($(TESTS)); set -x; OMP_NUM_THREADS=1 cargo $$runner --release --workspace

# Tests that `make test` leaves out since they take minutes.
guard-runs:
	@$(TORCH); set -x; OMP_NUM_THREADS=1 cargo test --release --workspace --test runs -- --ignored

doc:
	@$(TORCH); set -x; cargo test --release --workspace --doc && \
	RUSTDOCFLAGS='-D warnings' cargo doc --release --workspace --no-deps

docs:
	@$(TORCH); RECTIFLOW_WRITE_DOCS=1 cargo test --release -p rectiflow-train --lib config_page

# What the comparisons print is kept: docs/peers.txt.
peers: build
	$(PYTHON) scripts/peers/environment.py $(PEERS)
	@$(TORCH); set -e; sh scripts/peers/run.sh $(PEERS)/bin/python >$(PEERS)/output.txt || { cat $(PEERS)/output.txt; exit 1; }; \
	cp $(PEERS)/output.txt docs/peers.txt; cat docs/peers.txt

# Not in `make test`, which has no Python with torch.
restarts: build
	$(PYTHON) scripts/peers/environment.py $(PEERS)
	$(PEERS)/bin/python scripts/ranks/restarts.py target/release/rectiflow $(PEERS)/bin/torchrun

# Not in `make test`: it needs root, and minutes.
two-nodes: build
	$(PYTHON) scripts/ranks/two_nodes.py target/release/rectiflow

bench-ranks: build
	$(PYTHON) scripts/peers/environment.py $(PEERS)
	TORCH_USE_RTLD_GLOBAL=1 $(PEERS)/bin/python scripts/peers/weak_scaling.py target/release/rectiflow \
	--out benches/runs/$$(date +%F)-ranks/numbers.jsonl

# The same comparisons at SDXL's own size, with random weights: 30 GB of disk, 16 GB of memory, an hour on two cores.
peers-full: build
	$(PYTHON) scripts/peers/environment.py $(PEERS)
	@$(TORCH); TORCH_USE_RTLD_GLOBAL=1 $(PEERS)/bin/python scripts/peers/full_size.py runs/full-size

# Quarter of an hour on a machine that does nothing else; 13 GB in target/peers-loaders.
peers-loaders: build
	$(PYTHON) scripts/peers/environment.py $(LOADERS) scripts/peers/requirements-loaders.txt
	$(PYTHON) scripts/peers/loaders/compare.py target/peers-loaders --python $(LOADERS)/bin/python \
	--program target/release/examples/side_by_side --out benches/runs/$$(date +%F)-loaders --page docs/streaming.md

# The plot needs matplotlib, which is in the environment of the loaders.
mixing: build
	$(PYTHON) scripts/peers/environment.py $(LOADERS) scripts/peers/requirements-loaders.txt
	PYTHON=$(LOADERS)/bin/python sh scripts/mixing.sh

tiny-base: build
	PYTHON=$(PYTHON) sh scripts/tiny_base.sh

study: build
	sh scripts/study.sh

experiments: build
	sh scripts/experiments.sh

# Five minutes; packs 0.7 GB of synthetic data into target/loader-numbers the first time.
bench-loaders: build
	target/release/examples/loader_numbers target/loader-numbers

clean-demo:
	rm -rf runs/demo
