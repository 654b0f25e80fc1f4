"""The figures of the report page: SVG elements in the page's own colours and font.

Each is narrow, so that its text is legible where the page is 360 pixels wide, and none needs colour to be understood.
"""

import html
import io
import re
from collections.abc import Callable, Sequence
from typing import Any

from exporter.files import human_bytes

WIDTH_INCHES = 3.5  # an inch has 72 units; a phone shows a unit a little larger than a pixel
STYLE: Any = {
    "font.size": 8.5,
    "text.parse_math": False,  # a file may have dollars in its name
    "svg.fonttype": "none",  # text stays text: the page's font, sharp at any size, found by searching
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "hatch.linewidth": 0.7,
    "lines.markersize": 5,
}
HATCH = "////"
MIN_RELIABLE_DRAFTS = 20  # an acceptance rate of fewer drafts is drawn as a hollow dot
# Keeps text legible where it crosses lines.
LABEL_BACKGROUND: dict[str, Any] = {"bbox": {"boxstyle": "square,pad=0.15", "fc": "white", "ec": "none"}, "zorder": 5}
COMPUTED_LABEL: dict[str, Any] = {"ha": "center", "style": "italic"}

Document = dict[str, Any]  # the result of `measure_report`, or a part of it


def _svg(name: str, height: float, draw: Callable[[Any], str]) -> str:
    """Return what `draw` puts on axes as an SVG element.

    Args:
        name: prefix of the element's ids, which must be unique in the page.
        height: height in inches.
        draw: draws on axes, and returns a text alternative for readers who cannot see the figure.
    """
    import matplotlib  # takes a second to import
    from matplotlib.figure import Figure

    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=(WIDTH_INCHES, height), layout="constrained")
        axes = figure.subplots()
        label = html.escape(draw(axes))
        stream = io.StringIO()
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    svg = stream.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.S)
    svg = re.sub(r' xmlns:\w+="[^"]*"', "", svg).replace("xlink:href", "href")
    svg = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{name}-", svg)  # ids must be unique in the whole page
    size = re.search(r'viewBox="[^"]*"', svg)
    svg = f'<svg role="img" aria-label="{label}" {size and size[0]}{svg[svg.index(">") :]}'
    return svg.replace("#000000", "currentColor").replace("#ffffff", "var(--paper)")


def acceptance(document: Document) -> str:
    """Draw the acceptance rate by position: of all drafts as bars, of drafts after accepted ones only as a line."""
    drafting = document["measured"]["drafting"]
    rows, shown = drafting["longest"]["by_position"], drafting["num_draft_tokens"]
    positions = [row["position"] for row in rows]

    def draw(axes: Any) -> str:
        percentages = [100 * row["accepted_share"] for row in rows]
        axes.bar(positions, percentages, 0.75, facecolor="none", edgecolor="black", linewidth=0.8, hatch=HATCH)
        known = [row for row in rows if row["conditional"] is not None]
        after = [100 * row["conditional"] for row in known]
        axes.plot([row["position"] for row in known], after, "-", color="black", linewidth=1.2)
        for row, percentage in zip(known, after, strict=True):
            fill = "black" if is_reliable(row) else "white"
            axes.plot(row["position"], percentage, "o", color="black", markerfacecolor=fill)
        if shown < len(rows):
            axes.axvline(shown + 0.5, color="black", linewidth=0.8, linestyle=":")
            axes.annotate(f"K = {shown}", (shown + 0.5, 108), (4, 0), textcoords="offset points", va="center")
        axes.set_ylim(0, 112)
        axes.set_yticks([0, 25, 50, 75, 100])
        names = [f"{position}\n{height:.0f} %" for position, height in zip(positions, percentages, strict=True)]
        _whole_ticks(axes, positions, names if len(names) <= 9 else None)
        axes.set_xlabel("position in the round; below, the bar's height")
        axes.set_ylabel("% accepted")
        return "Drafts accepted by position: " + ", ".join(f"{height:.0f} %" for height in percentages)

    return _svg("acceptance", 2.5, draw)


