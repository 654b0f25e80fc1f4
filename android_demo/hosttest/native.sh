#!/usr/bin/env bash
# native.sh BIN OUT: builds the native part of the stand-ins on the libraries in the wheels of a virtual environment.
set -euo pipefail
bin=$1
out=$2
jni=$(dirname "$0")/jni
java=$(dirname "$(dirname "$(readlink -f "$(command -v javac)")")")/include
site=$("$bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
# The library of ExecuTorch is a Python module: it calls nothing of Python here, but its symbols must be found.
python=$("$bin/python" - <<'END'
import sys
import sysconfig
from pathlib import Path

config = sysconfig.get_config_vars()
places = (
    Path(config["LIBDIR"]),
    Path(config["LIBDIR"], config.get("MULTIARCH", "")),
    Path("/usr/lib", config.get("MULTIARCH", "")),
)
name = "libpython{}.{}.so.1.0".format(*sys.version_info[:2])
files = [str(place / name) for place in places if (place / name).exists()]
if not files:
    sys.exit(f"native.sh: {name} is missing; install it (Debian: {name.split('.so')[0]})")
print(files[0])
END
)
flags=(-O2 -Wall -Wextra -shared -fPIC "-I$java" "-I$java/linux")

# The wheel's file has its version in its name, but programs load it by this name.
ln -sf "$(echo "$site"/onnxruntime/capi/libonnxruntime.so.*)" "$out/libonnxruntime.so.1"
g++ -std=c++17 "${flags[@]}" -I.packages/onnxruntime-headers/include "$jni/ort.cpp" -o "$out/libort_standin.so" \
    "$out/libonnxruntime.so.1" '-Wl,-rpath,$ORIGIN'

headers=$site/executorch/include
executorch=$(echo "$site"/executorch/extension/pybindings/_portable_lib.*.so)
g++ -std=c++20 "${flags[@]}" -DC10_USING_CUSTOM_GENERATED_MACROS -isystem "$headers" \
    -isystem "$headers/executorch/runtime/core/portable_type/c10" "$jni/et.cpp" -o "$out/libet_standin.so" \
    -Wl,--no-as-needed "$executorch" "$python" "-Wl,-rpath,$(dirname "$executorch"):$(dirname "$python")"
