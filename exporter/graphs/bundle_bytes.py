"""Estimate what a bundle holds beside the target's matrices."""

from math import prod

from exporter.checkpoint.folding import folding_sites
from exporter.checkpoint.pair import Pair
from exporter.checkpoint.side_files import chat_template
from exporter.graphs.backend import Backend
from exporter.graphs.parts import graph_parts
from exporter.quantization.recipes import Recipe
from exporter.quantization.widths import FLOAT
from runtime_ref.tokenizer import TOKENIZER

# Of a graph without weights, and of the manifest, for a layer: at most 20,000 were measured.
LAYER_BYTES = 25_000
ENTRY_BYTES = 150  # of a tensor in the header of a safetensors file


def bytes_beside_matrices(pair: Pair, backend: Backend, recipe: Recipe) -> int:
    """Return the bytes of a bundle without the target's matrices, rounded up: vectors, drafter, graphs and texts.

    Args:
        pair: the target and its drafter.
        backend: decides the stored form.
        recipe: widths of the drafter's matrices.
    """
    total = LAYER_BYTES * (pair.target.num_hidden_layers + pair.drafter.text.num_hidden_layers + 1)
    for model, part in graph_parts(pair, recipe).items():
        for name in part.weights:
            shape, width = part.shapes[name], part.widths.get(name, FLOAT)
            if name == "head.clusters" and recipe.head != FLOAT:
                total += prod(shape)  # the shape of its bytes
            elif len(shape) != 2:
                total += 4 * prod(shape)
            elif model == "drafter":
                total += backend.matrix_bytes(shape, width)
    target = graph_parts(pair, recipe)["target"]
    total += sum(target.shapes[site][0] + ENTRY_BYTES for site in folding_sites(target.weights))
    if pair.table is not None and pair.clusters_origin != "checkpoint":
        total += pair.table.centroids.nbytes + pair.table.token_ordering.nbytes
    tokenizer, template = pair.target_checkpoint.directory / TOKENIZER, chat_template(pair.target_checkpoint.directory)
    return total + (tokenizer.stat().st_size if tokenizer.is_file() else 0) + len((template or "").encode())
