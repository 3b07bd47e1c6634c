# The entry points of the repository. `make demo` and `make test` need rustc and cargo, a C++ compiler, make and Python
# with pip. The first run fetches libtorch; scripts/libtorch.py documents the source and the alternatives, and
# scripts/onnx_runtime.py those of ONNX Runtime, which the tests load.

PYTHON ?= python3
# Every recipe that compiles starts with this: finds or fetches libtorch, or stops.
TORCH = LIBTORCH="$$($(PYTHON) scripts/libtorch.py)" || exit 1; export LIBTORCH; unset LIBTORCH_USE_PYTORCH
# Tests of tags and scores load it at run time; nothing is compiled against it.
ONNX = $(PYTHON) scripts/onnx_runtime.py >/dev/null || exit 1
PEERS = .venv-peers
# For the comparison with ComfyUI, whose source is in the folder COMFYUI.
PEERS_COMFY = .venv-peers-comfy
PYTHON312 ?= python3.12
LOADERS = .venv-loaders
PREP = .venv-prep
CAPTION = .venv-caption
# For loaders that need a newer Python than the others.
LOADERS_DISK = .venv-loaders-disk
PYTHON313 ?= python3.13

.PHONY: help build cuda-check gpu gpu-dry-run count-calls test fuzz pairs peers-sources demo fmt lint unit doc docs restarts slurm slurm-prep two-nodes bench-ranks peers peers-comfy peers-full peers-loaders peers-prep bench-loaders mixing tiny-base study experiments captions-use guard-runs clean-demo peers-caption peers-score peers-watch full-size-step

help:
	@echo 'make build          build the binary, target/release/rectiflow'
	@echo 'make demo           convert a tiny SDXL to flow matching and measure it, on the CPU; see runs/demo/report.html'
	@echo 'make test           run every check of CI, cheapest first'
	@echo 'make cuda-check     build for GPUs into target/cuda and check the program; needs no GPU (5 GB, twenty minutes)'
	@echo 'make gpu            make cuda-check, then fill target/gpu for a machine with a GPU; run scripts/gpu/run there'
	@echo 'make gpu-dry-run    go through every stage of scripts/gpu/run on the CPU, with tiny models'
	@echo 'make count-calls    count the calls of a step of SDXL on a GPU, and of diffusers; needs no GPU (installs $(PEERS))'
	@echo 'make fuzz           read mutated files of every format for an hour (FUZZ_SECS, FUZZ_COUNT, FUZZ_SEED)'
	@echo 'make pairs          compare picture and text of a million rows of each kind of source (PAIRS; 20 minutes, 5 GB)'
	@echo 'make docs           regenerate the generated pages of docs/'
	@echo "make tiny-base      train the demo's base model (an hour) and pack it"
	@echo "make study          run the demo's full comparison, on three seeds (half an hour)"
	@echo 'make experiments    compare text encoders, objectives and captions, on the tiny model (quarter of an hour)'
	@echo 'make captions-use   measure what richer captions are worth, on the tiny model'
	@echo 'make guard-runs     measure the cost of a rewind: clean, guarded and unguarded tiny runs (minutes)'
	@echo 'make test-processors  run the numeric tests with AVX2 only and with two threads (up to ten minutes each)'
	@echo 'make peers          compare with diffusers (installs pinned versions into $(PEERS), 1.6 GB)'
	@echo "make peers-comfy    draw the same pictures with a real ComfyUI, its source in COMFYUI=FOLDER (1.8 GB, half an hour)"
	@echo "make peers-full     compare with diffusers at SDXL's own size (30 GB of disk, an hour)"
	@echo 'make peers-loaders  compare the loader with seven others (installs $(LOADERS) and $(LOADERS_DISK), 2.7 GB)'
	@echo 'make peers-prep     compare the preparation of pictures with datago and Pillow (installs $(PREP), 0.1 GB)'
	@echo 'make peers-caption  caption pictures with a real server, transformers serve (installs $(CAPTION), 1.3 GB)'
	@echo "make peers-score    compare tagging and scoring with Python's onnxruntime (installs $(SCORE), 0.3 GB)"
	@echo 'make full-size-step  train all of SDXL'"'"'s UNet in 19.4 GiB, kill it, resume it and export it (an hour, 50 GB)'
	@echo "make peers-watch    read a run's files for TensorBoard, trackio and W&B with these programs (installs $(WATCH), 0.3 GB)"
	@echo 'make peers-sources  list sources that webdataset, tar, hfutils, webshart, datasets, MosaicML and kohya (KOHYA=FOLDER) write'
	@echo 'make restarts       test restarts under torchrun (installs $(PEERS), 1.6 GB)'
	@echo 'make slurm          test launch/slurm.sbatch under Slurm; skipped without root, slurm-wlm and munge'
	@echo 'make slurm-prep     test launch/prep-slurm.sh in the same way'
	@echo 'make two-nodes      test two ranks in two network namespaces with latency and loss; skipped without root'
	@echo "make bench-ranks    compare weak scaling with PyTorch's FSDP2 (after make demo; quarter of an hour)"
	@echo 'make mixing         compare three orders of samples, three seeds, on the tiny model (ten minutes)'
	@echo 'make bench-loaders  measure the loader: samples a second and first step, from disk and object store'
	@echo 'make clean-demo     remove runs/demo'

