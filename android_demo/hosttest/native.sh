#!/usr/bin/env bash
# native.sh BIN OUT: the native half of the stand-ins, on the libraries inside the wheels of a virtual environment.
set -euo pipefail
bin=$1
out=$2
jni=$(dirname "$0")/jni
java=$(dirname "$(dirname "$(readlink -f "$(command -v javac)")")")/include
site=$("$bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
# The library of ExecuTorch is a Python module: what it asks of Python is never called, but must be found.
python=$("$bin/python" - <<'END'
import sys
import sysconfig
from pathlib import Path

of = sysconfig.get_config_vars()
places = (Path(of["LIBDIR"]), Path(of["LIBDIR"], of.get("MULTIARCH", "")), Path("/usr/lib", of.get("MULTIARCH", "")))
name = "libpython{}.{}.so.1.0".format(*sys.version_info[:2])
found = [str(place / name) for place in places if (place / name).exists()]
if not found:
    sys.exit(f"native.sh: {name} is not there; install it (Debian: {name.split('.so')[0]})")
print(found[0])
END
)
flags=(-O2 -Wall -Wextra -shared -fPIC "-I$java" "-I$java/linux")

# The wheel's file has its version in its name, but is asked for as this.
ln -sf "$(echo "$site"/onnxruntime/capi/libonnxruntime.so.*)" "$out/libonnxruntime.so.1"
g++ -std=c++17 "${flags[@]}" -I.packages/onnxruntime-headers/include "$jni/ort.cpp" -o "$out/libort_standin.so" \
    "$out/libonnxruntime.so.1" '-Wl,-rpath,$ORIGIN'

headers=$site/executorch/include
executorch=$(echo "$site"/executorch/extension/pybindings/_portable_lib.*.so)
g++ -std=c++20 "${flags[@]}" -DC10_USING_CUSTOM_GENERATED_MACROS -isystem "$headers" \
    -isystem "$headers/executorch/runtime/core/portable_type/c10" "$jni/et.cpp" -o "$out/libet_standin.so" \
    -Wl,--no-as-needed "$executorch" "$python" "-Wl,-rpath,$(dirname "$executorch"):$(dirname "$python")"
