"""Measure what each class of the target's matrices costs in each width, with one pass of texts through its layers."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from math import prod
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from exporter.calibration.divergence import RunningDivergence
from exporter.calibration.kept_costs import KeptCosts
from exporter.calibration.layer_by_layer import PROJECTION, LayerByLayer
from exporter.calibration.steps import key_of
from exporter.checkpoint.names import EMBEDDING
from exporter.checkpoint.names import PER_LAYER as PER_LAYER_WEIGHT
from exporter.checkpoint.pair import Pair
from exporter.checkpoint.tensors import IntegerReader, row_blocks
from exporter.graphs.backend import Backend
from exporter.graphs.grids import GRID_BITS
from exporter.graphs.parts import fitted_width, graph_parts, sample_rows
from exporter.graphs.tables import table_bytes
from exporter.modeling.target import OWN_HEAD, SUPPRESSED_LOGIT, TargetPass
from exporter.quantization.numbers import Quantized, Scales, fitting_width, lies_on_grid, quantize
from exporter.quantization.recipes import PER_LAYER_TABLE, RECIPES, Recipe, Rule, dividing
from exporter.quantization.second_order import BLOCK_ROWS, Inputs, quantize_for
from exporter.quantization.widths import BITS_OF_TABLE, FLOAT, QAT_GROUP_SIZE, Width
from exporter.texts.token_texts import TokenTexts
from runtime_ref.errors import InputError
from runtime_ref.manifest import Progress

TABLE, BOTH, HEAD, ROWS = "per-layer embeddings", "embedding and head", "head", "embedding"
# Patterns of recipes by the class of matrices, for people; the first that matches decides. A target has either `BOTH`,
# or a head of its own, and then its embedding is a table of rows.
CLASSES = {
    TABLE: PER_LAYER_TABLE,
    BOTH: f"target.{EMBEDDING}",
    HEAD: f"target.{OWN_HEAD}",
    ROWS: f"target.{EMBEDDING}",
    "queries, keys, values": "target.layers.*.self_attn.[qkv]_proj.weight",
    "attention outputs": "target.layers.*.self_attn.o_proj.weight",
    "MLP outputs": "target.layers.*.mlp.down_proj.weight",
    "MLP gates": "target.layers.*.mlp.*_proj.weight",
    "per-layer inputs": "target.*per_layer_*.weight",
}
WIDTHS_OF_MATRICES = (Width(4, 128), Width(4, 32), Width(8))
WIDTHS_OF_TABLE = tuple(width for width in BITS_OF_TABLE if width != FLOAT and width.group_size is None)
MAX_POSITIONS = 512  # that are compared, because each candidate runs over all of them


@dataclass(frozen=True)
class Cost:
    """What it costs to store one class of matrices in a width, all others in float32.

    Attributes:
        matrices: name of the class, a key of `CLASSES`.
        width: the width; matrices that it does not divide take groups of 32, or 8 bits.
        bytes: of the class in a bundle.
        kl: mean over positions of KL(float32 || rounded) of the next token, in nats.
        choices_kept: fraction of positions at which both choose the same token.
    """

    matrices: str
    width: Width
    bytes: int
    kl: float
    choices_kept: float


def check_measurable(pair: Pair) -> None:
    """Check that bits of a target can be chosen.

    Raises:
        InputError: its checkpoint has integers of its own.
    """
    packed = next((name for name, read in pair.checkpoint_weights.items() if isinstance(read, IntegerReader)), None)
    if packed is not None:
        raise InputError(
            f"{pair.target_checkpoint.directory}: has integers of its own, such as {packed}; bits are measured for"
            " floats alone; pass --recipe auto, another name or a file"
        )


def candidates(own_head: bool = False) -> list[tuple[str, Width]]:
    """Return the classes and widths that are measured, of a target with a head of its own or without."""
    titles = [title for title in CLASSES if title not in ((BOTH,) if own_head else (HEAD, ROWS))]
    return [(title, w) for title in titles for w in (WIDTHS_OF_TABLE if title == TABLE else WIDTHS_OF_MATRICES)]


def smallest_bytes(pair: Pair, backend: Backend) -> int:
    """Return the bytes of the target's matrices in the fewest bits, as far as their shapes decide."""
    shapes = {n: s for n, s in graph_parts(pair, RECIPES["fp32"])["target"].shapes.items() if len(s) == 2}
    total = 0
    for name, widths in ((PER_LAYER_WEIGHT, WIDTHS_OF_TABLE), (EMBEDDING, WIDTHS_OF_MATRICES)):
        if name != pair.head:
            del shapes[name]
            total += min(table_bytes(pair, name, width) for width in widths)
    least = (min(backend.matrix_bytes(s, _dividing(w, s[1])) for w in WIDTHS_OF_MATRICES) for s in shapes.values())
    return total + sum(least)


