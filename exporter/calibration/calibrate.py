"""Calibrate a target: run texts through it layer by layer, and round each matrix by the inputs that it meets."""

import platform
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from exporter.calibration.steps import Steps
from exporter.checkpoint.pair import Calibrated, Pair
from exporter.checkpoint.tensors import IntegerReader, row_blocks
from exporter.graphs.grids import off_grid
from exporter.graphs.parts import GraphParts, graph_parts
from exporter.graphs.tables import EMBEDDING, PER_LAYER, PER_LAYER_SCALES
from exporter.modeling.layers import Ops
from exporter.modeling.target import Target, TargetPass, empty_kv
from exporter.modeling.weights import set_parameter
from exporter.quantization.numbers import Quantized, Scales, fitting_width, quantize
from exporter.quantization.recipes import RECIPES
from exporter.quantization.second_order import Inputs, add_products, part_columns, quantize_for
from exporter.quantization.widths import FLOAT, Width
from exporter.texts.token_texts import TokenTexts
from runtime_ref.errors import InputError
from runtime_ref.manifest import Progress

PROJECTION = "per_layer_model_projection.weight"

# Matrices with the same inputs as another of their layer, whose sums serve for both.
SAME_INPUTS = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}


def calibrate(
    pair: Pair,
    recipe: str,
    allowed: Scales,
    texts: TokenTexts,
    directory: Path,
    progress: Progress = lambda *_: None,
) -> Pair:
    """Round the target's matrices of 4 bits that lie on no grid so that the texts change least.

    Layer by layer: the texts run through the layer in float32 on what the rounded layers before it give, its matrices
    are rounded, and the texts run through the rounded layer.

    Args:
        pair: the target and its drafter.
        recipe: a key of `RECIPES`.
        allowed: which scales the backend can store.
        texts: token ids.
        directory: where finished steps are kept; the pair that is returned reads from it.
        progress: called with the name of each matrix and its bytes in float32.

    Returns:
        The same pair, with the integers and scales of these matrices in the place of their floats; as it was if there
        are none.

    Raises:
        InputError: the texts lead to numbers that are not finite.
    """
    part = graph_parts(pair, RECIPES[recipe])["target"]
    if not (widths := off_grid(part)):
        return pair
    key = {
        "versions": [version("gemma-mtp-export"), torch.__version__],
        "machine": [platform.machine(), torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()],
        "recipe": recipe,
        "scales": str(allowed),
        "texts": texts.sha256,
        "target": asdict(pair.target),
        "files": pair.target_checkpoint.stamps,
    }
    steps = Steps.open(directory, key)
    run = _Run(pair, recipe, part, widths, allowed, steps, progress)
    found: dict[str, IntegerReader] = {}
    with torch.no_grad():
        for step, names in run.steps(texts):
            found |= {name: IntegerReader(partial(steps.blocks, step, name)) for name in names}
    calibrated = Calibrated(texts.source, texts.sha256, texts.num_tokens, torch.get_num_threads(), tuple(sorted(found)))
    return replace(pair, target_weights={**pair.target_weights, **found}, calibrated=calibrated)


