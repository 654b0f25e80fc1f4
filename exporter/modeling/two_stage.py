"""The drafter's heads: a dense one, and two-stage logits over clusters of the vocabulary."""

import torch
from torch import Tensor, nn

from clustering.cluster_table import TwoStageSizes
from exporter.modeling.layers import Ops


class DenseHead(nn.Module):
    """A head that chooses the token with the largest logit of the whole vocabulary."""

    def __init__(self, vocab_size: int, hidden: int, ops: Ops) -> None:
        super().__init__()
        self.ops = ops
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden))

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the best token ids [T] int64 for hidden states [T, E] float32; the lowest id on a tie."""
        return self.ops.linear(hidden, self.weight).argmax(-1)


class TwoStageHead(nn.Module):
    """A head that chooses the best token of the clusters whose centroids score highest.

    The parameter `clusters` has one row for each cluster, the embeddings of its M tokens one after the other, so that
    the second stage reads `top_k_clusters` contiguous rows. With 8 or 4 bits it holds the integers that
    `exporter.quantization.numbers.quantize_clusters` returns, and `scales` holds a factor for each token.

    `runtime_ref.two_stage` defines the result. Between tied centroids it and the exported graphs keep the cluster of
    the lower index; eager torch may keep another. Follows transformers 5.24.0, `Gemma4AssistantMaskedEmbedder`, but
    does not scatter its logits to V.
    """

    def __init__(self, hidden: int, sizes: TwoStageSizes, ops: Ops, bits: int = 32) -> None:
        """Build a head.

        Args:
            hidden: size E of a hidden state.
            sizes: number C of clusters, tokens M in each, and how many clusters the first stage keeps.
            ops: operations of the backend.
            bits: bits of a weight in the clusters: 32 for float32, 8 or 4 for integers.
        """
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
        """Return the best token ids [T] int64 for hidden states [T, E] float32; the lowest id on a tie."""
        tokens = hidden.shape[0]
        _, kept = self.ops.top_k(self.ops.linear(hidden, self.centroids), self.top_k)  # [T, top_k]
        kept = kept.reshape(-1)
        logits = self._logits(hidden, kept)
        ids = self.token_ids.index_select(0, kept).reshape(tokens, -1)
        # The smallest id among the best logits: every other id has a number added to it that exceeds all ids, unless
        # its logit is within 1e-32 of the best. On ExecuTorch a comparison and a selection take six times as long.
        distance = logits.amax(-1, keepdim=True) - logits
        return (distance * 1e38 + ids).amin(-1).to(torch.int64)

    def _logits(self, hidden: Tensor, kept: Tensor) -> Tensor:
        """Logits [T, top_k*M] of the tokens of the kept clusters [T*top_k]."""
        tokens, size = hidden.shape
        rows = self.clusters.index_select(0, kept)
        if self.bits == 32:
            return _dot(hidden, rows.reshape(tokens, -1, size))
        values = self.ops.from_int8(rows)
        if self.bits == 8:
            logits = _dot(hidden, values.reshape(tokens, -1, size))
        else:
            # A byte is 16 * high + low + 8, for two integers that lie half a row apart: `low` multiplies the first half
            # of a state, `high` the second. Only `high` is unpacked; `low` is byte - 16 * high - 8.
            values = values.reshape(tokens, -1, size // 2)
            first, second = hidden.chunk(2, dim=-1)
            high = torch.floor(values * 0.0625)
            logits = _dot(first, values) + _dot(second - 16 * first, high) - 8 * first.sum(-1, keepdim=True)
        return logits * self.scales.index_select(0, kept).reshape(tokens, -1)


def _dot(state: Tensor, rows: Tensor) -> Tensor:
    """Products [T, rows] of each state [T, E] with its own rows [T, rows, E]."""
    return torch.bmm(state.unsqueeze(1), rows.transpose(1, 2)).squeeze(1)