def _dividing(width: Width, columns: int) -> Width:
    """How a matrix of so many columns is stored that asks for no group size."""
    width = dividing(width, columns)
    return Width(width.bits, QAT_GROUP_SIZE) if width.group_size and columns % width.group_size else width


@torch.no_grad()
def measure_costs(
    pair: Pair,
    backend: Backend,
    held_out: TokenTexts,
    texts: TokenTexts | None,
    progress: Progress = lambda *_: None,
    directory: Path | None = None,
) -> tuple[list[Cost], int]:
    """Measure the divergence that each class of matrices causes in each width.

    All candidates run beside the unrounded target, layer by layer, so that each weight is read once; each
    of an embedding that is the head in a pass of its own after them.

    Args:
        pair: the target and its drafter.
        backend: decides scales and bytes.
        held_out: texts to compare on; only their beginnings, `MAX_POSITIONS` tokens in all.
        texts: texts to calibrate matrices of 4 bits on that lie on no grid, by the inputs of the unrounded target; None
            to round to the nearest.
        progress: called with what was done and its bytes in float32, in all `bytes_to_measure`.
        directory: where to keep how far it is, for a killed run to go on from; None to keep nothing.

    Returns:
        A cost for each of `candidates`, and the number of positions that were compared.

    Raises:
        InputError: the texts lead to numbers that are not finite.
    """
    run = _Candidates(pair, backend, held_out, texts)
    key = {"held_out": run.held_out, "texts": None if texts is None else texts.sha256}
    kept = KeptCosts.open(directory, key | {"suppressed": pair.tokens.suppressed} | key_of(pair, run.allowed))
    done = kept.read_passes(run.passes)
    for i in range(run.model.num_layers):
        names = run.model.layer_weights(i)
        if i >= done:
            run.run_layer(i, names)
            kept.write_passes(i + 1, run.passes)
        progress(f"layer {i}", sum(4 * prod(run.part.shapes[name]) for name in names))
    costs = run.costs(kept, progress)
    if wrong := [cost for cost in costs if not math.isfinite(cost.kl)]:
        raise InputError(
            f"{pair.target_checkpoint.directory}: logits are not finite with {wrong[0].matrices} in {wrong[0].width};"
            " restore the checkpoint"
        )
    return costs, sum(map(len, run.held_out))


def bytes_to_measure(pair: Pair) -> int:
    """Return the total of the bytes that `measure_costs` calls its `progress` with."""
    shapes = graph_parts(pair, RECIPES["fp32"])["target"].shapes
    layers = sum(prod(shape) for name, shape in shapes.items() if name.startswith("layers."))
    return 4 * (layers + len(WIDTHS_OF_MATRICES) * prod(shapes[pair.head]))


def memory_to_measure(pair: Pair, num_tokens: int) -> int:
    """Return about how many bytes of memory `measure_costs` takes to calibrate on so many tokens."""
    shapes, config = graph_parts(pair, RECIPES["fp32"])["target"].shapes, pair.target
    layers = [f"layers.{i}." for i in range(config.num_hidden_layers)]
    largest = max(sum(prod(s) for name, s in shapes.items() if name.startswith(layer)) for layer in layers)
    columns = max(shape[1] for name, shape in shapes.items() if name.startswith("layers.") and len(shape) == 2)
    of_token = config.hidden_size + config.num_hidden_layers * config.hidden_size_per_layer_input
    # Beside the layer its rounded matrices, ten numbers for each that is rounded at a time, and the passes.
    return 4 * (2 * largest + 10 * BLOCK_ROWS * columns + (num_tokens + 8 * MAX_POSITIONS) * of_token)


def _class_of(name: str) -> str:
    """The class of a matrix of the target, by its parameter's name."""
    return next(title for title, pattern in CLASSES.items() if fnmatchcase(f"target.{name}", pattern))


