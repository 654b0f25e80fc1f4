"""Engine on ONNX Runtime: a target and a drafter graph over KV buffers that both are bound to."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from runtime_ref.acceptance import accept
from runtime_ref.engine import Round
from runtime_ref.errors import InputError
from runtime_ref.manifest import Graph, Manifest
from runtime_ref.sampling import Sampling, choose

PREFILL_CHUNK = 128  # tokens a pass: bounds the attention scores, which grow with tokens times cache rows
CACHE_STEP = 256  # rows the cache grows by: short texts stay small, and growing is too rare to matter


class OnnxEngine:
    """Runs a bundle of backend `onnx`; the cache starts small and grows up to `max_seq_len`."""

    def __init__(self, bundle: Path, manifest: Manifest, threads: int | None = None) -> None:
        self.manifest = manifest
        self.position = 0
        self._state = np.zeros((1, manifest.hidden_size), np.float32)
        self._rows = 0
        self.cache: dict[str, np.ndarray] = {
            kv.name: np.zeros((kv.num_key_value_heads, 0, kv.head_dim), np.float32) for kv in manifest.kv
        }
        self._target = _BoundGraph(bundle, manifest.graphs["target"], threads)
        self._drafter = _BoundGraph(bundle, manifest.graphs["drafter"], threads)

    def prefill(self, tokens: Sequence[int], sampling: Sampling) -> int:
        self.position = 0
        for start in range(0, len(tokens), PREFILL_CHUNK):
            chunk = tokens[start : start + PREFILL_CHUNK]
            logits, ids, states = self.run_target(chunk, [len(chunk) - 1])
            self.position += len(chunk)
        self._state = states
        return choose(logits[0], ids[0], self.position, sampling)

    def round(self, last: int, num_draft_tokens: int, sampling: Sampling) -> Round:
        drafts = self.draft(last, num_draft_tokens)
        logits, ids, states = self.run_target([last, *drafts], range(len(drafts) + 1))
        choices = [choose(logits[i], ids[i], self.position + 1 + i, sampling) for i in range(len(ids))]
        accepted, tokens = accept(drafts, choices)
        # Rollback is by position alone: rejected rows are masked, and overwritten by the next pass.
        self.position += len(tokens)
        self._state = states[accepted : accepted + 1]
        return Round(drafts, accepted, tokens)

    def draft(self, last: int, num_draft_tokens: int) -> list[int]:
        """Draft tokens after `last`, from the state before it."""
        token, state, drafts = last, self._state, []
        for _ in range(num_draft_tokens):
            token, state = self.draft_step(token, state)
            drafts.append(token)
        return drafts

    def draft_step(self, token: int, state: np.ndarray) -> tuple[int, np.ndarray]:
        """One draft token and its state [1, E]; the position stays that of `last`, as it was in training."""
        position = np.array([self.position])
        draft, next_state = self._drafter.run(token=np.array([token]), state=state, position=position)
        return int(draft[0]), next_state

    def run_target(self, tokens: Sequence[int], rows: Sequence[int]) -> list[np.ndarray]:
        """Write the tokens' K/V from `position` on; return top logits, top ids and states of the given rows."""
        self._grow(self.position + len(tokens))
        return self._target.run(
            tokens=np.asarray(tokens, np.int64), position=np.array([self.position]), output_rows=np.asarray(rows)
        )

    def _grow(self, rows: int) -> None:
        """Make room for so many cache rows, keeping those there are."""
        if rows <= self._rows:
            return
        if rows > self.manifest.max_seq_len:
            raise ValueError(f"{rows} cache rows asked for, the bundle has {self.manifest.max_seq_len}")
        self._rows = -(-rows // CACHE_STEP) * CACHE_STEP
        for name, old in self.cache.items():
            self.cache[name] = np.zeros((old.shape[0], self._rows, old.shape[2]), np.float32)
            self.cache[name][:, : old.shape[1]] = old
        self._target.bind(self.cache)
        self._drafter.bind(self.cache)


class _BoundGraph:
    """A session whose cache inputs and outputs are bound to the same memory, so that writing happens in place."""

    def __init__(self, bundle: Path, graph: Graph, threads: int | None) -> None:
        self._file = bundle / graph.file
        options = ort.SessionOptions()
        options.log_severity_level = 3
        if threads is not None:
            options.intra_op_num_threads = threads
        # A spinning thread pool starves whatever shares the machine, or the phone.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            self._session = ort.InferenceSession(self._file, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's own exceptions share no base class
            reason = str(error).splitlines()[0]
            raise InputError(
                f"{bundle / graph.file}: ONNX Runtime {ort.__version__} cannot load it ({reason})"
            ) from error
        self._graph = graph
        self._binding: Any = self._session.io_binding()
        self._cache: dict[str, np.ndarray] = {}

    def bind(self, cache: dict[str, np.ndarray]) -> None:
        """Bind the cache buffers that this graph names, each to its input and, if there is one, its output."""
        self._binding = self._session.io_binding()
        self._cache = dict(cache)  # holds the memory that the binding points into
        for name in self._graph.inputs:
            if (array := cache.get(name)) is not None:
                self._binding.bind_input(name, "cpu", 0, np.float32, array.shape, array.ctypes.data)
        for name in self._graph.outputs:
            if (array := cache.get(name.removesuffix("_out"))) is not None:
                self._binding.bind_output(name, "cpu", 0, np.float32, array.shape, array.ctypes.data)

    def run(self, **inputs: np.ndarray) -> list[np.ndarray]:
        """Outputs that are not cache buffers, in the graph's order.

        Raises:
            InputError: the graph cannot run, which no sound bundle's does.
        """
        fresh = [name for name in self._graph.outputs if name.removesuffix("_out") not in self._cache]
        try:
            for name, array in inputs.items():
                self._binding.bind_cpu_input(name, array)
            for name in fresh:
                self._binding.bind_output(name, "cpu")  # anew: a bound output keeps the shape of its first run
            self._session.run_with_iobinding(self._binding)
        except Exception as error:  # onnxruntime's own exceptions share no base class
            raise InputError(f"{self._file}: cannot run ({str(error).splitlines()[0]}); export it again") from error
        # Outputs come in the order in which they were first bound: the cache, then the rest.
        return [value.numpy() for value in self._binding.get_outputs()[-len(fresh) :]]
