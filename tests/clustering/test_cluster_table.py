"""The cluster table, and the file that holds one."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from clustering.cluster_table import CENTROIDS, TOKEN_ORDERING, ClusterTable, TwoStageSizes, load_table
from runtime_ref.errors import InputError

TABLE = ClusterTable(np.arange(12, dtype=np.float32).reshape(3, 4), np.array([7, 2, 0, 1, 5, 6, 3, 4]))


def test_clusters_are_filled_up_with_their_first_token() -> None:
    assert TABLE.members.tolist() == [[0, 2, 7], [1, 5, 6], [3, 4, 3]]
    assert TABLE.sizes(2).cluster_size == 3


def test_file_round_trip(tmp_path: Path) -> None:
    (tmp_path / "table").write_bytes(TABLE.to_bytes(2))
    table, top_k = load_table(tmp_path / "table", 8, 4)
    assert top_k == 2
    assert np.array_equal(table.centroids, TABLE.centroids)
    assert np.array_equal(table.token_ordering, TABLE.token_ordering)


BROKEN = {
    "twice": ({TOKEN_ORDERING: np.array([7, 2, 0, 1, 5, 6, 3, 3])}, r"not a permutation of 0\.\.7"),
    "other vocabulary": ({TOKEN_ORDERING: np.arange(9)}, r"orders 9 tokens, the drafter has 8"),
    "other hidden size": (
        {CENTROIDS: np.ones((3, 5), np.float32)},
        r"float32 \[3, 5\], the drafter's hidden size is 4",
    ),
    "no clusters": ({CENTROIDS: np.ones((0, 4), np.float32)}, r"0 clusters of 8 tokens"),
    "more clusters than tokens": ({CENTROIDS: np.ones((9, 4), np.float32)}, r"9 clusters of 8 tokens"),
    "not finite": ({CENTROIDS: np.full((3, 4), np.inf, np.float32)}, r"centroids hold NaN or infinity"),
    "numbers for ids": ({TOKEN_ORDERING: np.arange(8, dtype=np.float32)}, r"token_ordering is float32"),
    "far from finite": ({CENTROIDS: np.full((3, 4), 1e300)}, r"centroids hold NaN or infinity"),
    "no ordering": ({TOKEN_ORDERING: None}, r"token_ordering is missing"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_tables(name: str, tmp_path: Path) -> None:
    changes, message = BROKEN[name]
    tensors = {CENTROIDS: TABLE.centroids, TOKEN_ORDERING: TABLE.token_ordering, **changes}
    save_file(
        {k: v for k, v in tensors.items() if v is not None}, tmp_path / "table", {"centroid_intermediate_top_k": "2"}
    )
    with pytest.raises(InputError, match=message):
        load_table(tmp_path / "table", 8, 4)


def test_files_that_are_no_cluster_table(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a readable cluster table"):
        load_table(tmp_path / "absent", 8, 4)
    (tmp_path / "text").write_text("no")
    with pytest.raises(InputError, match="not a readable cluster table"):
        load_table(tmp_path / "text", 8, 4)
    save_file({CENTROIDS: TABLE.centroids, TOKEN_ORDERING: TABLE.token_ordering}, tmp_path / "bare")
    with pytest.raises(InputError, match="metadata has no centroid_intermediate_top_k"):
        load_table(tmp_path / "bare", 8, 4)


@pytest.mark.parametrize(("clusters", "kept"), [(0, 1), (9, 1), (3, 0), (3, 4)])
def test_sizes_that_cannot_be(clusters: int, kept: int) -> None:
    with pytest.raises(InputError, match=r"expected 1 to"):
        TwoStageSizes.of(8, clusters, kept)