def rounds(document: Document) -> str:
    """Draw how many rounds added how many tokens."""
    counted = document["measured"]["drafting"]["rounds"]
    rows, mean = counted["distribution"], counted["mean"]
    tokens = [row["tokens"] for row in rows]

    def draw(axes: Any) -> str:
        percentages = [100 * row["rounds"] / counted["rounds"] for row in rows]
        axes.bar(tokens, percentages, 0.75, facecolor="none", edgecolor="black", linewidth=0.8, hatch=HATCH)
        if len(rows) <= 10:
            for row, percentage in zip(rows, percentages, strict=True):
                place, style = (row["tokens"], percentage), {"textcoords": "offset points", "ha": "center"}
                axes.annotate(f"{row['rounds']}", place, (0, 4), **style, **LABEL_BACKGROUND)
        top = 1.3 * max(percentages)
        axes.axvline(mean, 0, 0.88, color="black", linewidth=1.2, linestyle="--")
        axes.annotate(f"mean {mean:.2f}", (mean, top), ha="center", va="top")
        axes.set_ylim(0, top)
        _whole_ticks(axes, tokens)
        axes.set_xlabel("tokens that a round added")
        axes.set_ylabel("% of rounds")
        counts = (f"{row['rounds']} rounds added {row['tokens']}" for row in rows)
        return f"Tokens per round: mean {mean:.2f}; " + ", ".join(counts)

    return _svg("rounds", 2.5, draw)


