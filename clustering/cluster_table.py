"""The vocabulary clusters of a two-stage head."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from runtime_ref.errors import InputError

# As the published drafter checkpoints name them.
CENTROIDS, TOKEN_ORDERING = "masked_embedding.centroids.weight", "masked_embedding.token_ordering"
TOP_K = "centroid_intermediate_top_k"


@dataclass(frozen=True)
class TwoStageSizes:
    """Clusters, tokens in each, and how many clusters the first stage keeps."""

    num_clusters: int
    cluster_size: int
    top_k_clusters: int

    @classmethod
    def of(cls, vocab_size: int, num_clusters: int, top_k: int) -> "TwoStageSizes":
        """Sizes for a vocabulary; where the clusters do not divide it, the larger size counts.

        Raises:
            InputError: more clusters than tokens, or more to keep than there are.
        """
        if not 0 < num_clusters <= vocab_size:
            raise InputError(
                f"{num_clusters} clusters asked for, expected 1 to {vocab_size}, the size of the vocabulary"
            )
        if not 0 < top_k <= num_clusters:
            raise InputError(f"{top_k} clusters are to be kept, expected 1 to {num_clusters}, the clusters there are")
        return cls(num_clusters, -(-vocab_size // num_clusters), top_k)


@dataclass(frozen=True)
class ClusterTable:
    """Centroids [C, E] float32 that score clusters, and token ids [V] int64 grouped by cluster.

    Each cluster has V/C tokens; where C does not divide V, the first V mod C clusters have one more than the others.
    """

    centroids: np.ndarray
    token_ordering: np.ndarray

    def check(self, source: str) -> None:
        """Refuse a table that is not finite, or whose ordering is not a permutation.

        Raises:
            InputError: names `source` and what is wrong.
        """
        clusters, tokens = len(self.centroids), len(self.token_ordering)
        if not 0 < clusters <= tokens:
            raise InputError(f"{source}: {clusters} clusters of {tokens} tokens; expected 1 to {tokens} clusters")
        if not np.array_equal(np.sort(self.token_ordering), np.arange(tokens)):
            raise InputError(
                f"{source}: token_ordering is not a permutation of 0..{tokens - 1}; restore the file it came from"
            )
        if not np.isfinite(self.centroids).all():
            raise InputError(f"{source}: the centroids hold NaN or infinity; restore the file they came from")

    def sizes(self, top_k: int) -> TwoStageSizes:
        """Sizes of a two-stage head that keeps the best `top_k` of these clusters."""
        return TwoStageSizes.of(len(self.token_ordering), len(self.centroids), top_k)

    @property
    def members(self) -> np.ndarray:
        """Token ids by cluster, rising, [C, ceil(V/C)] int64; a cluster with one less has its first token twice.

        A repeated token ties with itself and changes no choice, so that no slot has to be masked.
        """
        clusters = [np.sort(part) for part in np.array_split(self.token_ordering, len(self.centroids))]
        size = len(clusters[0])
        return np.stack([np.resize(part, size) for part in clusters])

    def to_bytes(self, top_k: int) -> bytes:
        """A safetensors file, in the names of the published checkpoints, with the clusters to keep as metadata."""
        return save({CENTROIDS: self.centroids, TOKEN_ORDERING: self.token_ordering}, {TOP_K: str(top_k)})


def load_table(file: Path, vocab_size: int, hidden_size: int) -> tuple[ClusterTable, int]:
    """Read what `ClusterTable.to_bytes` made, for a drafter of this vocabulary and hidden size.

    Raises:
        InputError: no such file, not such a file, or one that does not fit the drafter.
    """
    try:
        with safe_open(file, "numpy") as opened:
            metadata = opened.metadata() or {}
            found = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not iterable itself
    except (SafetensorError, OSError, TypeError, AttributeError) as error:  # the last for dtypes numpy has not
        raise InputError(f"{file}: not a readable cluster table ({error}); make one with `cluster --output`") from error
    for name, columns, kind in ((CENTROIDS, (hidden_size,), "f"), (TOKEN_ORDERING, (), "i")):
        if name not in found:
            raise InputError(f"{file}: tensor {name} is missing; make a table with `cluster --output`")
        if found[name].dtype.kind != kind or found[name].shape[1:] != columns or found[name].ndim != 1 + len(columns):
            raise InputError(
                f"{file}: tensor {name} is {found[name].dtype} {list(found[name].shape)}, the drafter's hidden size is"
                f" {hidden_size}; make a table for this drafter"
            )
    with np.errstate(over="ignore"):  # what float32 cannot hold is infinite then, and refused below
        table = ClusterTable(found[CENTROIDS].astype(np.float32), found[TOKEN_ORDERING].astype(np.int64))
    if len(table.token_ordering) != vocab_size:
        raise InputError(
            f"{file}: orders {len(table.token_ordering)} tokens, the drafter has {vocab_size}; make a table for this"
            " drafter"
        )
    table.check(str(file))
    top_k = metadata.get(TOP_K, "")
    if not top_k.isdecimal() or len(top_k) > 9:
        raise InputError(f"{file}: the metadata has no {TOP_K}; make a table with `cluster --output`")
    return table, int(top_k)
