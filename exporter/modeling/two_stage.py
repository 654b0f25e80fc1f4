"""The drafter's heads: a dense one, and two-stage logits over clusters of the vocabulary."""

import torch
from torch import Tensor, nn

from clustering.cluster_table import TwoStageSizes
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
    """The best token of the clusters whose centroids score highest.

    `clusters` holds one row a cluster, the embeddings of its tokens laid end to end, so that the second stage is
    `top_k_clusters` contiguous reads. With 8 or 4 bits it holds what `exporter.quantize.quantize_clusters` makes of
    them, and `scales` a factor for each token. Follows transformers 5.22.2, `Gemma4AssistantMaskedEmbedder`, without
    its scatter into V logits. `runtime_ref.two_stage` is the definition; between tied centroids it and the exported
    graph keep the lowest cluster, eager torch may keep another.
    """

    def __init__(self, hidden: int, sizes: TwoStageSizes, ops: Ops, bits: int = 32) -> None:
        super().__init__()
        self.ops, self.top_k, self.bits = ops, sizes.top_k_clusters, bits
        clusters, size = sizes.num_clusters, sizes.cluster_size
        self.centroids = nn.Parameter(torch.empty(clusters, hidden))
        self.token_ids = nn.Parameter(torch.empty(clusters, size))  # float32 holds every integer up to 2^24
        if bits == 32:
            self.clusters = nn.Parameter(torch.empty(clusters, size * hidden))
        else:
            stored = torch.empty(clusters, size * hidden * bits // 8, dtype=torch.int8)
            self.clusters = nn.Parameter(stored, requires_grad=False)
            self.scales = nn.Parameter(torch.empty(clusters, size))

    def forward(self, hidden: Tensor) -> Tensor:
        """Token ids [T] int64 for hidden states [T, E]; the lowest id on a tie."""
        tokens = hidden.shape[0]
        _, kept = self.ops.top_k(self.ops.linear(hidden, self.centroids), self.top_k)  # [T, k]
        kept = kept.reshape(-1)
        logits = self._logits(hidden, kept)
        ids = self.token_ids.index_select(0, kept).reshape(tokens, -1)
        # Where a logit is the best one its id remains, elsewhere a number that no id reaches, unless logits differ by
        # less than 1e-32. On ExecuTorch comparing and choosing would take six times as long as this arithmetic.
        behind = logits.amax(-1, keepdim=True) - logits
        return (behind * 1e38 + ids).amin(-1).to(torch.int64)

    def _logits(self, hidden: Tensor, kept: Tensor) -> Tensor:
        """Logits [T, k*V/C] of the tokens of the kept clusters [T*k]."""
        tokens, width = hidden.shape
        rows = self.clusters.index_select(0, kept)
        if self.bits == 32:
            return _dot(hidden, rows.reshape(tokens, -1, width))
        values = self.ops.from_int8(rows)
        if self.bits == 8:
            logits = _dot(hidden, values.reshape(tokens, -1, width))
        else:
            # A byte is 16 * second + first + 8, for two numbers whose places in the row are half a row apart. So it
            # is never taken apart, nor written out again: its floor of sixteenths is all that is needed beside it.
            values = values.reshape(tokens, -1, width // 2)
            first, second = hidden.chunk(2, dim=-1)
            seconds = torch.floor(values * 0.0625)
            logits = _dot(first, values) + _dot(second - 16 * first, seconds) - 8 * first.sum(-1, keepdim=True)
        return logits * self.scales.index_select(0, kept).reshape(tokens, -1)


def _dot(state: Tensor, rows: Tensor) -> Tensor:
    """Products [T, N] of states [T, E] with rows [T, N, E] of their own."""
    return torch.bmm(state.unsqueeze(1), rows.transpose(1, 2)).squeeze(1)
