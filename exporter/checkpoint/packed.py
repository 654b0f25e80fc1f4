"""Read matrices that a checkpoint stores as packed integers, with their scales, as they are.

Two forms are read: Google's mobile checkpoints, as transformers 5.24.0 does (`integrations/gemma_quant.py`), and
`pack-quantized` of compressed-tensors 0.20. How many bits a number has follows from the sizes of the tensors.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from exporter.checkpoint.other_forms import is_of_towers, quantization
from exporter.checkpoint.tensors import BLOCK_BYTES, FLOAT_DTYPES, Checkpoint, IntegerReader
from exporter.quantization.numbers import Quantized, unpack
from exporter.quantization.widths import Width
from runtime_ref.errors import InputError


@dataclass(frozen=True)
class PackedForm:
    """How a quantizing tool names what it stores in the place of `X.weight`.

    Attributes:
        ends: ends of the names of the packed numbers, and of their scales, after `X`.
        dtypes: of packed numbers, by their names in safetensors.
        companions: ends of the names of what else belongs to such a matrix.
    """

    ends: Mapping[str, str]
    dtypes: tuple[str, ...]
    companions: tuple[str, ...]


# Of the mobile form: ends of names, and the parameters of `exporter.modeling.layers.Matrix`.
ACTIVATION_SCALES = {".input_activation_scale": "input_scale", ".output_activation_scale": "output_scale"}

FORMS: Mapping[str, PackedForm] = {
    "gemma": PackedForm(
        {".weight": ".weight_scale", ".embedding_quantized": ".embedding_scale"},
        ("U8", "I8"),
        (*ACTIVATION_SCALES, ".k_cache_scale", ".v_cache_scale"),  # the reference does not read the last two either
    ),
    "compressed-tensors": PackedForm({".weight_packed": ".weight_scale"}, ("I32",), (".weight_shape",)),
}


@dataclass(frozen=True)
class Packed:
    """What a checkpoint stores in the place of one matrix.

    Attributes:
        numbers: name of the tensor of packed integers: a row of bytes or of int32, the first number in the lowest bits,
            each number with half of its range added; int8 as they are.
        scales: name of the tensor of scales [rows, groups].
    """

    numbers: str
    scales: str


def find_packed(checkpoint: Checkpoint) -> tuple[dict[str, Packed], set[str]]:
    """Return the packed matrices of a checkpoint, and the names of all tensors that belong to them.

    Args:
        checkpoint: its tensors; config.json beside them says how they are packed.

    Returns:
        The matrices by the name that each would have unpacked, such as `model.layers.0.mlp.up_proj.weight`.

    Raises:
        InputError: a packed matrix has no scales, or there is none.
    """
    found = quantization(checkpoint.directory)
    form = FORMS.get(found[0]) if found else None
    if form is None:
        return {}, set()
    packed: dict[str, Packed] = {}
    names: set[str] = set()
    for name, entry in checkpoint.entries.items():
        if is_of_towers(name):
            continue  # which are not exported
        for end, scales_end in form.ends.items():
            if not name.endswith(end) or entry.dtype not in form.dtypes:
                continue
            stem = name.removesuffix(end)
            if stem + scales_end not in checkpoint.entries:
                raise InputError(
                    f"{entry.file}: tensor {name} is packed, but {stem + scales_end} is missing; restore the checkpoint"
                )
            packed[f"{stem}.weight"] = Packed(name, stem + scales_end)
            names |= {name, stem + scales_end}
    for name in checkpoint.entries:
        for stem in (name.removesuffix(end) for end in form.companions if name.endswith(end)):
            # The cache's scales belong to attention; modules in floats may have scales that nothing reads.
            if stem.endswith("self_attn") or f"{stem}.weight" in packed or f"{stem}.weight" in checkpoint.entries:
                names.add(name)
    if not packed:
        raise InputError(
            f"{checkpoint.directory}: config.json says that the checkpoint is quantized, by {found and found[0]}, but"
            " no tensor is packed; remove quantization_config, or restore the checkpoint"
        )
    return packed, names


def packed_reader(checkpoint: Checkpoint, packed: Packed, shape: tuple[int, ...], min_groups: int = 1) -> IntegerReader:
    """Return a reader of a packed matrix.

    Args:
        checkpoint: its tensors.
        packed: the tensors of the matrix.
        shape: [rows, columns] of the matrix, by config.json.
        min_groups: scales of a row that the reader gives at least; fewer are repeated.

    Raises:
        InputError: the tensors do not fit the shape.
    """
    numbers, scales = checkpoint.entries[packed.numbers], checkpoint.entries[packed.scales]
    rows, columns = shape
    sizes = {bits: _stored_columns(numbers.dtype, columns, bits) for bits in (2, 4, 8)}
    by_size: dict[tuple[int, ...], int] = {(rows, size): bits for bits, size in sizes.items() if size}
    if (bits := by_size.get(numbers.shape)) is None:
        expected = " or ".join(f"{list(size)}, packed in {bits} bits" for size, bits in by_size.items())
        raise InputError(
            f"{numbers.file}: tensor {packed.numbers} has shape {list(numbers.shape)}, expected {expected}; pass"
            " weights and a config.json of the same model"
        )
    groups = scales.shape[1] if len(scales.shape) == 2 and scales.shape[0] == rows else 0
    if not groups or columns % groups or (min_groups % groups and groups % min_groups):
        raise InputError(
            f"{scales.file}: tensor {packed.scales} has shape {list(scales.shape)}, expected {rows} rows of scales for"
            f" {columns} numbers; restore the checkpoint"
        )
    if scales.dtype not in FLOAT_DTYPES:
        raise InputError(f"{scales.file}: tensor {packed.scales} is {scales.dtype}, expected floats")

    def quantized(stored: Tensor, scale: Tensor) -> Quantized:
        scale = scale.repeat_interleave(max(1, min_groups // groups), 1)
        if stored.dtype == torch.int8:
            return Quantized(stored, scale, 8)
        return Quantized(unpack(stored.contiguous().view(torch.uint8), bits, columns), scale, bits)

    def blocks() -> Iterator[Quantized]:
        step = max(1, BLOCK_BYTES // (4 * columns))
        for stored, scale in zip(
            checkpoint.blocks(packed.numbers, step), checkpoint.blocks(packed.scales, step), strict=True
        ):
            yield quantized(stored, scale)

    def some(ids: Tensor) -> Tensor:
        stored, scale = (checkpoint.map(name)[ids] for name in (packed.numbers, packed.scales))
        return quantized(stored, scale.float()).dequantize()

    width = Width(bits, None if groups <= min_groups else columns // groups)
    return IntegerReader(blocks, width, columns // min_groups, some, partial(checkpoint.blocks, packed.scales))


def _stored_columns(dtype: str, columns: int, bits: int) -> int:
    """Numbers of its own type that a row of packed integers has; 0 if integers of so many bits are not stored so."""
    type_bits, allowed = {"I8": (8, (8,)), "U8": (8, (2, 4))}.get(dtype, (32, (2, 4, 8)))
    return -(-columns * bits // type_bits) if bits in allowed else 0


def activation_scales(checkpoint: Checkpoint, owners: Mapping[str, str]) -> dict[str, Tensor]:
    """Return the scales of the grids that a mobile checkpoint rounds inputs and outputs of its matrices to.

    Args:
        checkpoint: its tensors.
        owners: modules of `Target` by their names in the checkpoint.

    Returns:
        Scales [1] float32 by the names of parameters, such as `layers.0.mlp.up_proj.input_scale`; one of 0 means that
        nothing is rounded, and is left out.

    Raises:
        InputError: a scale is negative, or no single number.
    """
    scales = {}
    for stored, owner in owners.items():
        for end, parameter in ACTIVATION_SCALES.items():
            entry = checkpoint.entries.get(stored + end)
            if entry is None:
                continue
            is_float = entry.dtype in FLOAT_DTYPES
            scale = checkpoint.load(stored + end).reshape(-1) if is_float else torch.empty(0)
            if scale.shape != (1,) or scale < 0:
                raise InputError(
                    f"{entry.file}: tensor {stored}{end} is {scale.tolist()[:2]}, expected one number of at least 0;"
                    " restore the checkpoint"
                )
            if scale:
                scales[f"{owner}.{parameter}"] = scale
    return scales


def check_settings(directory: Path) -> None:
    """Check that the packed numbers of a checkpoint mean what this module takes them for.

    Args:
        directory: the checkpoint's directory.

    Raises:
        InputError: its config.json names another format, or numbers with zero points.
    """
    found, path = quantization(directory), directory / "config.json"
    if found is None or found[0] != "compressed-tensors":
        return
    settings = found[1]
    groups = settings.get("config_groups")
    if not isinstance(groups, dict) or settings.get("transform_config"):
        what = "no config_groups" if not isinstance(groups, dict) else "a transform_config"
        raise InputError(
            f"{path}: quantization_config has {what}, expected groups of packed weights that are not transformed; pass"
            " the unquantized sister"
        )
    fixed: dict[str, tuple[Any, ...]] = {
        "type": ("int",),
        "num_bits": (2, 4, 8),
        "symmetric": (True,),
        "actorder": (None, False, "static", "weight"),
    }
    for scheme in groups.values():
        weights = scheme.get("weights") if isinstance(scheme, dict) else None
        if not isinstance(weights, dict):
            continue
        form = scheme.get("format") or settings.get("format")
        wrong = [f"{key} {weights.get(key)!r}" for key, allowed in fixed.items() if weights.get(key) not in allowed]
        if form != "pack-quantized":
            wrong.append(f"format {form!r}")
        if scheme.get("input_activations") is not None:
            wrong.append("quantized input_activations")
        if wrong:
            raise InputError(
                f"{path}: quantization_config has {wrong[0]}, expected pack-quantized symmetric integers of weights"
                " alone, as in Google's `-qat-w4a16-ct`; pass its unquantized sister"
            )
