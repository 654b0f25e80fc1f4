"""The exported program: one copy of the weights, the cache outside of it, the arithmetic delegated to XNNPACK.

ExecuTorch is imported where it is used: it takes seconds, also in runs that leave these tests out.
"""

import json
import shutil
from collections.abc import Callable
from math import prod
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from exporter.bundle.export import ExportOptions, export_bundle
from exporter.checkpoint.pair import open_pair
from exporter.graphs.executorch_ops import gelu, top_k
from exporter.graphs.parts import graph_parts
from exporter.parity.stages import run_parity
from exporter.quantization.recipes import RECIPES
from exporter.studies.programs import lowered
from runtime_ref.engine import load_engine
from runtime_ref.errors import InputError
from runtime_ref.manifest import read_manifest
from tests.exports import MAX_SEQ_LEN

pytestmark = pytest.mark.lowering

Pairs = Callable[[str], tuple[Path, Path]]


def test_weights_are_stored_once(bundle: Callable[..., Path], pair_dirs: Pairs) -> None:
    """The program holds each weight once, also the token embedding, and neither the cache nor PLE."""
    from executorch.exir._serialize._program import deserialize_pte_binary

    parts = graph_parts(open_pair(*pair_dirs("odd")), RECIPES["fp32"])
    weights = sum(4 * prod(part.shapes[name]) for part in parts.values() for name in part.weights)
    file = bundle("odd", "executorch") / "model.pte"
    program = deserialize_pte_binary(file.read_bytes())
    assert program.named_data is not None
    blobs = [b.storage for b in program.program.constant_buffer] + program.named_data.buffers
    large = [blob for blob in blobs if len(blob) >= 4096]
    assert len(set(large)) == len(large), "a weight is stored twice"
    assert weights <= sum(map(len, blobs)) < 1.001 * weights
    assert file.stat().st_size < weights + 200_000  # the rest is the two methods


def test_drafter_head_stays_sparse(bundle: Callable[..., Path]) -> None:
    """No tensor of the method has V as a dimension; the embeddings of a cluster are one row of the head's weight."""
    from executorch.exir._serialize._program import deserialize_pte_binary
    from executorch.exir.schema import Tensor as PteTensor

    path = bundle("odd", "executorch")
    manifest = json.loads((path / "manifest.json").read_text())
    vocab_size, sizes = manifest["target"]["vocab_size"], manifest["two_stage"]
    program = deserialize_pte_binary((path / "model.pte").read_bytes()).program
    plan = next(plan for plan in program.execution_plan if plan.name == "drafter")
    shapes = [value.val.sizes for value in plan.values if isinstance(value.val, PteTensor)]
    assert [shape for shape in shapes if vocab_size in shape] == []
    width = manifest["drafter"]["text"]["hidden_size"]
    assert [sizes["num_clusters"], sizes["cluster_size"] * width] in shapes


def test_cache_is_no_part_of_the_program(bundle: Callable[..., Path]) -> None:
    """Methods take the cache as inputs that no memory is planned for, and do not return it."""
    from executorch.runtime import Runtime

    manifest = json.loads((bundle("odd", "executorch") / "manifest.json").read_text())
    program = Runtime.get().load_program(bundle("odd", "executorch") / "model.pte")
    for name, graph in manifest["graphs"].items():
        method = program.metadata(name)
        assert method.num_inputs() == len(graph["inputs"])
        assert method.num_outputs() == len(graph["outputs"])
        planned = [method.input_tensor_meta(i).is_memory_planned() for i in range(method.num_inputs())]
        assert not any(planned)
        assert not any(port["name"].endswith("_out") for port in graph["outputs"])


def test_xnnpack_does_the_arithmetic(bundle: Callable[..., Path]) -> None:
    """The target has a delegate for each storing layer, one for all KV-shared layers, and a few before and after them.

    The drafter has one before its layers, one for the layers, one for the centroids, one for the rows of the kept
    clusters, and one for ties. Row reads and masks stay with the portable kernels: a layer has one such operation, one
    that stores K and V six more.
    """
    manifest = json.loads((bundle("odd", "executorch") / "manifest.json").read_text())
    target, drafter = (manifest["backend"]["delegation"][name] for name in ("target", "drafter"))
    storing, layers = len(manifest["kv"]["buffers"]) // 2, manifest["target"]["num_hidden_layers"]
    assert target["delegates"] <= storing + 4
    assert target["portable_ops"] <= 93 + layers + 6 * storing
    assert drafter["delegates"] <= 5
    assert drafter["portable_ops"] <= 58
    assert target["portable_weight_bytes"] < 0.01 * target["delegated_weight_bytes"]
    arithmetic = {"bmm", "mm", "addmm", "linear", "_softmax", "gelu", "tanh", "sigmoid", "rsqrt", "mean"}
    for method in (target, drafter):
        assert not arithmetic & method["portable_ops_by_name"].keys()


