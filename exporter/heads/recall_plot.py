"""Plot the recall of a two-stage head against its work."""

import io
from pathlib import Path
from typing import TYPE_CHECKING

from runtime_ref.errors import InputError

if TYPE_CHECKING:  # it imports torch
    from exporter.heads.clusters import Clustering

FORMATS = (".png", ".svg", ".pdf")


def check_picture(file: Path) -> None:
    """Check the name of a plot's file before any work is done.

    Raises:
        InputError: its ending is not one of `FORMATS`.
    """
    if file.suffix not in FORMATS:
        raise InputError(f"{file}: a picture's name ends in one of {', '.join(FORMATS)}; choose another --report")


def recall_picture(clustering: "Clustering", file: Path) -> bytes:
    """Plot recall against work, with the chosen number of clusters and the checkpoint's own clusters.

    Args:
        clustering: clusters and their recall.
        file: only its ending is used, for the format: one of `FORMATS`.

    Returns:
        The content of the file.
    """
    from matplotlib.figure import Figure  # takes a second to import

    from clustering.cluster_table import work_ratios

    tokens = len(clustering.table.token_ordering)
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    recall, top_k = clustering.recall, clustering.top_k
    work_percent = 100 * work_ratios(tokens, len(recall))
    axes.plot(work_percent, 100 * recall, color="black", label=f"new clusters ({len(recall)})")
    reference = clustering.checkpoint_recall
    if reference is not None:
        axes.plot(
            100 * work_ratios(tokens, len(reference)),
            100 * reference,
            color="black",
            linestyle=":",
            label=f"the checkpoint's clusters ({len(reference)})",
        )
    chosen = work_percent[top_k - 1], 100 * recall[top_k - 1]
    axes.plot(*chosen, "o", color="black")
    axes.annotate(
        f"{top_k} clusters kept:\n{chosen[1]:.1f} % recall for {chosen[0]:.1f} % of a dense head's work",
        chosen,
        xytext=(0.97, 0.35),
        textcoords="axes fraction",
        horizontalalignment="right",
        arrowprops={"arrowstyle": "-", "color": "gray"},
    )
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g} %")
    axes.yaxis.set_major_formatter("{x:g} %")
    axes.set_xlabel("multiplications, in percent of a dense head's (1, 2, 3 .. clusters kept)")
    axes.set_ylabel("states whose best token is in a kept cluster")
    axes.set_title(f"Two-stage logits: {clustering.num_states} states, {clustering.states}")
    axes.grid(color="0.9")
    axes.legend(loc="lower right", frameon=False)
    stream = io.BytesIO()
    figure.savefig(stream, format=file.suffix.removeprefix("."), dpi=150)
    return stream.getvalue()
