"""The graphs of a bundle: their inputs and outputs, named once, and the modules that are traced for them."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.export import Dim

from exporter.config import DrafterConfig, TextConfig
from exporter.modeling.drafter import Drafter
from exporter.modeling.target import Target
from runtime_ref.graph_engine import CACHE_STEP_ROWS
from runtime_ref.manifest import window_rows

TOP_LOGITS = 64  # choices the target returns for each position, the most that sampling may use
ROW_MULTIPLE = 4  # of tokens and outputs: what any backend on any processor may have to fill passes up to
PREFILL_CHUNK = 128  # most tokens a pass: bounds the attention scores, which grow with tokens times cache rows


@dataclass(frozen=True)
class Port:
    """One input or output of a graph. A dimension that is a name varies from call to call."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class GraphSpec:
    """Inputs and outputs in order. Output `X_out` is input `X`, updated in place by binding both to one buffer."""

    name: str
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]


def kv_ports(config: TextConfig) -> tuple[Port, ...]:
    """K and V buffers of the target's storing layers, as every graph names them."""
    ports = []
    for i, layer_type in enumerate(config.layer_types[: config.num_kv_layers]):
        sizes = config.attention(layer_type)
        rows = "window_rows" if layer_type == "sliding_attention" else "cache_rows"
        shape = (sizes.num_key_value_heads, rows, sizes.head_dim)
        ports += [Port(f"key_{i}", "float32", shape), Port(f"value_{i}", "float32", shape)]
    return tuple(ports)


def shared_kv(target: TextConfig, drafter: DrafterConfig) -> dict[str, int]:
    """The target layer whose K/V the drafter's layers of each type read."""
    return {kind: target.kv_source(kind) for kind in sorted(set(drafter.text.layer_types))}


def target_graph(config: TextConfig) -> GraphSpec:
    """Prefill, verify and decode: T looked-up tokens in, the choices and states of R of them out."""
    kv, per_layer = kv_ports(config), config.num_hidden_layers * config.hidden_size_per_layer_input
    top = min(TOP_LOGITS, config.vocab_size)
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
            Port("top_logits", "float32", ("num_outputs", top)),
            Port("top_ids", "int64", ("num_outputs", top)),
            Port("state", "float32", ("num_outputs", config.hidden_size)),
            *(Port(f"{port.name}_out", port.dtype, port.shape) for port in kv),
        ),
    )


def drafter_graph(target: TextConfig, drafter: DrafterConfig) -> GraphSpec:
    """One draft step: the newest token, looked up, and a state in, a draft token and the next state out."""
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
    """The spec for a backend that writes into the cache inputs themselves."""
    inputs = {port.name for port in spec.inputs}
    return replace(spec, outputs=tuple(p for p in spec.outputs if p.name.removesuffix("_out") not in inputs))


def size_limits(max_seq_len: int, max_draft_tokens: int, sliding_window: int) -> dict[str, int]:
    """The largest size of each dimension that varies, for one call of a graph."""
    cache_rows = -(-(max_seq_len + ROW_MULTIPLE - 1) // CACHE_STEP_ROWS) * CACHE_STEP_ROWS
    return {
        "num_tokens": PREFILL_CHUNK,
        "num_outputs": -(-(max_draft_tokens + 1) // ROW_MULTIPLE) * ROW_MULTIPLE,
        "cache_rows": cache_rows,
        "window_rows": min(cache_rows, window_rows(sliding_window, PREFILL_CHUNK)),
    }


class TargetGraph(nn.Module):
    """The target with its choices reduced to the largest logits, in the order of `target_graph`.

    Look-ups are the runtime's: tables that are read a row at a time belong into a mapped file, not into a graph.

    Without `cache_outputs` the operations passed in must write into the cache they are given.
    """

    def __init__(self, target: Target, cache_outputs: bool = True) -> None:
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
        target = self.target
        tokens = target.embed_tokens.scaled(embedded), target.embed_tokens_per_layer.scaled(per_layer)
        out = target.decode(*tokens, position, window_start, output_rows, kv)
        logits, ids = self.target.ops.top_k(out.logits, min(TOP_LOGITS, out.logits.shape[1]))
        return [logits, ids, out.state, *(out.kv if self.cache_outputs else ())]


class DrafterGraph(nn.Module):
    """One draft step, in the order of `drafter_graph`."""

    def __init__(self, drafter: Drafter, shared: dict[str, int]) -> None:
        super().__init__()
        self.drafter, self.shared = drafter, shared

    def forward(
        self, embedded: Tensor, state: Tensor, position: Tensor, window_start: Tensor, kv: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        # Two types cannot share a layer, and the buffers come in the order of their layers.
        layers = sorted(self.shared.values())
        at = {kind: 2 * layers.index(i) for kind, i in self.shared.items()}
        pairs = {kind: (kv[i], kv[i + 1]) for kind, i in at.items()}
        embedded = self.drafter.target_embed_tokens.scaled(embedded)
        hidden, state = self.drafter.step(embedded, state, position, window_start, pairs)
        return self.drafter.head(hidden), state


def trace_arguments(spec: GraphSpec, limits: Mapping[str, int]) -> tuple[tuple, tuple]:
    """Zero tensors of the spec's shapes, and which of their dimensions vary, as `torch.export` takes both.

    The cache buffers come last, as one list.
    """
    names = sorted({d for port in spec.inputs for d in port.shape if isinstance(d, str)})
    # Sizes must differ and exceed 1: torch.export takes equal ones for one dimension, and 1 for a constant.
    sizes = {name: 2 + i for i, name in enumerate(sorted(names, key=lambda name: limits[name]))}
    dims = {name: Dim(name, min=1, max=limits[name]) for name in names}
    shapes = [{i: dims[d] for i, d in enumerate(port.shape) if isinstance(d, str)} for port in spec.inputs]
    inputs = [
        torch.zeros([sizes[d] if isinstance(d, str) else d for d in port.shape], dtype=getattr(torch, port.dtype))
        for port in spec.inputs
    ]
    kv_at = next(i for i, port in enumerate(spec.inputs) if port.name.startswith("key_"))
    return (*inputs[:kv_at], inputs[kv_at:]), (*shapes[:kv_at], shapes[kv_at:])
