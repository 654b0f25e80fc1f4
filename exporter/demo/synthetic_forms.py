"""Random weights in the forms that Google publishes: bfloat16, on the grid of Q4_0, and packed for mobile QAT.

Of each kind of number, one sequence is drawn, and each tensor repeats it from a random place on. Lengths of sequences
are prime numbers, of groups for Q4_0, larger than the rows of any table, so all rows of a tensor differ.
"""

import re
from collections.abc import Iterator, Mapping
from functools import partial
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from exporter.checkpoint.names import HEAD, TARGET_PREFIXES
from exporter.demo.shards import TensorToWrite
from exporter.modeling.config import TextConfig
from exporter.quantization.numbers import pack
from exporter.quantization.widths import QAT_GROUP_SIZE

PERIOD_VALUES = 2**24 - 3  # a prime number
PERIOD_GROUPS = 2**19 - 1  # likewise
PERIOD_BYTES = 2**22 - 3  # likewise
FORMS = ("bf16", "qat-q4_0", "qat-mobile")
NOT_CONVERTED = ("per_layer_model_projection", "vision_tower", "audio_tower", "embed_vision", "embed_audio")
# Of the packed form: bits by patterns of modules, as E2B and E4B publish them; the first that matches decides.
MLPS_OF_4_BITS = {35: r"(\d|1[0-4])", 42: r"(\d|1\d)"}  # by the number of layers
TABLES = ("embed_tokens", "embed_tokens_per_layer")


