"""The vocabulary clusters of a two-stage head, and the file that holds them."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from runtime_ref.errors import InputError

# Names of the published drafter checkpoints: tensors, and the key of the clusters to keep.
CENTROIDS, TOKEN_ORDERING = "masked_embedding.centroids.weight", "masked_embedding.token_ordering"
TOP_K_KEY = "centroid_intermediate_top_k"


@dataclass(frozen=True)
class TwoStageSizes:
    """Sizes of a two-stage head.

    Attributes:
        num_clusters: C.
        cluster_size: M, the tokens of the largest cluster.
        top_k_clusters: how many clusters the first stage keeps.
    """

    num_clusters: int
    cluster_size: int
    top_k_clusters: int

    @classmethod
    def of(cls, vocab_size: int, num_clusters: int, top_k: int) -> "TwoStageSizes":
        """Return the sizes for a vocabulary.

        Args:
            vocab_size: V.
            num_clusters: C, 1 to V.
            top_k: how many clusters the first stage keeps, 1 to C.

        Raises:
            InputError: `num_clusters` or `top_k` is out of its range.
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
    """The clusters of a vocabulary.

    Each cluster has V/C tokens; where C does not divide V, the first V mod C clusters have one more than the others.

    Attributes:
        centroids: [C, E] float32, which score clusters.
        token_ordering: [V] int64, token ids grouped by cluster.
    """

    centroids: np.ndarray
    token_ordering: np.ndarray

    def check(self, source: str) -> None:
        """Refuse a table that cannot be used.

        Args:
            source: where it comes from, which the error names.

        Raises:
            InputError: there are more clusters than tokens or none, `token_ordering` is not a permutation, or the
                centroids are not finite.
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
        """Return the sizes of a two-stage head with these clusters.

        Args:
            top_k: how many clusters the first stage keeps, 1 to C.

        Raises:
            InputError: `top_k` is out of its range.
        """
        return TwoStageSizes.of(len(self.token_ordering), len(self.centroids), top_k)

    @property
    def members(self) -> np.ndarray:
        """Token ids by cluster, rising, [C, M] int64; a cluster that is one token short has its first token twice.

        A repeated token ties with itself and changes no choice, so no slot has to be masked.
        """
        clusters = [np.sort(part) for part in np.array_split(self.token_ordering, len(self.centroids))]
        size = len(clusters[0])
        return np.stack([np.resize(part, size) for part in clusters])

    def to_bytes(self, top_k: int) -> bytes:
        """Return the table as a safetensors file, with the names of the published checkpoints.

        Args:
            top_k: how many clusters the first stage keeps; it becomes metadata of the file.
        """
        return save({CENTROIDS: self.centroids, TOKEN_ORDERING: self.token_ordering}, {TOP_K_KEY: str(top_k)})


def load_table(file: Path, vocab_size: int, hidden_size: int) -> tuple[ClusterTable, int]:
    """Read a file of `ClusterTable.to_bytes` for a drafter.

    Args:
        file: the safetensors file.
        vocab_size: V of the drafter.
        hidden_size: E of the drafter.

    Returns:
        The table, and how many clusters the first stage keeps.

    Raises:
        InputError: there is no such file, it is no cluster table, or it does not fit the drafter.
    """
    try:
        with safe_open(file, "numpy") as opened:
            metadata = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not iterable itself
    except (SafetensorError, OSError, TypeError, AttributeError) as error:  # the last for dtypes that numpy lacks
        raise InputError(f"{file}: not a readable cluster table ({error}); make one with `cluster --output`") from error
    for name, columns, dtype_kind in ((CENTROIDS, (hidden_size,), "f"), (TOKEN_ORDERING, (), "i")):
        if name not in tensors:
            raise InputError(f"{file}: tensor {name} is missing; make a table with `cluster --output`")
        dtype, shape = tensors[name].dtype, tensors[name].shape
        if dtype.kind != dtype_kind or shape[1:] != columns or len(shape) != 1 + len(columns):
            raise InputError(
                f"{file}: tensor {name} is {dtype} {list(shape)}, the drafter's hidden size is"
                f" {hidden_size}; make a table for this drafter"
            )
    with np.errstate(over="ignore"):  # numbers beyond float32 become infinite, and are refused below
        table = ClusterTable(tensors[CENTROIDS].astype(np.float32), tensors[TOKEN_ORDERING].astype(np.int64))
    if len(table.token_ordering) != vocab_size:
        raise InputError(
            f"{file}: orders {len(table.token_ordering)} tokens, the drafter has {vocab_size}; make a table for this"
            " drafter"
        )
    table.check(str(file))
    top_k = metadata.get(TOP_K_KEY, "")
    if not top_k.isdecimal() or len(top_k) > 9:
        raise InputError(f"{file}: the metadata has no {TOP_K_KEY}; make a table with `cluster --output`")
    return table, int(top_k)


def work_ratios(vocab_size: int, num_clusters: int) -> np.ndarray:
    """Return multiplications of both stages over those of a dense head, when 1, 2, .. C clusters are kept.

    Args:
        vocab_size: V, in tokens.
        num_clusters: C.

    Returns:
        [C] float64.
    """
    size = TwoStageSizes.of(vocab_size, num_clusters, 1).cluster_size
    return (num_clusters + size * np.arange(1, num_clusters + 1)) / vocab_size
