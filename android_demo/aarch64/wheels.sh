#!/usr/bin/env bash
# aarch64/wheels.sh PYTHON: fetches aarch64 builds of packages that PYTHON has installed into .packages/aarch64-wheels, and
# builds libexecutorch_graphs.so beside the libraries that it needs. If that fails, the exit status is 3, with one line
# on stderr.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=$1
FOLDER=.packages/aarch64-wheels LOG=$PWD/.packages/.log
CROSS=$PWD/.packages/cross
SOURCE=aarch64/executorch_graphs.cpp

fail() {
    echo "wheels.sh: the aarch64 builds cannot be fetched: $1" >&2
    exit 3
}

versions=$("$PYTHON" -c '
from importlib.metadata import version
print(*(f"{name}=={version(name).partition(chr(43))[0]}" for name in "numpy onnxruntime tokenizers executorch".split()))
') || fail "$PYTHON does not have all of numpy, onnxruntime, tokenizers and executorch"
recipe="$versions $(cat "$SOURCE" "$0" | sha256sum)"
[[ -e $FOLDER/.recipe && $(<"$FOLDER/.recipe") == "$recipe" ]] && exit
command -v unzip >/dev/null || fail "this machine lacks the command unzip"

new=.packages/.aarch64-wheels.new
rm -rf "$new"
trap 'rm -rf "$new"' EXIT
mkdir -p "$new/wheels" "$new/site" "$new/lib"
"$PYTHON" -m pip download --quiet --disable-pip-version-check --only-binary=:all: --no-deps --python-version 3.11 \
    --platform manylinux_2_28_aarch64 --platform manylinux_2_27_aarch64 --platform manylinux_2_17_aarch64 \
    --platform manylinux2014_aarch64 --dest "$new/wheels" $versions >>"$LOG" 2>&1 </dev/null ||
    fail "the package index does not give all of: $versions (see $LOG)"
for wheel in "$new"/wheels/*.whl; do unzip -q -o "$wheel" -d "$new/site"; done
mv "$new"/site/executorch/lib/libexecutorch*.so "$new/lib"
rm -r "$new/wheels"

headers=$new/site/executorch/include
"$CROSS/bin/aarch64-g++" "--sysroot=$CROSS" -shared -fPIC -std=c++20 -O1 -DC10_USING_CUSTOM_GENERATED_MACROS "-I$headers" \
    "-I$headers/executorch/runtime/core/portable_type/c10" -o "$new/lib/libexecutorch_graphs.so" "$SOURCE" \
    -Wl,--no-as-needed,--allow-shlib-undefined "-L$new/lib" -lexecutorch -lexecutorch_kernels_optimized \
    -lexecutorch_backend_xnnpack -lexecutorch_threadpool || fail "$SOURCE does not compile against the wheel's headers"
rm -rf "$new/site/executorch"
echo "$recipe" >"$new/.recipe"
rm -rf "$FOLDER"
mv "$new" "$FOLDER"
