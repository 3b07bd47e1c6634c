#!/usr/bin/env bash
# libtorch 2.13.0, C++: at::RecordFunction has one more member where NDEBUG is not defined, and the
# published libraries are compiled with NDEBUG. A program that is compiled without it, as g++ does by
# itself and as build scripts of other languages do, links without a warning. inputs() of a profiling
# callback then reads a flag that the library never sets: in some calls it throws "Called inputs()
# outside RecordFunction start callback" inside of a start callback that asked for inputs. libtorch
# catches the error, prints a warning at each of these calls, and goes on: a profiler misses calls,
# and a step with thousands of them takes many times as long. With -DNDEBUG the same program reads all
# inputs. Nothing else complains.
#
# Needs python3 with venv, g++, readelf, 600 MB to download. Exits with 0 if seen again.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps \
    torch==2.13.0 nvidia-cuda-runtime==13.0.96 nvidia-cuda-cupti==13.0.85
torch=$(echo "$folder"/env/lib/python*/site-packages/torch)
cat >"$folder/inputs.cpp" <<'CPP'
#include <ATen/ATen.h>
#include <ATen/record_function.h>

#include <cstdio>
#include <memory>

int num_calls = 0, num_with_inputs = 0;

std::unique_ptr<at::ObserverContext> enter(const at::RecordFunction& call) {
  num_calls += 1;
  num_with_inputs += !call.inputs().empty();
  return nullptr;
}

int main() {
  const auto x = at::ones({3, 3});
  at::addGlobalCallback(at::RecordFunctionCallback(enter).needsInputs(true).scopes({at::RecordScope::FUNCTION}));
  at::mm(x, x);
  std::printf("%d calls, %d with inputs, %zu bytes\n", num_calls, num_with_inputs, sizeof(at::RecordFunction));
}
CPP
# The wheel is built for CUDA, which nothing here calls: only what libtorch_cpu needs is linked.
lib="$torch/lib"
cuda=$(find "$torch/.." -name 'libcudart.so*' -o -name 'libcupti.so*' | xargs -n 1 dirname | sort -u | paste -sd:)
build() {
    g++ -std=c++17 -O1 -w "$@" -I"$torch/include" -I"$torch/include/torch/csrc/api/include" \
        "$folder/inputs.cpp" -o "$folder/inputs" -L"$lib" -ltorch_cpu -lc10 \
        -Wl,--unresolved-symbols=ignore-in-shared-libs
}
run() { LD_LIBRARY_PATH="$lib:$cuda" "$folder/inputs" 2>"$folder/said"; }

build
without=$(run)
echo "without NDEBUG: $without; it says: $(grep -o 'Called inputs() outside RecordFunction start callback' "$folder/said" | head -n 1)"
grep -q 'Called inputs() outside RecordFunction start callback' "$folder/said"
build -DNDEBUG
with=$(run)
echo "with NDEBUG: $with; it says: $(head -c 200 "$folder/said")"
test ! -s "$folder/said"
# "4 calls, 4 with inputs, ...": all of them with NDEBUG, fewer without.
[[ "$with" =~ ^([0-9]+)\ calls,\ ([0-9]+)\ with ]] && test "${BASH_REMATCH[1]}" = "${BASH_REMATCH[2]}"
[[ "$without" =~ ^([0-9]+)\ calls,\ ([0-9]+)\ with ]] && test "${BASH_REMATCH[1]}" -gt "${BASH_REMATCH[2]}"