# Every recipe builds the same set of packages. With another set, cargo unifies features differently and rebuilds much.
build:
	@$(TORCH); cargo build --release --workspace --bins --examples

# A libtorch with CUDA and a target folder of its own: the build for the CPU stays as it is. The feature makes a build
# without NCCL fail.
cuda-check: export RECTIFLOW_LIBTORCH = cuda
cuda-check:
	@$(TORCH); CARGO_TARGET_DIR=target/cuda cargo build --release --workspace --bins --examples --features nccl
	$(PYTHON) scripts/cuda_check.py target/cuda/release/rectiflow

# What a machine with a GPU needs, in one folder.
gpu: cuda-check
	$(PYTHON) scripts/gpu/pack.py target/cuda/release target/gpu

# 50 GB of disk, 20 GiB of memory, an hour. DIFFUSERS=PYTHON opens the export with its diffusers too.
full-size-step: build
	@$(TORCH); export LD_LIBRARY_PATH="$$LIBTORCH/lib"; $(PYTHON) scripts/gpu/full_size.py $(if $(DIFFUSERS),--diffusers $(DIFFUSERS))

gpu-dry-run: build
	scripts/gpu/run --dry-run --out target/gpu-dry-run

count-calls: build
	$(PYTHON) scripts/peers/environment.py $(PEERS)
	OMP_NUM_THREADS=1 TORCH_USE_RTLD_GLOBAL=1 $(PEERS)/bin/python scripts/peers/count_calls.py \
	--rectiflow target/release/rectiflow --out benches/runs/$$(date +%F)-calls/calls.json

demo: build
	sh scripts/demo.sh

# Each step prints nothing of its own unless it fails or takes long; cheapest first.
test: fmt lint doc unit

# rustfmt neither wraps comments nor counts lines. The checks need no libtorch and build in seconds.
fmt:
	cargo fmt --all -- --check
	cargo test --quiet --release -p checks --test limits
	$(PYTHON) scripts/check_imports.py
	@if command -v ruff >/dev/null; then ruff check --quiet scripts; else echo 'ruff is not installed: skipped'; fi
	@if command -v typos >/dev/null; then typos; else echo 'typos is not installed: skipped'; fi
	@if command -v cargo-deny >/dev/null; then cargo deny check; else echo 'cargo-deny is not installed: skipped'; fi

lint:
	@$(TORCH); set -x; cargo clippy --release --workspace --all-targets -- -D warnings

# Unit tests share a process, because loading libtorch takes half a second. nextest runs the others beside each other;
# plain `cargo test` is the fallback. One thread: libgomp's spinning threads would compete for the same cores.
OTHERS = --release --workspace --tests --example emoji_pictures
unit:
	@$(TORCH); $(ONNX); set -x; export OMP_NUM_THREADS=1; cargo test --quiet --release --workspace --lib --bins && \
	if cargo nextest --version >/dev/null 2>&1; then cargo nextest run $(OTHERS) -E 'kind(test) + kind(example)'; \
	else cargo test $(OTHERS:--tests=--test '*'); fi