def speed(document: Document) -> str:
    """Draw tokens per second by K: measured, as points with their range; computed, as a line; and what auto chose."""
    rates = document["measured"]["speed"]
    auto, max_drafts = rates["auto"], document["num_draft_tokens"]["max"]

    def draw(axes: Any) -> str:
        rows = rates["measured"]
        plain = rows[0]["tokens_per_second"]["median"]
        line = [(0, plain), *((row["num_draft_tokens"], row["tokens_per_second"]) for row in rates["computed"])]
        axes.axhline(plain, color="black", linewidth=0.7, linestyle=":")
        axes.plot(*zip(*line, strict=True), color="black", linewidth=1, linestyle="--")
        for row in rows:
            label = f"{row['times_faster']:.2f}" if row is not rows[0] else "plain"
            _draw_rate(axes, row["num_draft_tokens"], row, "o", label)
        counts, right = [*range(max_drafts + 1)], max_drafts
        names = [f"{k}" for k in counts]
        if auto is not None:
            right = max_drafts + 1 + max_drafts // 8
            _draw_rate(axes, right, auto, "s", f"{auto['times_faster']:.2f}")
            chosen = {row["num_draft_tokens"]: row["rounds"] / auto["rounds"] for row in auto["chosen"]}
            if max_drafts <= 9:  # else there is no room
                names = [f"{k}\n{100 * chosen.get(k, 0):.0f}" for k in counts]
            counts, names = [*counts, right], [*names, "auto"]
        drawn = [*rows, *([] if auto is None else [auto])]
        top = max([rate for _, rate in line] + [row["tokens_per_second"]["max"] for row in drawn])
        axes.set_ylim(0, 1.2 * top)
        axes.annotate("computed", line[-(len(line) // 4) - 1], (0, -12), textcoords="offset points", **COMPUTED_LABEL)
        _whole_ticks(axes, counts, names)
        axes.set_xlim(-0.09 * right - 0.1, 1.07 * right + 0.1)
        below = "; below, % of auto's rounds" if auto is not None and max_drafts <= 9 else ""
        axes.set_xlabel(f"K, drafts per round{below}")
        axes.set_ylabel("tokens per second")
        medians = [
            f"{row['tokens_per_second']['median']:.1f} with {row.get('num_draft_tokens', 'auto')}" for row in drawn
        ]
        return "Tokens per second by drafts per round: " + ", ".join(medians)

    return _svg("speed", 2.8, draw)


def _draw_rate(axes: Any, x: float, row: Document, marker: str, label: str) -> None:
    """Draw the median of a rate, its range as a bar behind it, and a label above."""
    rate = row["tokens_per_second"]
    axes.plot([x, x], [rate["min"], rate["max"]], color="black", linewidth=2.5, alpha=0.45)
    axes.plot(x, rate["median"], marker, color="black")
    axes.annotate(label, (x, rate["max"]), (0, 4), textcoords="offset points", ha="center")


def costs(document: Document) -> str:
    """Draw the cost of a pass over T tokens, relative to a pass over one token."""
    measured = document["measured"]["costs"]
    rows, step = measured["passes"], measured["draft_step"]["cost"]

    def draw(axes: Any) -> str:
        tokens, cost = [row["tokens"] for row in rows], [row["cost"] for row in rows]
        top = 1.35 * max(cost)
        axes.plot([1, max(tokens)], [1, max(tokens)], color="black", linewidth=0.8, linestyle=":")
        end = min(max(tokens), 0.93 * top)
        axes.annotate("one by one", (end, end), (6, 0), textcoords="offset points", va="center", style="italic")
        axes.plot(tokens, cost, "o-", color="black", linewidth=1.2)
        if len(rows) <= 10:
            for place in zip(tokens, cost, strict=True):
                axes.annotate(f"{place[1]:.2f}", place, (0, -12), textcoords="offset points", ha="center", fontsize=7.5)
        axes.axhline(step, color="black", linewidth=1, linestyle="--")
        axes.annotate(f"a draft step: {step:.2f}", (max(tokens), step), (0, 3), textcoords="offset points", ha="right")
        axes.set_ylim(0, top)
        _whole_ticks(axes, range(1, max(tokens) + 1))
        axes.set_xlabel("tokens in one pass of the target")
        axes.set_ylabel("cost (pass of one token: 1)")
        steps = ", ".join(f"{t} tokens {c:.2f}" for t, c in zip(tokens, cost, strict=True))
        return f"Cost of a pass: {steps}; a draft step {step:.2f}"

    return _svg("costs", 2.8, draw)


def recall(document: Document) -> str:
    """Draw the percentage of states whose best token is in the clusters kept, by how many those are."""
    measured = document["recall"]
    rows, kept, percentage = measured["curve"], measured["top_k_clusters"], 100 * measured["recall"]

    def draw(axes: Any) -> str:
        places = [(row["top_k_clusters"], 100 * row["recall"]) for row in rows]
        axes.plot(*zip(*places, strict=True), "o-", color="black", linewidth=1.2, markersize=3)
        axes.set_xscale("log", base=2)
        axes.plot(kept, percentage, "s", color="black", markersize=8)
        lowest = min(y for _, y in places)
        axes.set_ylim(max(0, lowest - 8), 104)
        # Beside the square, on the side with more room: the axis is logarithmic.
        side = "right" if kept * kept > measured["num_clusters"] else "left"
        axes.annotate(
            f"{kept} kept: {percentage:.1f} %",
            (kept, percentage),
            (0, -18),
            textcoords="offset points",
            ha=side,
            weight="bold",
        )
        powers = [count for count, _ in places if count & (count - 1) == 0]
        powers = powers[:: -(-len(powers) // 8)]
        axes.set_xticks(powers, [f"{count}" for count in powers])
        axes.minorticks_off()
        axes.set_xlabel(f"clusters kept, of {measured['num_clusters']}")
        axes.set_ylabel("% of best tokens kept")
        return "Best tokens kept: " + ", ".join(f"{y:.1f} % in {count} clusters" for count, y in places)

    return _svg("recall", 2.5, draw)


def files(document: Document) -> str:
    """Draw the sizes of the bundle's files."""
    sizes = sorted(document["files"].items(), key=lambda item: item[1])

    def draw(axes: Any) -> str:
        largest = max(size for _, size in sizes)
        axes.barh(
            range(len(sizes)),
            [size for _, size in sizes],
            0.38,
            facecolor="none",
            edgecolor="black",
            linewidth=0.8,
            hatch=HATCH,
        )
        for row, (name, size) in enumerate(sizes):
            axes.annotate(
                f"{name}: {human_bytes(size)}, {size / document['total_bytes']:.0%}",
                (0, row + 0.25),
                (1, 0),
                textcoords="offset points",
                va="bottom",
                annotation_clip=False,
            )
        axes.set_xlim(0, largest)
        axes.set_ylim(-0.4, len(sizes) - 0.2)
        axes.set_axis_off()
        return "Files: " + ", ".join(f"{name} {human_bytes(size)}" for name, size in reversed(sizes))

    return _svg("files", 0.2 + 0.36 * len(sizes), draw)


def is_reliable(row: Document) -> bool:
    """Return whether the rate of drafts after accepted ones at a position is of at least `MIN_RELIABLE_DRAFTS`."""
    return row["reached"] >= MIN_RELIABLE_DRAFTS


def _whole_ticks(axes: Any, counts: Sequence[int], names: Sequence[str] | None = None) -> None:
    """Set ticks at whole numbers, no more than fit on a phone."""
    step = -(-len(counts) // 10)
    axes.set_xticks(list(counts)[::step], list(names or map(str, counts))[::step])
    axes.tick_params(length=2.5, width=0.7)


def _has_drafts(document: Document) -> bool:
    return document["measured"] is not None and document["measured"]["drafting"] is not None


def _has_measurements(document: Document) -> bool:
    return document["measured"] is not None


# Name -> whether the document has the figure's data, and the function that draws it.
FIGURES: dict[str, tuple[Callable[[Document], bool], Callable[[Document], str]]] = {
    "acceptance": (_has_drafts, acceptance),
    "rounds": (_has_drafts, rounds),
    "speed": (_has_drafts, speed),
    "costs": (_has_measurements, costs),
    "recall": (lambda document: document["recall"] is not None, recall),
    "files": (lambda document: True, files),
}
