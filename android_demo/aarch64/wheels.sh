#!/usr/bin/env bash
# aarch64/wheels.sh PYTHON: fetches aarch64 builds of packages that PYTHON has installed into .packages/aarch64-wheels, and
# builds libexecutorch_graphs.so beside the libraries that it needs. If that fails, the exit status is 3, with one line
# on stderr.
#
# ExecuTorch's Python module needs libtorch for its thread pool and some kernels, but not PyTorch. The index has it for
# aarch64 with CUDA only; stand-ins whose functions all fail replace the CUDA libraries.
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
print(*(f"{name}=={version(name).partition(chr(43))[0]}" for name in "numpy onnxruntime tokenizers executorch torch".split()))
') || fail "$PYTHON does not have all of numpy, onnxruntime, tokenizers, executorch and torch"
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
for wheel in "$new"/wheels/{numpy,onnxruntime,tokenizers,executorch}-*.whl; do unzip -q -o "$wheel" -d "$new/site"; done
unzip -q -j -o "$new"/wheels/torch-*.whl 'torch/lib/*.so*' -d "$new/lib" \
    -x '*cuda*' '*nvshmem*' '*nvrtc*' '*/libshm*' '*/libtorch.so' '*/libtorch_python.so' '*/libtorch_global_deps.so'
mv "$new"/site/executorch/extension/pybindings/_portable_lib*.so "$new/lib"
rm -r "$new/wheels"

CXX=("$CROSS/bin/aarch64-g++" "--sysroot=$CROSS" -shared -fPIC)
portable=$(cd "$new/lib" && echo _portable_lib*.so)
undefined=$("$CROSS/bin/aarch64-nm" -D --undefined-only "$new/lib/libtorch_cpu.so" "$new/lib/$portable")
stand_in() { # LIBRARY PATTERN: a library whose functions are the undefined symbols that match
    { echo 'extern "C" {' && sed -En "s/^ +U $2\$/int \1() { return 100; }/p" <<<"$undefined" && echo '}'; } >"$new/stand_in.cpp"
    echo "$1 { *; };" >"$new/versions.map"
    "${CXX[@]}" "-Wl,-soname,$1" "-Wl,--version-script=$new/versions.map" -o "$new/lib/$1" "$new/stand_in.cpp"
}
stand_in libtorch.so '()'
stand_in libtorch_python.so '(.*pybind11.*)'
for library in $(sed -En 's/^.*@(libcu[^ ]*)$/\1/p' <<<"$undefined" | sort -u); do stand_in "$library" "(.*)@$library"; done

headers=$new/site/executorch/include
"${CXX[@]}" -std=c++20 -O1 -DC10_USING_CUSTOM_GENERATED_MACROS "-I$headers" \
    "-I$headers/executorch/runtime/core/portable_type/c10" -o "$new/lib/libexecutorch_graphs.so" "$SOURCE" \
    "-L$new/lib" "-l:$portable" -Wl,--allow-shlib-undefined || fail "$SOURCE does not compile against the wheel's headers"
rm -rf "$new/site/executorch" "$new"/{stand_in.cpp,versions.map}
echo "$recipe" >"$new/.recipe"
rm -rf "$FOLDER"
mv "$new" "$FOLDER"
