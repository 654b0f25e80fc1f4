"""Pictures."""

import io
from pathlib import Path

from exporter.heads.clusters import Clustering, work
from runtime_ref.errors import InputError

FORMATS = (".png", ".svg", ".pdf")


def check_picture(file: Path) -> None:
    """Refuse a picture whose format is not known, before any work is done."""
    if file.suffix not in FORMATS:
        raise InputError(f"{file}: a picture's name ends in one of {', '.join(FORMATS)}; choose another --report")


def recall_picture(clustering: Clustering, file: Path) -> bytes:
    """Recall against work, in the format of the file's name: the chosen point, and the checkpoint's own clusters."""
    from matplotlib.figure import Figure  # takes a second to import

    tokens = len(clustering.table.token_ordering)
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    ours, top_k = clustering.recall, clustering.top_k
    x = 100 * work(tokens, len(ours))
    axes.plot(x, 100 * ours, color="black", label=f"these {len(ours)} clusters")
    theirs = clustering.checkpoint_recall
    if theirs is not None:
        axes.plot(
            100 * work(tokens, len(theirs)),
            100 * theirs,
            color="black",
            linestyle=":",
            label=f"the checkpoint's {len(theirs)}",
        )
    chosen = x[top_k - 1], 100 * ours[top_k - 1]
    axes.plot(*chosen, "o", color="black")
    axes.annotate(
        f"{top_k} clusters kept:\n{chosen[1]:.1f} % survive, for {chosen[0]:.1f} % of the dense head's work",
        chosen,
        xytext=(0.97, 0.35),
        textcoords="axes fraction",
        horizontalalignment="right",
        arrowprops={"arrowstyle": "-", "color": "gray"},
    )
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g} %")
    axes.yaxis.set_major_formatter("{x:g} %")
    axes.set_xlabel("multiplications, as a share of the dense head's (1, 2, 3 .. clusters kept)")
    axes.set_ylabel("drafts whose best token survives")
    axes.set_title(f"Two-stage logits: {clustering.num_states} states, {clustering.states}")
    axes.grid(color="0.9")
    axes.legend(loc="lower right", frameon=False)
    stream = io.BytesIO()
    figure.savefig(stream, format=file.suffix.removeprefix("."), dpi=150)
    return stream.getvalue()
