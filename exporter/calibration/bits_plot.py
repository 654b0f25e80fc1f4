"""Plot bits against the divergence that they cause."""

import io
from pathlib import Path

from exporter.calibration.choice import Bits, Choice

MARKERS = "osD^v<>P"  # of the classes of matrices, of which a target has at most eight


def bits_picture(bits: Bits, chosen: Choice | None, file: Path) -> bytes:
    """Plot what each class of matrices costs by its bits, and the best choices by their bytes.

    Args:
        bits: what was measured.
        chosen: a choice to mark; None for none.
        file: only its ending is used, for the format.

    Returns:
        The content of the file.
    """
    from matplotlib.figure import Figure  # takes a second to import

    figure = Figure(figsize=(11, 5), layout="constrained")
    classes, bundles = figure.subplots(1, 2)
    for title, marker in zip(bits.classes, MARKERS, strict=False):
        costs = [cost for cost in bits.costs if cost.matrices == title and cost.kl > 0]
        places = [cost.width.bits + (8 / cost.width.group_size if cost.width.group_size else 0) for cost in costs]
        rows = sorted(zip(places, costs, strict=True), key=lambda row: row[0])
        classes.plot([row[0] for row in rows], [row[1].kl for row in rows], marker=marker, label=title)
    classes.set_xlabel("bits of a number; to the right of 4, groups of 128 and 32")
    classes.set_title("One class rounded, the others in float32")
    best = bits.choices()
    bundles.step([c.bytes / 1e6 for c in best], [c.kl for c in best], where="post", color="black", label="best choices")
    points = {**bits.named(), **({} if chosen is None else {"chosen": chosen})}
    for name, choice in points.items():
        bundles.plot(choice.bytes / 1e6, choice.kl, "o", color="black")
        bundles.annotate(name, (choice.bytes / 1e6, choice.kl), xytext=(5, 5), textcoords="offset points")
    bundles.set_xlabel("bundle, MB")
    bundles.set_title("Sum of the classes")
    for axes in (classes, bundles):
        if any(cost.kl > 0 for cost in bits.costs):
            axes.set_yscale("log")
        axes.set_ylabel("KL of the next token against float32, nats")
        axes.grid(color="0.9")
        axes.legend(frameon=False)
    figure.suptitle(f"{bits.positions} positions: {bits.held_out}", fontsize="medium")
    stream = io.BytesIO()
    figure.savefig(stream, format=file.suffix.removeprefix("."), dpi=150)
    return stream.getvalue()