# Reads mutated files of every format, with other seeds each time, until FUZZ_SECS are over or a test fails. A failing
# case is repeated by MUTATION_SEED and MUTATION_COUNT, as printed. `make unit` reads 200 cases of each mutation.
FUZZ_SECS ?= 3600
FUZZ_COUNT ?= 2000
FUZZ_SEED ?= 1
fuzz:
	@$(TORCH); $(ONNX); end=$$(($$(date +%s) + $(FUZZ_SECS))); seed=$(FUZZ_SEED); \
	while [ $$(date +%s) -lt $$end ]; do \
	echo "MUTATION_SEED=$$seed MUTATION_COUNT=$(FUZZ_COUNT)"; \
	MUTATION_SEED=$$seed MUTATION_COUNT=$(FUZZ_COUNT) OMP_NUM_THREADS=1 \
	cargo test --quiet --release --workspace --lib --bins --tests mutated || exit 1; \
	seed=$$((seed + 1)); done

# Rows of each kind of source whose picture and text are compared; a kind takes at most 5 GB of disk at a time.
PAIRS ?= 1000000
pairs:
	PAIRS=$(PAIRS) cargo test --release -p rectiflow-data --test pairs -- --test-threads 1 --nocapture

# These tests take minutes, so `make test` leaves them out.
guard-runs:
	@$(TORCH); set -x; OMP_NUM_THREADS=1 cargo test --release --workspace --test runs -- --ignored

# Other makers' processors have other instructions, and so other kernels in oneDNN, MKL and libtorch.
test-processors:
	@$(TORCH); $(PYTHON) scripts/test_processors.py

doc:
	@$(TORCH); set -x; cargo test --release --workspace --doc && \
	RUSTDOCFLAGS='-D warnings' cargo doc --release --workspace --no-deps

docs:
	@$(TORCH); RECTIFLOW_WRITE_DOCS=1 cargo test --release -p rectiflow-train --lib recipe::page

# docs/peers.txt keeps the output of the comparisons.
peers: build
	$(PYTHON) scripts/peers/environment.py $(PEERS)
	@$(TORCH); set -e; sh scripts/peers/run.sh $(PEERS)/bin/python >$(PEERS)/output.txt || { cat $(PEERS)/output.txt; exit 1; }; \
	cp $(PEERS)/output.txt docs/peers.txt; cat docs/peers.txt

# Needs ComfyUI's source, Python 3.12 and Chromium. With the checkpoint of `make demo` flow pictures show something.
FLOW = $$(ls -d runs/demo/checkpoints/step-* 2>/dev/null | sort | tail -n 1)
peers-comfy: build
	@test -f "$(COMFYUI)/main.py" || { echo 'make peers-comfy COMFYUI=FOLDER: no main.py of ComfyUI in "$(COMFYUI)"'; exit 2; }
	$(PYTHON312) scripts/peers/environment.py $(PEERS_COMFY) scripts/peers/requirements-comfyui.txt
	set -e; RUN=runs/demo; . scripts/parts.sh; mkdir -p $$RUN; unpack_bases
	@$(TORCH); flow="$(FLOW)"; OMP_NUM_THREADS=1 TORCH_USE_RTLD_GLOBAL=1 $(PEERS_COMFY)/bin/python \
	scripts/peers/comfyui/compare.py "$(COMFYUI)" --flow "$${flow:-runs/demo/base}" --page docs/interop.md \
	--details docs/peers-comfy.txt --object-info crates/rectiflow-sdxl/tests/golden/object_info.json

# Not in `make test`, because it needs a Python with torch.
restarts: build
	$(PYTHON) scripts/peers/environment.py $(PEERS)
	$(PEERS)/bin/python scripts/ranks/restarts.py target/release/rectiflow $(PEERS)/bin/torchrun

# Not in `make test`, because it needs root and Slurm, and takes minutes.
slurm: build
	$(PYTHON) scripts/ranks/slurm.py target/release/rectiflow

slurm-prep: build
	$(PYTHON) scripts/ranks/slurm_prep.py target/release/rectiflow

# Not in `make test`, because it needs root and takes minutes.
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

