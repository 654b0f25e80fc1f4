#!/usr/bin/env bash
# native.sh BIN OUT: builds the native part of the stand-ins on the libraries in the wheels of a virtual environment.
set -euo pipefail
bin=$1
out=$2
jni=$(dirname "$0")/jni
java=$(dirname "$(dirname "$(readlink -f "$(command -v javac)")")")/include
site=$("$bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
flags=(-O2 -Wall -Wextra -shared -fPIC "-I$java" "-I$java/linux")

# The wheel's file has its version in its name, but programs load it by this name.
ln -sf "$(echo "$site"/onnxruntime/capi/libonnxruntime.so.*)" "$out/libonnxruntime.so.1"
g++ -std=c++17 "${flags[@]}" -I.packages/onnxruntime-headers/include "$jni/ort.cpp" -o "$out/libort_standin.so" \
    "$out/libonnxruntime.so.1" '-Wl,-rpath,$ORIGIN'

headers=$site/executorch/include
libraries=$site/executorch/lib
g++ -std=c++20 "${flags[@]}" -DC10_USING_CUSTOM_GENERATED_MACROS -isystem "$headers" \
    -isystem "$headers/executorch/runtime/core/portable_type/c10" "$jni/et.cpp" -o "$out/libet_standin.so" \
    -Wl,--no-as-needed "-L$libraries" -lexecutorch -lexecutorch_kernels_optimized -lexecutorch_backend_xnnpack \
    -lexecutorch_threadpool "-Wl,-rpath,$libraries"
