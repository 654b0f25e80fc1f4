"""The drafter's head alone, on each backend, against its definition in numpy."""

import numpy as np
import torch

from exporter.backends import onnx
from exporter.backends.executorch_ops import Constants
from exporter.modeling.two_stage import TwoStageHead
from runtime_ref.two_stage import two_stage_token
from tests.exporter.programs import converted, lowered

TOOLS = {"onnx": (onnx.OPS, converted), "executorch": (Constants().ops(), lowered)}


def test_two_stage_graph_follows_the_definition(backend: str) -> None:
    """Random states, tied tokens, tied centroids."""
    hidden, vocab, clusters, top_k = 8, 60, 12, 3
    generator = torch.Generator().manual_seed(0)
    embedding = torch.randint(-2, 3, (vocab, hidden), generator=generator).float()  # small integers tie often
    members = torch.randperm(vocab, generator=generator).reshape(clusters, -1)
    centroids = torch.randint(-2, 3, (clusters, hidden), generator=generator).float()
    states = torch.randint(-2, 3, (200, hidden), generator=generator).float()
    table = embedding[members].reshape(clusters, -1)
    ops, make = TOOLS[backend]
    head = TwoStageHead(vocab, hidden, clusters, top_k, ops)
    head.load_state_dict({"centroids": centroids, "clusters": table, "token_ids": members})
    run = make(head, torch.zeros(1, hidden))
    ties = 0
    for state in states:
        wanted = two_stage_token(state.numpy(), centroids.numpy(), table.numpy(), members.numpy(), top_k)
        (found,) = run(state[None])
        assert found.tolist() == [wanted]
        scores = np.sort(centroids.numpy() @ state.numpy())[::-1]
        ties += int(scores[top_k - 1] == scores[top_k])
    assert ties > 20, "too few ties between a kept and a dropped cluster to mean anything"