# Takes a quarter of an hour on an otherwise idle machine, and 15 GB in target/peers-loaders. The loaders that read a
# disk need Python 3.13; without it their rows say so.
peers-loaders: build
	if command -v $(PYTHON313) >/dev/null; then \
	$(PYTHON313) scripts/peers/environment.py $(LOADERS_DISK) scripts/peers/requirements-disk.txt && \
	WITH="--python $(LOADERS_DISK)/bin/python"; fi && \
	PYTHONPATH=scripts/peers $(PYTHON) scripts/peers/loaders/compare_disk.py target/peers-loaders $$WITH \
	--program target/release/examples/side_by_side --out benches/runs/$$(date +%F)-loaders --page docs/streaming.md
	$(PYTHON) scripts/peers/environment.py $(LOADERS) scripts/peers/requirements-loaders.txt
	PYTHONPATH=scripts/peers $(PYTHON) scripts/peers/loaders/compare.py target/peers-loaders --python $(LOADERS)/bin/python \
	--program target/release/examples/side_by_side --out benches/runs/$$(date +%F)-loaders --page docs/streaming.md

# Takes ten minutes on an otherwise idle machine. The first run draws 0.3 GB of pictures into target/peers-prep.
peers-prep: build
	$(PYTHON) scripts/peers/environment.py $(PREP) scripts/peers/requirements-prep.txt
	PYTHONPATH=scripts/peers $(PREP)/bin/python scripts/peers/prep/compare.py target/peers-prep \
	--program target/release/examples/bench_prep --out benches/runs/$$(date +%F)-prep --page docs/preparation-speed.md
# Captions from a real server with tiny random models, which are made here: what they say has no sense.
peers-caption: build
	$(PYTHON) scripts/peers/environment.py $(CAPTION) scripts/peers/requirements-caption.txt
	TORCH_USE_RTLD_GLOBAL=1 $(CAPTION)/bin/python scripts/peers/caption/tiny_vision.py target/peers-caption
	TORCH_USE_RTLD_GLOBAL=1 $(CAPTION)/bin/python scripts/peers/caption/serve.py target/peers-caption \
	--program target/release/rectiflow --transformers $(CAPTION)/bin/transformers


# Takes ten minutes on an otherwise idle machine.
SCORE = .venv-score
peers-score: build
	$(PYTHON312) scripts/peers/environment.py $(SCORE) scripts/peers/requirements-score.txt
	$(ONNX); PYTHONPATH=scripts/peers $(SCORE)/bin/python scripts/peers/score/compare.py target/peers-score \
	--program target/release/examples/bench_score --command target/release/rectiflow \
	--out benches/runs/$$(date +%F)-score --page docs/tags-and-scores.md
# What other programs read of a run.
WATCH = .venv-watch
peers-watch: build
	$(PYTHON) scripts/peers/environment.py $(WATCH) scripts/peers/requirements-watch.txt
	@$(TORCH); cargo build --release -p rectiflow-train --example made_up_run
	$(WATCH)/bin/python scripts/peers/watch.py target/peers-watch target/release/rectiflow target/release/examples/made_up_run

# Sources of pictures as the real tools write them: one environment for MosaicML's, one for the others. kohya's scripts are
# run from a checkout of sd-scripts in the folder KOHYA; without it only recorded files are read, by the tests.
SOURCES = .venv-sources
peers-sources:
	$(PYTHON313) scripts/peers/environment.py $(SOURCES) scripts/peers/requirements-sources.txt
	$(PYTHON) scripts/peers/environment.py $(LOADERS) scripts/peers/requirements-loaders.txt
	cargo build --release -p rectiflow-data --example list_source
	TORCH_USE_RTLD_GLOBAL=1 $(PYTHON) scripts/peers/sources.py target/peers-sources \
	--program target/release/examples/list_source --python $(SOURCES)/bin/python --mosaic $(LOADERS)/bin/python \
	$(if $(KOHYA),--kohya $(KOHYA))

# The plot needs matplotlib, which the environment of the loaders has.
mixing: build
	$(PYTHON) scripts/peers/environment.py $(LOADERS) scripts/peers/requirements-loaders.txt
	PYTHON=$(LOADERS)/bin/python sh scripts/mixing.sh

tiny-base: build
	PYTHON=$(PYTHON) sh scripts/tiny_base.sh

study: build
	sh scripts/study.sh

experiments: build
	sh scripts/experiments.sh

# What richer captions are worth on the tiny model, five seeds. PYTHON needs NumPy, Pillow and matplotlib.
captions-use: build
	sh scripts/captions_use.sh

# Takes five minutes. The first run packs 0.7 GB of synthetic data into target/loader-numbers.
bench-loaders: build
	target/release/examples/loader_numbers target/loader-numbers

clean-demo:
	rm -rf runs/demo
