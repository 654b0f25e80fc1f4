"""The two graphs of a bundle: their inputs and outputs, declared once, and the modules that are traced for them."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.export import Dim

from exporter.modeling.config import DrafterConfig, TextConfig, shared_kv
from exporter.modeling.drafter import Drafter, kv_by_type
from exporter.modeling.target import Target
from runtime_ref.cache import CACHE_STEP_ROWS
from runtime_ref.manifest import round_up, window_rows
from runtime_ref.sampling import MAX_TOP_K

# Limits are multiples of this, the largest row multiple of any backend on any processor, so every pass can be padded.
MAX_ROW_MULTIPLE = 4
# Maximum number of tokens in a pass. It bounds the memory of attention scores: tokens times cache rows.
PREFILL_CHUNK_TOKENS = 128


@dataclass(frozen=True)
class Port:
    """One input or output of a graph.

    Attributes:
        name: as in the manifest.
        dtype: name of a torch dtype.
        shape: its dimensions. One that is a name varies from call to call, up to its value in `size_limits`.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class GraphSpec:
    """Inputs and outputs of a graph.

    Attributes:
        name: `target` or `drafter`.
        inputs: in the graph's order.
        outputs: in the graph's order. Output `X_out` is the new content of input `X`; a runtime binds both to the same
            buffer, which is then updated in place.
    """

    name: str
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]


def kv_ports(config: TextConfig) -> tuple[Port, ...]:
    """Return the K and V buffers, each [N, S, D], of the target's storing layers, in the order of the layers."""
    ports = []
    for i, layer_type in enumerate(config.layer_types[: config.num_kv_layers]):
        sizes = config.attention(layer_type)
        rows = "window_rows" if layer_type == "sliding_attention" else "cache_rows"
        shape = (sizes.num_key_value_heads, rows, sizes.head_dim)
        ports += [Port(f"key_{i}", "float32", shape), Port(f"value_{i}", "float32", shape)]
    return tuple(ports)


def target_graph(config: TextConfig) -> GraphSpec:
    """Return inputs and outputs of graph `target`, one pass for prefill, verify and decode.

    A pass takes embedding rows of T tokens and returns the largest logits and the states of R of them.
    """
    kv, per_layer = kv_ports(config), config.num_hidden_layers * config.hidden_size_per_layer_input
    k = min(MAX_TOP_K, config.vocab_size)
    return GraphSpec(
        "target",
        inputs=(
            Port("embedded", "float32", ("num_tokens", config.hidden_size)),
            Port("per_layer", "float32", ("num_tokens", per_layer)),
            Port("position", "int64", (1,)),
            Port("window_start", "int64", (1,)),
            Port("output_rows", "int64", ("num_outputs",)),
            *kv,
        ),
        outputs=(
            Port("top_logits", "float32", ("num_outputs", k)),
            Port("top_ids", "int64", ("num_outputs", k)),
            Port("state", "float32", ("num_outputs", config.hidden_size)),
            *(Port(f"{port.name}_out", port.dtype, port.shape) for port in kv),
        ),
    )


def drafter_graph(target: TextConfig, drafter: DrafterConfig) -> GraphSpec:
    """Return inputs and outputs of graph `drafter`, one draft step.

    A step takes the embedding row of the newest token and a state; it returns a draft token and the next state.

    Args:
        target: the target's config, which decides the states and the KV cache.
        drafter: the drafter's config, which decides which buffers of the cache are read.
    """
    read = {f"{part}_{i}" for i in shared_kv(target, drafter).values() for part in ("key", "value")}
    state = (1, target.hidden_size)
    return GraphSpec(
        "drafter",
        inputs=(
            Port("embedded", "float32", state),
            Port("state", "float32", state),
            Port("position", "int64", (1,)),
            Port("window_start", "int64", (1,)),
            *(port for port in kv_ports(target) if port.name in read),
        ),
        outputs=(Port("draft_token", "int64", (1,)), Port("next_state", "float32", state)),
    )


def without_cache_outputs(spec: GraphSpec) -> GraphSpec:
    """Return the spec without its `X_out` outputs, for a backend that writes into its cache inputs."""
    inputs = {port.name for port in spec.inputs}
    return replace(spec, outputs=tuple(p for p in spec.outputs if p.name.removesuffix("_out") not in inputs))


def size_limits(max_seq_len: int, max_draft_tokens: int, sliding_window: int) -> dict[str, int]:
    """Return the maximum size, for one call of a graph, of each dimension that varies: the manifest's `limits`.

    Args:
        max_seq_len: maximum number of tokens of prompt and answer together.
        max_draft_tokens: maximum number of draft tokens in a round.
        sliding_window: the target's sliding window, in tokens.
    """
    cache_rows = round_up(max_seq_len + MAX_ROW_MULTIPLE - 1, CACHE_STEP_ROWS)
    return {
        "num_tokens": PREFILL_CHUNK_TOKENS,
        "num_outputs": round_up(max_draft_tokens + 1, MAX_ROW_MULTIPLE),
        "cache_rows": cache_rows,
        "window_rows": min(cache_rows, window_rows(sliding_window, PREFILL_CHUNK_TOKENS)),
    }


