"""Fold factors into weights: the inputs of some matrices are divided by them, and the matrices' columns multiplied.

A norm's weights, or the rows of `up_proj`, take the division. All factors are powers of two, so every product in the
target is the same to the last bit (but for numbers beyond the range of floats), and so are its logits.
"""

import re
from collections.abc import Mapping

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from exporter.checkpoint.tensors import ScaledReader
from exporter.modeling.weights import Weights
from runtime_ref.errors import InputError

# What divides, by the end of its name in a layer, and the matrices whose inputs it gives.
SITES: Mapping[str, tuple[str, ...]] = {
    "input_layernorm.weight": ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
    "pre_feedforward_layernorm.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "mlp.up_proj.weight": ("mlp.down_proj.weight",),
}
MAX_EXPONENT = 16  # beyond it floats may overflow
FOLDING = "folding.safetensors"  # of a bundle whose weights are folded


def readers_of(site: str, weights: Weights) -> list[str]:
    """Return the matrices whose inputs a site gives, by their names.

    Args:
        site: name of a weight whose end is a key of `SITES`.
        weights: the target's; KV-shared layers have no projections for K and V.
    """
    layer, end = _split(site)
    return [f"{layer}{matrix}" for matrix in SITES[end] if f"{layer}{matrix}" in weights]


def folding_sites(weights: Weights) -> list[str]:
    """Return the names of a target's weights that can take a division."""
    return [name for name in weights if any(name.endswith(f".{end}") for end in SITES)]


def folded_weights(weights: Weights, exponents: Mapping[str, Tensor]) -> Weights:
    """Return readers of the folded weights.

    Args:
        weights: readers of the target's weights.
        exponents: of the powers of two that a site's outputs are divided by, int8 for each of them, by the site's name.
    """
    folded = dict(weights)
    for site, exponent in exponents.items():
        for name in readers_of(site, weights):
            folded[name] = ScaledReader(folded[name], columns=exponent)
    for site, exponent in exponents.items():
        is_matrix = site.endswith("up_proj.weight")
        folded[site] = ScaledReader(folded[site], exponent if is_matrix else None, None if is_matrix else -exponent)
    return folded


def folding_bytes(exponents: Mapping[str, Tensor]) -> bytes:
    """Return the content of a bundle's `FOLDING`."""
    return save(dict(exponents))


def read_folding(content: bytes, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Read what `folding_bytes` wrote.

    Args:
        content: the file's content.
        shapes: of the target's weights, by name.

    Raises:
        InputError: it is something else, or of another target.
    """
    try:
        exponents = load(content)
    except SafetensorError as error:
        raise InputError(f"{FOLDING}: cannot be read ({error}); export the bundle again") from error
    for name, exponent in exponents.items():
        known = name in shapes and any(name == _split(name)[0] + end for end in SITES)
        if known and exponent.dtype == torch.int8 and int(exponent.int().abs().max()) > MAX_EXPONENT:
            raise InputError(f"{FOLDING}: {name} has exponents beyond {MAX_EXPONENT}; export the bundle again")
        if not known or exponent.dtype != torch.int8 or tuple(exponent.shape) != shapes[name][:1]:
            raise InputError(f"{FOLDING}: {name} is not of this target; export the bundle again")
    return exponents


def _split(name: str) -> tuple[str, str]:
    """The layer's part of a weight's name, and the rest."""
    layer = re.match(r"layers\.\d+\.|", name)
    assert layer is not None
    return layer[0], name[layer.end() :]