class _Run:
    """A calibration of one target: its module, of which one layer's weights at a time are in memory."""

    def __init__(
        self,
        pair: Pair,
        recipe: str,
        part: GraphParts,
        widths: Mapping[str, Width],
        allowed: Scales,
        done: Steps,
        progress: Progress,
    ) -> None:
        self.pair, self.recipe, self.part, self.widths = pair, recipe, part, widths
        self.allowed, self.done, self.progress = allowed, done, progress
        with torch.device("meta"):
            self.target = Target(pair.target, Ops(linear=self._linear)).eval()
        self.names: dict[int, str] = {}  # of the module's weights, by id
        self.grams: dict[str, list[Tensor]] = {}  # sums of products of inputs, by name, while they are collected

    def steps(self, texts: TokenTexts) -> Iterator[tuple[str, list[str]]]:
        """Yield the name of each step and its calibrated matrices, once they are written."""
        layers = [f"layers.{i}." for i in range(self.pair.target.num_hidden_layers)]
        in_memory = [name for name in self.part.weights if not name.startswith("layers.")]
        self._set([name for name in in_memory if name not in (EMBEDDING, "suppressed")])
        yield "projection", self._step("projection", [PROJECTION], lambda: self._begin(texts))
        passes = self._begin(texts)
        for i, prefix in enumerate(layers):
            names = [name for name in self.part.weights if name.startswith(prefix)]
            self._set(names)
            yield f"layer-{i}", self._step(f"layer-{i}", names, partial(self._run_layer, i, passes, False))
            self._run_layer(i, passes, True)
            self._drop_kv(i, passes)
            for name in names:
                set_parameter(self.target, name, None)
        yield "embedding", self._step("embedding", [EMBEDDING], lambda: self._collect_states(passes))

    def _begin(self, texts: TokenTexts) -> list[TargetPass]:
        """The passes of all texts before the first layer."""
        first, passes = torch.zeros(1, dtype=torch.int64), []
        mapped = self.pair.mapped_target_weights
        tables = mapped[EMBEDDING](), mapped[PER_LAYER]()
        for text in texts.texts:
            kv = empty_kv(self.pair.target, len(text))
            passes.append(self.target.begin(*self._embedding_rows(text, *tables), first, first, kv))
        return passes

    def _drop_kv(self, i: int, passes: list[TargetPass]) -> None:
        """Free a layer's K and V if no later layer reads them."""
        config = self.pair.target
        if i < config.num_kv_layers and config.kv_source(config.layer_types[i]) != i:
            for text in passes:
                text.kv[2 * i] = text.kv[2 * i + 1] = torch.empty(0)

    def _run_layer(self, i: int, passes: list[TargetPass], move_on: bool) -> None:
        """Run a layer on all texts, whose passes either move on or stay where they are."""
        for text in passes:
            self.target.run_layer(i, text if move_on else replace(text, kv=list(text.kv)))

    def _step(self, step: str, names: list[str], run: Callable[[], object]) -> list[str]:
        """Round the matrices of a step, unless an earlier run did, and give the module their rounded values."""
        wanted = {name: self.widths[name] for name in names if name in self.widths}
        rounded = self.done.read(step) if wanted else {}
        if rounded is None:
            self.grams = {_collected_for(n): _empty_grams(self.part.shapes[n], w) for n, w in wanted.items()}
            run()
            inputs = {name: self._inputs(name, self.grams.pop(name)) for name in list(self.grams)}
            rounded = {n: self._round(n, width, inputs[_collected_for(n)]) for n, width in wanted.items()}
            self.done.write(step, rounded)
        else:
            self.progress(step, sum(4 * matrix.numbers.numel() for matrix in rounded.values()))
        if step != "embedding":  # no text runs through the head
            for name in names:
                if name in self.part.widths:
                    matrix = rounded[name] if name in rounded else self.part.whole(name, self.allowed)
                    assert isinstance(matrix, Quantized)
                    self._put(name, matrix.dequantize())
        return list(rounded)

    def _inputs(self, name: str, grams: list[Tensor]) -> Inputs:
        if not all(gram.isfinite().all() for gram in grams):
            directory = self.pair.target_checkpoint.directory
            raise InputError(
                f"{directory}: the texts of the calibration give {name} inputs that are not finite; restore the"
                " checkpoint, or pass --no-calibrate"
            )
        return Inputs.of(grams)

    def _round(self, name: str, width: Width, inputs: Inputs) -> Quantized:
        blocks = []
        for block in row_blocks(self.part.weights[name]):
            blocks.append(quantize_for(block, inputs, width, self.allowed))
            self.progress(name, 4 * block.numel())
        return Quantized.join(blocks)

    def _linear(self, x: Tensor, weight: Tensor) -> Tensor:
        if (grams := self.grams.get(self.names[id(weight)])) is not None:
            add_products(grams, x)
        return F.linear(x, weight)

    def _collect_states(self, passes: list[TargetPass]) -> None:
        for text in passes:
            add_products(self.grams[EMBEDDING], self.target.norm(text.x))

    def _set(self, names: list[str]) -> None:
        self.names.clear()
        for name in names:
            self._put(name, self.part.weights[name]())

    def _put(self, name: str, value: Tensor) -> None:
        set_parameter(self.target, name, value)
        self.names = {i: other for i, other in self.names.items() if other != name}
        self.names[id(self.target.get_parameter(name))] = name

    def _embedding_rows(self, text: tuple[int, ...], *tables: Tensor) -> tuple[Tensor, Tensor]:
        """Scaled rows [T, E] and [T, layers*P] of a text, rounded to the nearest, as a bundle's are nearly."""
        ids, target = torch.tensor(text), self.target
        embedded, per_layer = (table[ids].float() for table in tables)
        if (width := self.part.widths.get(EMBEDDING)) is not None:
            embedded = quantize(embedded, fitting_width(width, embedded), self.allowed).dequantize()
        if (width := RECIPES[self.recipe].per_layer) != FLOAT:
            width = Width(width.bits, self.pair.target.hidden_size_per_layer_input)
            per_layer = quantize(per_layer, width, PER_LAYER_SCALES).dequantize()
        return target.embed_tokens.scaled(embedded), target.embed_tokens_per_layer.scaled(per_layer)


def _collected_for(name: str) -> str:
    """The matrix whose inputs are collected for this one: itself, or another of its layer with the same inputs."""
    leaf = name.split(".")[-2]
    return name.replace(leaf, SAME_INPUTS.get(leaf, leaf))


def _empty_grams(shape: tuple[int, ...], width: Width) -> list[Tensor]:
    columns = shape[1]
    size = part_columns(columns, width.group_size)
    return [torch.zeros(size, size) for _ in range(columns // size)]
