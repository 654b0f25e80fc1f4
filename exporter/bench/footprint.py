"""What loading a bundle takes, in a process of its own: `python -m exporter.bench.footprint BUNDLE THREADS`.

Only `runtime_ref` is imported, so on ONNX there is no torch in the process. What the backend's runtime takes by itself
is imported before the first look, and so is in the totals but not in the differences. Files are as warm as the page
cache has them; nothing is hashed. Prints one JSON document, with an `error` where the bundle cannot be loaded.
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

from exporter.bench import spread
from runtime_ref.decoder import Options, generate
from runtime_ref.engine import GRAPH_MODULES, load_engine
from runtime_ref.errors import InputError
from runtime_ref.manifest import read_manifest
from runtime_ref.quiet import EXECUTORCH_LOGGERS, quiet
from runtime_ref.stats import Stats

STATUS = Path("/proc/self/status")
PROMPT, NEW_TOKENS = 16, 64
LOADS, SECONDS = 3, 5.0  # loads that are timed, and what they may take together after the first


def resident() -> dict[str, int] | None:
    """Bytes of this process in memory, its own (`anonymous`) and those of mapped files; None where there is no /proc.

    Pages of files can be dropped and read again, so a system short of memory takes those first.
    """
    if not STATUS.exists():
        return None
    lines = (line.partition(":") for line in STATUS.read_text().splitlines())
    fields = {name: value.split() for name, _, value in lines}
    if "RssAnon" not in fields or "RssFile" not in fields:
        return None
    return {"anonymous": 1024 * int(fields["RssAnon"][0]), "files": 1024 * int(fields["RssFile"][0])}


def grown(before: dict[str, int] | None, now: dict[str, int] | None) -> dict[str, Any] | None:
    """What is resident now: in total, and more than before."""
    if before is None or now is None:
        return None
    return {kind: {"total_bytes": now[kind], "added_bytes": now[kind] - before[kind]} for kind in now}


def measure(bundle: Path, threads: int) -> dict[str, Any]:
    """Seconds of loads, and what is resident after the first one and after a short speculative generation."""
    manifest = replace(read_manifest(bundle), eos=frozenset())
    if manifest.backend in GRAPH_MODULES:
        with contextlib.suppress(ImportError), quiet(*EXECUTORCH_LOGGERS):  # load_engine has words for it
            importlib.import_module(GRAPH_MODULES[manifest.backend])
    before, started = resident(), time.perf_counter()
    engine = load_engine(bundle, manifest, threads)
    seconds = [time.perf_counter() - started]
    loaded = resident()
    room = manifest.max_seq_len
    prompt = [(7 + 31 * i) % manifest.vocab_size for i in range(min(PROMPT, room - 1))]
    tokens = list(generate(engine, prompt, Options(NEW_TOKENS, manifest.default_draft_tokens), Stats()))
    generated = resident()
    until = time.perf_counter() + SECONDS
    while len(seconds) < LOADS and time.perf_counter() + max(seconds) < until:
        del engine
        gc.collect()
        started = time.perf_counter()
        engine = load_engine(bundle, manifest, threads)
        seconds.append(time.perf_counter() - started)
    return {
        "seconds": seconds,
        "resident": {
            "before": before,
            "loaded": grown(before, loaded),
            "generated": grown(before, generated),
            "generated_tokens": len(tokens),
        },
        "torch_imported": "torch" in sys.modules,
    }


def footprint(bundle: Path, threads: int) -> dict[str, Any]:
    """Load time and memory, from this module in a process that has imported nothing else.

    Raises:
        InputError: the bundle cannot be loaded.
    """
    command = [sys.executable, "-m", "exporter.bench.footprint", str(bundle), str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        facts = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError) as error:
        reason = (done.stderr.strip() or f"exit {done.returncode}").splitlines()[-1]
        raise InputError(f"{bundle}: cannot be loaded in a process of its own ({reason})") from error
    if "error" in facts:
        raise InputError(facts["error"])
    return {**facts, "seconds": spread(facts["seconds"])}


if __name__ == "__main__":
    try:
        print(json.dumps(measure(Path(sys.argv[1]), int(sys.argv[2]))))
    except InputError as error:
        print(json.dumps({"error": str(error)}))