class Values:
    """Sequences of random numbers, and tensors made of them.

    Attributes:
        generator: draws where a tensor begins.
    """

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator
        self._normal = torch.randn(PERIOD_VALUES, generator=generator).bfloat16()
        self._packed: dict[int, np.ndarray] = {}

    def normal(self, shape: tuple[int, ...], mean: float, std: float) -> TensorToWrite:
        """Return a bfloat16 tensor of normally distributed numbers."""
        start = self._start(PERIOD_VALUES)
        return TensorToWrite("BF16", shape, partial(self._normal_pieces, start, prod(shape), mean, std))

    def q4_0(self, shape: tuple[int, ...], std: float) -> TensorToWrite:
        """Return a bfloat16 tensor [rows, columns] on the grid of Q4_0: 4-bit integers times a float16 for each 32."""
        start = self._start(PERIOD_GROUPS)
        return TensorToWrite("BF16", shape, partial(self._q4_0_pieces, start, prod(shape) // QAT_GROUP_SIZE, std))

    def packed(self, shape: tuple[int, ...], bits: int, std: float, groups: int = 1) -> tuple[TensorToWrite, ...]:
        """Return packed integers [rows, bytes] and float32 scales [rows, groups] of a matrix [rows, columns].

        Args:
            shape: rows and columns.
            bits: bits of a number.
            std: standard deviation of the matrix.
            groups: scales of a row.
        """
        rows, columns = shape
        row_bytes = columns * bits // 8
        if bits not in self._packed:
            # Steps are a third of the standard deviation, or more than all of it where there are but four integers.
            step = {2: 1.0, 4: 0.36, 8: 0.03}[bits]
            drawn = (self._normal[: PERIOD_BYTES * (8 // bits)].float() / step).round()
            drawn = drawn.clamp(-(2 ** (bits - 1)) + 1, 2 ** (bits - 1) - 1).to(torch.int8).view(1, -1)
            self._packed[bits] = drawn[0].numpy() if bits == 8 else pack(drawn, bits)[0]
        numbers = partial(_repeated, self._packed[bits], self._start(PERIOD_BYTES), rows * row_bytes)
        unit = std * {2: 1.05, 4: 0.36, 8: 0.03}[bits]
        scales = partial(self._scales, self._start(PERIOD_VALUES), rows * groups, unit)
        dtype = "I8" if bits == 8 else "U8"
        return TensorToWrite(dtype, (rows, row_bytes), numbers), TensorToWrite("F32", (rows, groups), scales)

    def _start(self, period: int) -> int:
        return int(torch.randint(period, (), generator=self.generator))

    def _normal_pieces(self, start: int, count: int, mean: float, std: float) -> Iterator[np.ndarray]:
        for part in _repeated(self._normal, start, count):
            piece = part * std
            yield _bytes(piece + mean if mean else piece)

    def _q4_0_pieces(self, start: int, groups: int, std: float) -> Iterator[np.ndarray]:
        rows = self._normal[: PERIOD_GROUPS * QAT_GROUP_SIZE].view(-1, QAT_GROUP_SIZE)
        for part in _repeated(rows, start, groups):
            for block in part.float().split(1 << 15):  # few at a time, because they are float32
                largest = block.gather(1, block.abs().argmax(1, keepdim=True))
                scale = (largest * std / -8).half().float()
                yield _bytes(((block * std / scale).round().clamp(-8, 7) * scale).bfloat16())

    def _scales(self, start: int, count: int, unit: float) -> Iterator[np.ndarray]:
        for part in _repeated(self._normal, start, count):
            yield (unit * (1 + part.float().clamp(-3, 3) / 16)).numpy()


def _repeated(values: Any, start: int, count: int) -> Iterator[Any]:
    """Yield `count` numbers or rows of a sequence that begins again at its end."""
    while count:
        piece = values[start : start + count]
        start, count = 0, count - len(piece)
        yield piece


def _bytes(values: Tensor) -> np.ndarray:
    return values.contiguous().view(torch.int16).numpy()  # numpy has no bfloat16


def mobile_patterns(config: TextConfig) -> dict[str, int]:
    """Return the bits of the mobile form by patterns of modules, in their order."""
    first = MLPS_OF_4_BITS.get(config.num_hidden_layers, r"\d+")
    return {
        r"^lm_head$": 2,
        r"language_model\.embed_tokens$": 2,
        r"language_model\.embed_tokens_per_layer$": 4,
        rf"language_model\.layers\.{first}\.mlp\.": 4,
        r"language_model\.layers\.\d+\.mlp\.": 2,
        r"per_layer_input_gate$": 8,
        r"per_layer_projection$": 8,
        r"self_attn\.": 4,
    }


def mobile_config(config: TextConfig) -> dict[str, Any]:
    """Return what config.json has for the mobile form beside what it has for others."""
    patterns = {pattern: {"num_bits": bits} for pattern, bits in mobile_patterns(config).items()}
    settings = {"quant_method": "gemma", "num_bits": 4, "quantize_embeddings": True, "module_quant_configs": patterns}
    return {
        "quantization_config": {**settings, "modules_to_not_convert": list(NOT_CONVERTED)},
        "tie_word_embeddings": False,
    }


def mobile_tensors(
    values: Values, config: TextConfig, shapes: Mapping[str, tuple[int, ...]], stds: Mapping[str, float]
) -> dict[str, TensorToWrite]:
    """Return the packed matrices of a target by their names in the checkpoint, the head equal to the embedding.

    Args:
        values: draws them.
        config: the target.
        shapes: shapes of its matrices by the names of its parameters.
        stds: their standard deviations.
    """
    tensors, patterns = {}, mobile_patterns(config)
    for name, shape in shapes.items():
        module = TARGET_PREFIXES[0] + name.removesuffix(".weight")
        if module.endswith(NOT_CONVERTED):
            tensors[f"{module}.weight"] = values.normal(shape, 0.0, stds[name])
            continue
        bits = next(bits for pattern, bits in patterns.items() if re.search(pattern, module))
        groups = config.num_hidden_layers if module.endswith("per_layer") else 1
        numbers, scales = values.packed(shape, bits, stds[name], groups)
        if module.endswith(TABLES):
            tensors |= {f"{module}.embedding_quantized": numbers, f"{module}.embedding_scale": scales}
        else:
            tensors |= {f"{module}.weight": numbers, f"{module}.weight_scale": scales} | _uncalibrated(module)
        if module.endswith("embed_tokens"):
            head = HEAD.removesuffix(".weight")
            tensors |= {f"{head}.weight": numbers, f"{head}.weight_scale": scales} | _uncalibrated(head)
    # Bytes last: what follows them in a file would not be aligned.
    return dict(sorted(tensors.items(), key=lambda item: item[1].dtype in ("U8", "I8")))


def _uncalibrated(module: str) -> dict[str, TensorToWrite]:
    """Scales of activations that mean that nothing is rounded: none fit random weights."""
    zero = TensorToWrite("F32", (), lambda: [np.zeros(1, np.float32)])
    return {f"{module}.{end}_activation_scale": zero for end in ("input", "output")}