def _name(key: tuple[str, Width]) -> str:
    """A candidate's name, for people and in files."""
    return f"{key[0]} in {key[1]}"


def _rows(matrix: Quantized, rows: slice) -> Quantized:
    return Quantized(matrix.numbers[rows], matrix.scales[rows], matrix.bits)


class _Candidates:
    """The passes of the unrounded target, and those of each candidate."""

    def __init__(self, pair: Pair, backend: Backend, held_out: TokenTexts, texts: TokenTexts | None) -> None:
        self.pair, self.backend, self.allowed = pair, backend, backend.supported_scales()
        self.part = graph_parts(pair, RECIPES["fp32"])["target"]
        self.model = LayerByLayer(pair, self.part)
        self.fitting: dict[tuple[str, Width], Width] = {}  # how each matrix would be stored
        size = max(1, MAX_POSITIONS // len(held_out.texts))
        self.held_out = [text[:size] for text in held_out.texts[:MAX_POSITIONS]]
        self.texts = () if texts is None else texts.texts
        self.inputs = self._inputs([PROJECTION], lambda: self._begin(self.texts))
        self.fitted_on, self.exact = self._begin(self.texts), self._begin(self.held_out)
        self.candidates = candidates(pair.head != EMBEDDING)
        self.rounded = {key: self._begin_rounded(*key) for key in self.candidates if key[0] not in (BOTH, HEAD)}

    @property
    def passes(self) -> dict[str, list[TargetPass]]:
        """All passes by name."""
        rounded = {_name(key): passes for key, passes in self.rounded.items()}
        return {"exact": self.exact, "fitted on": self.fitted_on, **rounded}

    def run_layer(self, i: int, names: list[str]) -> None:
        """Run a layer on all passes."""
        model = self.model
        model.load(names)
        matrices = [name for name in names if len(self.part.shapes[name]) == 2]
        self.inputs = self._inputs(matrices, lambda: model.run_layer(i, self.fitted_on, False))
        for (title, width), passes in self.rounded.items():
            changed = {name: model.target.get_parameter(name).data for name in matrices if _class_of(name) == title}
            for name in changed:
                model.put(name, self._rounded(name, width).dequantize())
            model.run_layer(i, passes)
            for name, unrounded in changed.items():
                model.put(name, unrounded)
        for passes in (self.exact, self.fitted_on):
            model.run_layer(i, passes)
        for passes in (self.exact, self.fitted_on, *self.rounded.values()):
            model.drop_kv(i, passes)
        model.unload(names)

    def costs(self, kept: KeptCosts, progress: Progress) -> list[Cost]:
        """Compare the logits of all candidates with those of the unrounded target, after the last layer."""
        name = self.pair.head
        self.inputs = self._inputs([name], lambda: self.model.collect_states(self.fitted_on))
        self.fitted_on = []
        found, half = kept.read_costs() or self._compared(self.rounded), 2 * prod(self.part.shapes[name])
        heads = [key for key in self.candidates if key not in self.rounded]
        self.rounded = {}
        kept.write_costs(found)
        for key in heads:
            if _name(key) in found:
                progress(_name(key), 2 * half)
            else:
                found |= self._cost_of_head(key, progress)
                kept.write_costs(found)
                progress(f"logits of {_name(key)}", half)
        return [Cost(*key, self._bytes(*key), *found[_name(key)]) for key in self.candidates]

    def _cost_of_head(self, key: tuple[str, Width], progress: Progress) -> dict[str, tuple[float, float]]:
        """Round the head, the largest matrix of most targets, and compare its logits."""
        name = self.pair.head
        head = self._rounded(name, key[1])
        progress(_name(key), 2 * prod(self.part.shapes[name]))
        passes = self._begin(self.held_out, head) if name == EMBEDDING else self.exact
        if name == EMBEDDING:
            self._run_layers(passes, progress)
        return self._compared({key: passes}, head)

    def _run_layers(self, passes: list[TargetPass], progress: Progress) -> None:
        """Run all layers on the passes of a rounded embedding, which is known once the states before the head are."""
        for i in range(self.model.num_layers):
            names = self.model.layer_weights(i)
            self.model.load(names)
            self.model.run_layer(i, passes)
            self.model.drop_kv(i, passes)
            self.model.unload(names)
            progress(f"layer {i} after a rounded embedding", 0)

    def _compared(
        self, passes: Mapping[tuple[str, Width], list[TargetPass]], head: Quantized | None = None
    ) -> dict[str, tuple[float, float]]:
        """KL and kept choices of the logits after passes, by a rounded head if one is given, by candidates' names."""
        exact, states = self._states(self.exact), {key: self._states(run) for key, run in passes.items()}
        sums = {key: RunningDivergence(len(exact)) for key in states}
        suppressed, start = torch.tensor(self.pair.tokens.suppressed, dtype=torch.int64), 0
        for rows in row_blocks(self.part.weights[self.pair.head]):
            block = slice(start, start + len(rows))
            here = suppressed[(suppressed >= block.start) & (suppressed < block.stop)] - start
            expected = self._logits(exact, rows, here)
            rounded = rows if head is None else _rows(head, block).dequantize()
            for key, running in sums.items():
                running.add(expected, self._logits(states[key], rounded, here))
            start = block.stop
        return {_name(key): (running.kl, running.choices_kept) for key, running in sums.items()}

    def _begin(
        self, texts: Sequence[tuple[int, ...]], embedding: Quantized | None = None, *rules: Rule
    ) -> list[TargetPass]:
        return self.model.begin(texts, embedding, Recipe("", rules), self.allowed)

    def _begin_rounded(self, title: str, width: Width) -> list[TargetPass]:
        """The passes of a candidate before the first layer."""
        if title in (TABLE, ROWS):
            return self._begin(self.held_out, None, Rule(CLASSES[title], width))
        if title != _class_of(PROJECTION):
            return [replace(text, kv=list(text.kv)) for text in self.exact]
        self.model.put(PROJECTION, self._rounded(PROJECTION, width).dequantize())
        passes = self._begin(self.held_out)
        self.model.load([PROJECTION])
        return passes

    def _inputs(self, names: list[str], run: Callable[[], object]) -> dict[str, Inputs]:
        """What matrices are multiplied with in the texts to fit on; nothing without them."""
        return self.model.inputs(dict.fromkeys(names, WIDTHS_OF_MATRICES[0]), run) if self.texts else {}

    def _rounded(self, name: str, width: Width) -> Quantized:
        """A matrix as an export would round it, by the inputs of the unrounded target."""
        blocks, inputs = row_blocks(self.part.weights[name]), self.inputs.get(name)
        first = next(blocks)
        rows = sample_rows(first)
        fitting = self.fitting[name, width] = fitting_width(dividing(width, first.shape[1]), rows)
        if inputs is not None and fitting.bits == GRID_BITS and not lies_on_grid(rows, fitting):
            rounded = partial(quantize_for, inputs=inputs, width=fitting, allowed=self.allowed)
        else:
            rounded = partial(quantize, width=fitting, allowed=Scales() if fitting.bits == 8 else self.allowed)
        return Quantized.gather(map(rounded, itertools.chain([first], blocks)), self.part.shapes[name][0])

    def _fitting(self, name: str, width: Width) -> Width:
        """How a matrix would be stored, which is read from the checkpoint if a run before this one rounded it."""
        if (name, width) not in self.fitting:
            widths = {name: dividing(width, self.part.shapes[name][1])}
            self.fitting[name, width] = fitted_width(replace(self.part, widths=widths), name)
        return self.fitting[name, width]

    def _states(self, passes: list[TargetPass]) -> Tensor:
        return torch.cat([self.model.target.norm(text.x) for text in passes])

    def _logits(self, states: Tensor, rows: Tensor, suppressed: Tensor) -> Tensor:
        cap, logits = self.pair.target.final_logit_softcapping, F.linear(states, rows.float())
        logits = logits if cap is None else torch.tanh(logits / cap) * cap
        logits[:, suppressed] = SUPPRESSED_LOGIT
        return logits

    def _bytes(self, title: str, width: Width) -> int:
        if title in (TABLE, ROWS):
            return table_bytes(self.pair, PER_LAYER_WEIGHT if title == TABLE else EMBEDDING, width)
        names = [name for name, shape in self.part.shapes.items() if len(shape) == 2 and _class_of(name) == title]
        return sum(self.backend.matrix_bytes(self.part.shapes[n], self._fitting(n, width)) for n in names)
