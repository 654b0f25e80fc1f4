"""The vocabulary clusters of a two-stage head."""

from dataclasses import dataclass

import numpy as np

from runtime_ref.errors import InputError


@dataclass(frozen=True)
class ClusterTable:
    """Centroids [C, E] float32 that score clusters, and token ids [V] int64 grouped by cluster, V/C to each."""

    centroids: np.ndarray
    token_ordering: np.ndarray

    def check(self, source: str) -> None:
        """Refuse a table whose ordering is not a permutation or does not split into equal clusters.

        Raises:
            InputError: names `source` and what is wrong.
        """
        clusters, tokens = len(self.centroids), len(self.token_ordering)
        if tokens % clusters:
            raise InputError(
                f"{source}: {tokens} tokens do not split into {clusters} clusters of equal size; check num_centroids"
            )
        if not np.array_equal(np.sort(self.token_ordering), np.arange(tokens)):
            raise InputError(
                f"{source}: token_ordering is not a permutation of 0..{tokens - 1}; restore the drafter checkpoint"
            )

    def facts(self, top_k: int) -> dict[str, int]:
        """What a manifest says of a two-stage head that keeps the best `top_k` of these clusters."""
        clusters, size = self.members.shape
        return {"num_clusters": clusters, "cluster_size": size, "top_k_clusters": top_k}

    @property
    def members(self) -> np.ndarray:
        """Token ids by cluster, [C, V/C] int64."""
        return self.token_ordering.reshape(len(self.centroids), -1)