class TargetGraph(nn.Module):
    """The target with its logits reduced to the largest ones, with inputs and outputs as in `target_graph`.

    The runtime reads embedding rows from mapped files, so the graph has no embedding table besides the head's weight.
    """

    def __init__(self, target: Target, cache_outputs: bool = True) -> None:
        """Wrap a target; without `cache_outputs` its `ops.write_rows` must write into the cache that it is given."""
        super().__init__()
        self.target, self.cache_outputs = target, cache_outputs

    def forward(
        self,
        embedded: Tensor,
        per_layer: Tensor,
        position: Tensor,
        window_start: Tensor,
        output_rows: Tensor,
        kv: list[Tensor],
    ) -> list[Tensor]:
        """Run one pass; k is `MAX_TOP_K`, or V if that is smaller.

        Args:
            embedded: [T, E] float32, token embedding rows, not scaled yet.
            per_layer: [T, layers*P] float32, PLE rows, not scaled yet.
            position: [1] int64, number of valid positions before the pass.
            window_start: [1] int64, the position that row 0 of the sliding buffers holds.
            output_rows: [R] int64, indices of the tokens whose outputs are returned.
            kv: K, then V, of each storing layer, each [N, S, D] float32.

        Returns:
            Logits [R, k] float32 in falling order, their token ids [R, k] int64, states [R, E] float32, and with
            `cache_outputs` the updated `kv`.
        """
        target = self.target
        tokens = target.embed_tokens.scaled(embedded), target.embed_tokens_per_layer.scaled(per_layer)
        out = target.decode(*tokens, position, window_start, output_rows, kv)
        logits, ids = self.target.ops.top_k(out.logits, min(MAX_TOP_K, out.logits.shape[1]))
        return [logits, ids, out.state, *(out.kv if self.cache_outputs else ())]


class DrafterGraph(nn.Module):
    """One draft step, with inputs and outputs as in `drafter_graph`."""

    def __init__(self, drafter: Drafter, shared: dict[str, int]) -> None:
        """Wrap a drafter that reads K and V of these target layers, by layer type, as `shared_kv` returns them."""
        super().__init__()
        self.drafter, self.shared = drafter, shared

    def forward(
        self, embedded: Tensor, state: Tensor, position: Tensor, window_start: Tensor, kv: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Run one draft step; E is the target's hidden size.

        Args:
            embedded: [1, E] float32, token embedding row of the newest token, not scaled yet.
            state: [1, E] float32, the target's state, or the one that the step before returned.
            position: [1] int64, number of valid positions.
            window_start: [1] int64, the position that row 0 of the sliding buffers holds.
            kv: K, then V, of each layer in `shared`, in the order of the layers, each [N, S, D] float32.

        Returns:
            The draft token [1] int64 and the next state [1, E] float32.
        """
        # `kv` has the K and V of these layers alone, in their order; two layer types never share a layer.
        layers = sorted(self.shared.values())
        pairs = kv_by_type(kv, {layer_type: layers.index(layer) for layer_type, layer in self.shared.items()})
        embedded = self.drafter.target_embed_tokens.scaled(embedded)
        hidden, state = self.drafter.step(embedded, state, position, window_start, pairs)
        return self.drafter.head(hidden), state


def trace_arguments(spec: GraphSpec, limits: Mapping[str, int]) -> tuple[tuple, tuple]:
    """Return example inputs and the dimensions of them that vary, as `torch.export` takes both.

    The cache buffers are the last input, as one list.

    Args:
        spec: the graph's inputs; the cache buffers must come last.
        limits: maximum size of each varying dimension, from `size_limits`.

    Returns:
        Zero tensors of the spec's shapes and dtypes, and `dynamic_shapes` of the same structure.
    """
    names = sorted({d for port in spec.inputs for d in port.shape if isinstance(d, str)})
    # Sizes must differ and exceed 1: torch.export treats equal sizes as one dimension, and size 1 as a constant.
    sizes = {name: 2 + i for i, name in enumerate(sorted(names, key=lambda name: limits[name]))}
    dims = {name: Dim(name, min=1, max=limits[name]) for name in names}
    shapes = [{i: dims[d] for i, d in enumerate(port.shape) if isinstance(d, str)} for port in spec.inputs]
    inputs = [
        torch.zeros([sizes[d] if isinstance(d, str) else d for d in port.shape], dtype=getattr(torch, port.dtype))
        for port in spec.inputs
    ]
    kv_at = next(i for i, port in enumerate(spec.inputs) if port.name.startswith("key_"))
    return (*inputs[:kv_at], inputs[kv_at:]), (*shapes[:kv_at], shapes[kv_at:])
