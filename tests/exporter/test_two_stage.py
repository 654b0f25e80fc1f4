"""The drafter's head alone, on each backend, against its definition in numpy."""

import numpy as np
import pytest
import torch
from torch import Tensor

from clustering.cluster_table import TwoStageSizes
from exporter.backends import onnx
from exporter.backends.executorch_ops import Constants
from exporter.bench.programs import Run, converted, lowered
from exporter.modeling.two_stage import TwoStageHead
from exporter.quantize import quantize_clusters
from runtime_ref.two_stage import two_stage_token

TOOLS = {"onnx": (onnx.OPS, converted), "executorch": (Constants().ops(), lowered)}
VOCAB, HIDDEN, SIZES = 60, 8, TwoStageSizes(num_clusters=12, cluster_size=5, top_k_clusters=3)


def head_of(rows: Tensor, centroids: Tensor, members: Tensor, bits: int, backend: str) -> Run:
    """A head over embedding rows [V, E], in as many bits, on a backend's runtime."""
    ops, make = TOOLS[backend]
    head, table = TwoStageHead(HIDDEN, SIZES, ops, bits), rows[members]
    state = {"centroids": centroids, "token_ids": members.float()}
    if bits < 32:
        table, state["scales"] = quantize_clusters(table, bits)
    head.load_state_dict(state | {"clusters": table.flatten(1)})
    return make(head, torch.zeros(1, HIDDEN))


@pytest.mark.parametrize("bits", [32, 8, 4])
def test_two_stage_graph_follows_the_definition(bits: int, backend: str) -> None:
    """Random states, tied tokens, tied centroids. Small integers tie often, and 8 and 4 bits hold them exactly."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(-2, 3, (VOCAB, HIDDEN), generator=generator).float()
    rows[:, 3] = {32: 2, 8: 127, 4: 7}[bits]  # the largest of each row, so that its scale is 1
    members = torch.randperm(VOCAB, generator=generator).reshape(SIZES.num_clusters, -1)
    centroids = torch.randint(-2, 3, (SIZES.num_clusters, HIDDEN), generator=generator).float()
    states = torch.randint(-2, 3, (200, HIDDEN), generator=generator).float()
    run = head_of(rows, centroids, members, bits, backend)
    table, kept, tied_clusters, tied_tokens = rows[members].flatten(1), SIZES.top_k_clusters, 0, 0
    for state in states:
        wanted = two_stage_token(state.numpy(), centroids.numpy(), table.numpy(), members.numpy(), kept)
        (found,) = run(state[None])
        assert found.tolist() == [wanted]
        scores = np.sort(centroids.numpy() @ state.numpy())[::-1]
        tied_clusters += int(scores[kept - 1] == scores[kept])
        logits = np.sort(rows.numpy() @ state.numpy())[::-1]
        tied_tokens += int(logits[0] == logits[1])
    assert tied_clusters > 20, "too few ties between a kept and a dropped cluster to mean anything"
    assert tied_tokens > 20


@pytest.mark.parametrize(("bits", "steps"), [(8, 127), (4, 7)])
def test_quantized_rows_are_near(bits: int, steps: int, backend: str) -> None:
    """The best token by rows that are off by half a step each at most; a row of zeros stays one."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(VOCAB, HIDDEN, generator=generator) * torch.rand(VOCAB, 1, generator=generator)
    rows[5] = 0
    members = torch.randperm(VOCAB, generator=generator).reshape(SIZES.num_clusters, -1)
    centroids = rows[members].mean(1)
    numbers, scales = quantize_clusters(rows, bits)
    if bits == 4:
        numbers = torch.cat((numbers % 16 - 8, torch.floor(numbers / 16)), -1)
    near = numbers * scales.unsqueeze(-1)
    assert ((near - rows).abs() <= 0.5001 * rows.abs().amax(-1, keepdim=True) / steps).all()
    run = head_of(rows, centroids, members, bits, backend)
    table, kept = near[members].flatten(1).numpy(), SIZES.top_k_clusters
    for state in torch.randn(100, HIDDEN, generator=generator):
        wanted = two_stage_token(state.numpy(), centroids.numpy(), table, members.numpy(), kept)
        assert run(state[None])[0].tolist() == [wanted]
