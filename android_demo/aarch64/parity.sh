#!/usr/bin/env bash
# aarch64/parity.sh BIN NAME...: runs build/bundle-NAME here and under aarch64 emulation, and compares the outputs. The
# exit status is 1 if tokens differ. If a package cannot be fetched, it says so in capitals and compares nothing.
set -euo pipefail
cd "$(dirname "$0")/.."
BIN=$1
shift
if ! reason=$({ tools/packages.sh qemu arm64 cross && aarch64/wheels.sh "$BIN/python"; } 2>&1); then
    echo "AARCH64 PARITY SKIPPED: ${reason##*$'\n'}"
    exit 0
fi
"${MAKE:-make}" --silent --no-print-directory "BIN=$BIN" $(printf 'build/bundle-%s/manifest.json ' "$@")

ROOT=$PWD/.packages/arm64 WHEELS=$PWD/.packages/aarch64-wheels OUT=build/aarch64-parity
export PYTHONDONTWRITEBYTECODE=1 OMP_NUM_THREADS=1
here() { PYTHONPATH=.. "$BIN/python" "$@"; }
emulated() { # the processor of a phone of 2022
    .packages/qemu/bin/qemu-aarch64 -cpu "${AARCH64_CPU:-cortex-a710}" -L "$ROOT" -E "PYTHONHOME=$ROOT/usr" \
        -E "PYTHONPATH=..:aarch64:$WHEELS/site" -E "LD_LIBRARY_PATH=$WHEELS/lib" "$ROOT/usr/bin/python3.11" "$@"
}

rm -rf "$OUT"
mkdir -p "$OUT/here" "$OUT/emulated"
for name in "$@"; do
    options=(--prompts "${AARCH64_PROMPTS:-3}" --tokens "${AARCH64_TOKENS:-24}")
    here aarch64/run.py "build/bundle-$name" "$OUT/here/$name" "${options[@]}"
    # Both runtimes report on stderr what they cannot detect of an emulated processor.
    emulated aarch64/run.py "build/bundle-$name" "$OUT/emulated/$name" "${options[@]}" \
        --executorch executorch_graphs 2>"$OUT/emulated/$name.log" || { cat "$OUT/emulated/$name.log" >&2 && exit 1; }
done
here aarch64/compare.py "$OUT/here" "$OUT/emulated" "$OUT/parity.json" "$@"