@pytest.mark.xdist_group("lowering int8")
def test_the_same_pair_gives_the_same_bytes(bundle: Callable[..., Path], pair_dirs: Pairs, tmp_path: Path) -> None:
    options = ExportOptions("executorch", RECIPES["int8"], max_seq_len=MAX_SEQ_LEN)
    export_bundle(open_pair(*pair_dirs("tiny")), tmp_path / "again", options)
    for file in bundle("tiny", "executorch", "int8").iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes(), file.name


def test_parity_sees_one_changed_weight(bundle: Callable[..., Path], pair_dirs: Pairs, tmp_path: Path) -> None:
    """Parity fails when the lowest bit of one weight differs."""
    broken = Path(shutil.copytree(bundle("odd", "executorch"), tmp_path / "broken"))
    pair = open_pair(*pair_dirs("odd"))
    table = pair.target_weights["layers.1.mlp.up_proj.weight"]().numpy().tobytes()
    content = bytearray((broken / "model.pte").read_bytes())
    content[content.index(table) + len(table) // 2] ^= 1
    (broken / "model.pte").write_bytes(content)
    failed = [check for check in run_parity(broken, pair, [[5]], 2) if not check.passed]
    assert [check.stage for check in failed][:2] == ["files", "weights"]
    assert "layers.1.mlp.up_proj.weight" in failed[1].detail


def test_a_program_that_cannot_be_loaded_is_one_line(bundle: Callable[..., Path], tmp_path: Path) -> None:
    broken = Path(shutil.copytree(bundle("odd", "executorch"), tmp_path / "broken"))
    content = bytearray((broken / "model.pte").read_bytes())
    content[:64] = bytes(64)
    (broken / "model.pte").write_bytes(content)
    with pytest.raises(InputError, match=r"model.pte: ExecuTorch cannot load it \([^\n]*\); export it again$"):
        load_engine(broken, read_manifest(broken))


class Function(nn.Module):
    """A module that calls a function, because only modules can be traced."""

    def __init__(self, function: Callable[..., object]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: torch.Tensor) -> object:
        return self.function(*inputs)


def test_gelu_is_tanh_gelu() -> None:
    """XNNPACK's own lowering of GELU is erf-GELU, which differs by up to 4.7e-4."""
    x = torch.linspace(-12, 12, 1024).reshape(8, 128)
    expected = torch.nn.functional.gelu(x.double(), approximate="tanh")
    (actual,) = lowered(Function(gelu), x)(x)
    assert (actual.double() - expected).abs().max() < 2e-6


@pytest.mark.parametrize(("size", "k"), [(70, 64), (1000, 3), (2048, 8)], ids=["one block", "padded", "blocks"])
def test_top_k_keeps_the_lower_of_equal_values(size: int, k: int) -> None:
    """Equal values are in one block and in several; some rows have only one value, or values one float32 apart."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(-2, 3, (40, size), generator=generator).float()
    rows[::5] = torch.randn((8, size), generator=generator)
    rows[1], rows[2], rows[3] = 30.0, -30.0, 0.0
    rows[4] = -rows[0].abs() * 1e-6
    rows[6] = torch.nextafter(torch.tensor(30.0), torch.tensor(0.0))
    rows[6, 9] = 30.0
    values, ids = lowered(Function(lambda x: top_k(x, k)), rows)(rows)
    for row, actual_values, actual_ids in zip(rows.numpy(), values.numpy(), ids.numpy(), strict=True):
        expected_ids = np.lexsort((np.arange(size), -row))[:k]
        assert actual_ids.tolist() == expected_ids.tolist()
        assert np.array_equal(actual_values, row[expected_ids])
