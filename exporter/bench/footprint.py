"""Load time and memory of a bundle, measured in its own process: `python -m exporter.bench.footprint BUNDLE THREADS`.

Only `runtime_ref` is imported, so a process that loads an ONNX bundle never imports torch. The backend's runtime is
imported before the first reading of memory: its memory is in the totals but not in the differences. No file is hashed,
and the page cache is left as it is. Prints one JSON document, which is `{"error": ...}` if the bundle cannot be loaded.
"""

import contextlib
import gc
import importlib
import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from exporter.bench.timing import spread
from runtime_ref.decoder import Options, generate
from runtime_ref.engine import GRAPH_MODULES, load_engine
from runtime_ref.errors import InputError
from runtime_ref.manifest import read_manifest
from runtime_ref.quiet import EXECUTORCH_LOGGERS, quiet
from runtime_ref.stats import Stats

PROCESS_STATUS = Path("/proc/self/status")
MAX_PROMPT_TOKENS, MAX_NEW_TOKENS = 16, 64  # of the generation after which memory is read again
MAX_LOADS, RELOAD_SECONDS = 3, 5.0  # loads that are timed, and the budget of those after the first


def resident_bytes() -> dict[str, int] | None:
    """Return the bytes of this process that are in memory.

    Returns:
        `anonymous`, memory that the process allocated, and `files`, pages of mapped files. The system can drop those
        and read them again, and does so first when it runs short of memory. None where there is no /proc.
    """
    if not PROCESS_STATUS.exists():
        return None
    lines = (line.partition(":") for line in PROCESS_STATUS.read_text().splitlines())
    fields = {name: value.split() for name, _, value in lines}
    if "RssAnon" not in fields or "RssFile" not in fields:
        return None
    return {"anonymous": 1024 * int(fields["RssAnon"][0]), "files": 1024 * int(fields["RssFile"][0])}


def growth(before: dict[str, int] | None, now: dict[str, int] | None) -> dict[str, Any] | None:
    """Compare two results of `resident_bytes`: for `anonymous` and `files`, `total_bytes` now and `added_bytes`."""
    if before is None or now is None:
        return None
    return {name: {"total_bytes": now[name], "added_bytes": now[name] - before[name]} for name in now}


def measure(bundle: Path, threads: int) -> dict[str, Any]:
    """Time loads of a bundle in this process, and read its memory after the first load and a speculative generation.

    Args:
        bundle: a bundle's directory.
        threads: number of threads that the runtime may use.

    Returns:
        `seconds` of each load, `resident` memory before, after the first load and after `generated_tokens`, and
        whether torch was imported.

    Raises:
        InputError: not a bundle, or one that cannot be loaded or run.
    """
    manifest = replace(read_manifest(bundle), eos=frozenset())
    if manifest.backend in GRAPH_MODULES:
        # load_engine reports a missing package.
        with contextlib.suppress(ImportError), quiet(*EXECUTORCH_LOGGERS):
            importlib.import_module(GRAPH_MODULES[manifest.backend])
    before, started = resident_bytes(), time.perf_counter()
    engine = load_engine(bundle, manifest, threads)
    seconds = [time.perf_counter() - started]
    loaded = resident_bytes()
    prompt_tokens = min(MAX_PROMPT_TOKENS, manifest.max_seq_len - 1)
    prompt = [(7 + 31 * i) % manifest.vocab_size for i in range(prompt_tokens)]
    tokens = list(generate(engine, prompt, Options(MAX_NEW_TOKENS, manifest.default_draft_tokens), Stats()))
    generated = resident_bytes()
    until = time.perf_counter() + RELOAD_SECONDS
    while len(seconds) < MAX_LOADS and time.perf_counter() + max(seconds) < until:
        del engine
        gc.collect()
        started = time.perf_counter()
        engine = load_engine(bundle, manifest, threads)
        seconds.append(time.perf_counter() - started)
    return {
        "seconds": seconds,
        "resident": {
            "before": before,
            "loaded": growth(before, loaded),
            "generated": growth(before, generated),
            "generated_tokens": len(tokens),
        },
        "torch_imported": "torch" in sys.modules,
    }


def footprint(bundle: Path, threads: int) -> dict[str, Any]:
    """Run `measure` in a new Python process.

    Args:
        bundle: a bundle's directory.
        threads: number of threads that the runtime may use.

    Returns:
        The document of `measure`, its `seconds` summarized by `spread`.

    Raises:
        InputError: the bundle cannot be loaded or run, or the process crashed.
    """
    command = [sys.executable, "-m", "exporter.bench.footprint", str(bundle), str(threads)]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        measurements = json.loads(process.stdout.splitlines()[-1])
    except (IndexError, ValueError) as error:
        reason = (process.stderr.strip() or f"exit {process.returncode}").splitlines()[-1]
        raise InputError(
            f"{bundle}: a new process could not load it and generate ({reason}); run `parity` on the bundle"
        ) from error
    if "error" in measurements:
        raise InputError(measurements["error"])
    return {**measurements, "seconds": spread(measurements["seconds"])}


if __name__ == "__main__":
    try:
        print(json.dumps(measure(Path(sys.argv[1]), int(sys.argv[2]))))
    except InputError as error:
        print(json.dumps({"error": str(error)}))
