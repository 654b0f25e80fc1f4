"""Time against bytes of ONNX Runtime's products with few bits: `python -m exporter.studies.kernel_bytes`.

Each case is a graph of 20 MatMulNBits of E2B's widest matrix, 12288 x 1536, with random integers and one scale a row:
more than a processor's caches hold. All cases are timed in turns. Whether a row is the same in passes of 2, 4 and 8
rows is compared to the last bit.
"""

import json
from typing import Any

import click
import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper
from rich.console import Console
from rich.table import Table

from exporter.bench.timing import in_turns, machine
from exporter.graphs.onnx import OPSET

CASES = ((2, 256), (2, 128), (2, 64), (2, 32), (4, 256), (4, 128), (8, 128))  # bits, numbers in a block
ROWS = (1, 2, 4, 8)  # of the input
OUTPUTS, COLUMNS, MATRICES = 12288, 1536, 20


def session(bits: int, block: int, threads: int, matrices: int) -> tuple[ort.InferenceSession, int]:
    """Make a graph of products and return it with the bytes of its weights, scales included."""
    random = np.random.default_rng(0)
    stored, nodes = [], []
    for i in range(matrices):
        numbers = random.integers(0, 256, (OUTPUTS, COLUMNS // block, block * bits // 8), dtype=np.uint8)
        scales = random.random((OUTPUTS, 1), dtype=np.float32).repeat(COLUMNS // block, axis=1)
        stored += [numpy_helper.from_array(numbers, f"w{i}"), numpy_helper.from_array(scales, f"s{i}")]
        node = helper.make_node("MatMulNBits", ["x", f"w{i}", f"s{i}"], [f"y{i}"], domain="com.microsoft")
        sizes = {"K": COLUMNS, "N": OUTPUTS, "bits": bits, "block_size": block, "accuracy_level": 4}
        node.attribute.extend(helper.make_attribute(name, size) for name, size in sizes.items())
        nodes.append(node)
    graph = helper.make_graph(
        nodes,
        "products",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", COLUMNS])],
        [helper.make_tensor_value_info(f"y{i}", TensorProto.FLOAT, ["rows", OUTPUTS]) for i in range(matrices)],
        stored,
    )
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid("com.microsoft", 1)]
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    made = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return made, sum(len(tensor.raw_data) for tensor in stored)


def measure(seconds: float, threads: int, matrices: int = MATRICES) -> list[dict[str, Any]]:
    """Time all cases in turns.

    Args:
        seconds: time budget for each of them.
        threads: threads of the runtime.
        matrices: products in a graph.

    Returns:
        For each case `bits`, `block`, `bytes`, `exact`, and `ms`, the minimum by number of rows.
    """
    sessions = {case: session(*case, threads, matrices) for case in CASES}
    x = np.random.default_rng(1).standard_normal((max(ROWS), COLUMNS), dtype=np.float32)
    calls = {
        (case, rows): lambda run=made.run, rows=rows: run(None, {"x": x[:rows]})
        for case, (made, _) in sessions.items()
        for rows in ROWS
    }
    times = in_turns(calls, seconds)
    results = []
    for case, (made, size) in sessions.items():
        whole = made.run(["y0"], {"x": x})[0]
        exact = all(np.array_equal(made.run(["y0"], {"x": x[:rows]})[0], whole[:rows]) for rows in ROWS[1:])
        ms = {rows: min(times[case, rows]) for rows in ROWS}
        results.append({"bits": case[0], "block": case[1], "bytes": size, "exact": exact, "ms": ms})
    return results


@click.command()
@click.option("--seconds", default=1.0, show_default=True, help="Time budget for each case.")
@click.option("--threads", default=2, show_default=True)
@click.option("--json", "as_json", is_flag=True)
def main(seconds: float, threads: int, as_json: bool) -> None:
    """Print times and bytes a second of products with 2, 4 and 8 bits."""
    results = measure(seconds, threads)
    if as_json:
        click.echo(json.dumps({"machine": machine(), "onnxruntime": ort.__version__, "cases": results}))
        return
    title = f"{MATRICES} matrices of {OUTPUTS} x {COLUMNS}, onnxruntime {ort.__version__}\n{machine()}, minima"
    table = Table("bits, block", "MB", *(f"{n} rows" for n in ROWS), "rows exact", title=f"{title}, {threads} threads")
    for row in results:
        times = (f"{ms:.1f} ms, {row['bytes'] / ms / 1e6:.1f} GB/s" for ms in row["ms"].values())
        name = f"{row['bits']}, {row['block']}"
        table.add_row(name, f"{row['bytes'] / 1e6:.0f}", *times, "yes" if row["exact"] else "no")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
