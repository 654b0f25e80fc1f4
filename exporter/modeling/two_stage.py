"""The drafter's heads: a dense one, and two-stage logits over clusters of the vocabulary."""

import torch
from torch import Tensor, nn

from exporter.modeling.layers import Ops


class DenseHead(nn.Module):
    """The token with the largest logit over the whole vocabulary."""

    def __init__(self, vocab_size: int, hidden: int, ops: Ops) -> None:
        super().__init__()
        self.ops = ops
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden))

    def forward(self, hidden: Tensor) -> Tensor:
        """Token ids [T] int64 for hidden states [T, E]; the lowest id on a tie."""
        return self.ops.linear(hidden, self.weight).argmax(-1)


class TwoStageHead(nn.Module):
    """The best token of the `top_k` clusters whose centroids score highest.

    `clusters` holds one row a cluster, the embeddings of its V/C tokens laid end to end, so that the second stage is
    `top_k` contiguous reads. Follows transformers 5.22.2, `Gemma4AssistantMaskedEmbedder`, without its scatter into V
    logits. `runtime_ref.two_stage` is the definition; between tied centroids it and the exported graph keep the lowest
    cluster, eager torch may keep another.
    """

    def __init__(self, vocab_size: int, hidden: int, num_clusters: int, top_k: int, ops: Ops) -> None:
        super().__init__()
        self.ops, self.top_k, self.vocab_size = ops, top_k, vocab_size
        size = vocab_size // num_clusters
        self.centroids = nn.Parameter(torch.empty(num_clusters, hidden))
        self.clusters = nn.Parameter(torch.empty(num_clusters, size * hidden))
        self.token_ids = nn.Parameter(torch.empty(num_clusters, size, dtype=torch.int64), requires_grad=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """Token ids [T] int64 for hidden states [T, E]; the lowest id on a tie."""
        tokens, size = hidden.shape
        _, kept = self.ops.top_k(self.ops.linear(hidden, self.centroids), self.top_k)  # [T, k]
        kept = kept.reshape(-1)
        rows = self.clusters.index_select(0, kept).reshape(tokens, -1, size)  # [T, k*V/C, E]
        logits = torch.bmm(rows, hidden.unsqueeze(2)).squeeze(-1)
        ids = self.token_ids.index_select(0, kept).reshape(tokens, -1)
        best = logits.amax(-1, keepdim=True)
        return torch.where(logits == best, ids, self.vocab_size).amin(-1)
