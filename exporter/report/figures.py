"""The pictures of the report page: SVG that lies in the page, in its colours and its font.

Each is narrow, so that its text is legible where the page is 360 pixels wide, and says what it shows without colour.
"""

import html
import io
import re
from collections.abc import Callable, Sequence
from typing import Any

from exporter.files import human_bytes

WIDTH = 3.5  # inches; at 72 units an inch a phone shows a unit a little larger than a pixel
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
FEW = 20  # drafts below which a share is marked as one of few
# Behind text that lies on lines.
PAPER: dict[str, Any] = {"bbox": {"boxstyle": "square,pad=0.15", "fc": "white", "ec": "none"}, "zorder": 5}
COMPUTED: dict[str, Any] = {"ha": "center", "style": "italic"}

Facts = dict[str, Any]


def _svg(name: str, height: float, draw: Callable[[Any], str]) -> str:
    """What `draw` puts on axes, as an SVG element; it returns the picture in one sentence, for who cannot see it."""
    import matplotlib  # takes a second to import
    from matplotlib.figure import Figure

    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        axes = figure.subplots()
        label = html.escape(draw(axes))
        stream = io.StringIO()
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    svg = stream.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.S)
    svg = re.sub(r' xmlns:\w+="[^"]*"', "", svg).replace("xlink:href", "href")
    svg = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{name}-", svg)  # ids are of the whole page
    size = re.search(r'viewBox="[^"]*"', svg)
    svg = f'<svg role="img" aria-label="{label}" {size and size[0]}{svg[svg.index(">") :]}'
    return svg.replace("#000000", "currentColor").replace("#ffffff", "var(--paper)")


def acceptance(facts: Facts) -> str:
    """Share of drafts accepted by position, as bars; of those after accepted ones only, as a line."""
    drafting = facts["measured"]["drafting"]
    rows, shown = drafting["longest"]["by_position"], drafting["num_draft_tokens"]
    positions = [row["position"] for row in rows]

    def draw(axes: Any) -> str:
        shares = [100 * row["accepted_share"] for row in rows]
        axes.bar(positions, shares, 0.75, facecolor="none", edgecolor="black", linewidth=0.8, hatch=HATCH)
        known = [row for row in rows if row["conditional"] is not None]
        after = [100 * row["conditional"] for row in known]
        axes.plot([row["position"] for row in known], after, "-", color="black", linewidth=1.2)
        for row, share in zip(known, after, strict=True):
            axes.plot(row["position"], share, "o", color="black", markerfacecolor="black" if enough(row) else "white")
        if shown < len(rows):
            axes.axvline(shown + 0.5, color="black", linewidth=0.8, linestyle=":")
            axes.annotate(f"K = {shown}", (shown + 0.5, 108), (4, 0), textcoords="offset points", va="center")
        axes.set_ylim(0, 112)
        axes.set_yticks([0, 25, 50, 75, 100])
        names = [f"{position}\n{share:.0f} %" for position, share in zip(positions, shares, strict=True)]
        _counts(axes, positions, names if len(names) <= 9 else None)
        axes.set_xlabel("position in the round, and the bar's height")
        axes.set_ylabel("% accepted")
        return "Drafts accepted by position: " + ", ".join(f"{share:.0f} %" for share in shares)

    return _svg("acceptance", 2.5, draw)


def rounds(facts: Facts) -> str:
    """How many rounds gave so many tokens."""
    found = facts["measured"]["drafting"]["rounds"]
    given = [row["tokens"] for row in found["distribution"]]

    def draw(axes: Any) -> str:
        shares = [100 * row["rounds"] / found["rounds"] for row in found["distribution"]]
        axes.bar(given, shares, 0.75, facecolor="none", edgecolor="black", linewidth=0.8, hatch=HATCH)
        if len(given) <= 10:
            for row, share in zip(found["distribution"], shares, strict=True):
                place = row["tokens"], share
                axes.annotate(f"{row['rounds']}", place, (0, 4), textcoords="offset points", ha="center", **PAPER)
        top = 1.3 * max(shares)
        axes.axvline(found["mean"], 0, 0.88, color="black", linewidth=1.2, linestyle="--")
        axes.annotate(f"mean {found['mean']:.2f}", (found["mean"], top), ha="center", va="top")
        axes.set_ylim(0, top)
        _counts(axes, given)
        axes.set_xlabel("tokens that a round gave")
        axes.set_ylabel("% of rounds")
        counts = (f"{row['rounds']} rounds gave {row['tokens']}" for row in found["distribution"])
        return f"Tokens a round: mean {found['mean']:.2f}; " + ", ".join(counts)

    return _svg("rounds", 2.5, draw)


def speed(facts: Facts) -> str:
    """Tokens a second against K: measured as points with their range, computed as a line, and what auto chose."""
    found = facts["measured"]["speed"]
    auto, most = found["auto"], facts["num_draft_tokens"]["max"]

    def draw(axes: Any) -> str:
        rows = found["measured"]
        plain = rows[0]["tokens_per_second"]["median"]
        line = [(0, plain), *((row["num_draft_tokens"], row["tokens_per_second"]) for row in found["computed"])]
        axes.axhline(plain, color="black", linewidth=0.7, linestyle=":")
        axes.plot(*zip(*line, strict=True), color="black", linewidth=1, linestyle="--")
        for row in rows:
            _rate(
                axes, row["num_draft_tokens"], row, "o", f"{row['times_faster']:.2f}" if row is not rows[0] else "plain"
            )
        counts, right = [*range(most + 1)], most
        names = [f"{k}" for k in counts]
        if auto is not None:
            right = most + 1 + most // 8
            _rate(axes, right, auto, "s", f"{auto['times_faster']:.2f}")
            chosen = {row["num_draft_tokens"]: row["rounds"] / auto["rounds"] for row in auto["chosen"]}
            if most <= 9:  # else there is no room
                names = [f"{k}\n{100 * chosen.get(k, 0):.0f}" for k in counts]
            counts, names = [*counts, right], [*names, "auto"]
        top = max([rate for _, rate in line] + [row["tokens_per_second"]["max"] for row in (*rows, *_known(auto))])
        axes.set_ylim(0, 1.2 * top)
        axes.annotate("computed", line[-(len(line) // 4) - 1], (0, -12), textcoords="offset points", **COMPUTED)
        _counts(axes, counts, names)
        axes.set_xlim(-0.09 * right - 0.1, 1.07 * right + 0.1)
        axes.set_xlabel("K, drafts a round" + ("; below, % of auto's rounds" if auto is not None and most <= 9 else ""))
        axes.set_ylabel("tokens a second")
        rates = [f"{row['tokens_per_second']['median']:.1f} with {row['num_draft_tokens']}" for row in rows]
        rates += [f"{row['tokens_per_second']['median']:.1f} with auto" for row in _known(auto)]
        return "Tokens a second by drafts a round: " + ", ".join(rates)

    return _svg("speed", 2.8, draw)


def _rate(axes: Any, place: float, row: Facts, marker: str, label: str) -> None:
    """A rate's median, its range as a bar behind it, and words above."""
    rate = row["tokens_per_second"]
    axes.plot([place, place], [rate["min"], rate["max"]], color="black", linewidth=2.5, alpha=0.45)
    axes.plot(place, rate["median"], marker, color="black")
    axes.annotate(label, (place, rate["max"]), (0, 4), textcoords="offset points", ha="center")


def _known(row: Facts | None) -> list[Facts]:
    return [] if row is None else [row]


def costs(facts: Facts) -> str:
    """What a pass of T tokens costs beside one of one token."""
    found = facts["measured"]["costs"]
    rows, step = found["passes"], found["draft_step"]["cost"]

    def draw(axes: Any) -> str:
        tokens, cost = [row["tokens"] for row in rows], [row["cost"] for row in rows]
        top = 1.35 * max(cost)
        axes.plot([1, max(tokens)], [1, max(tokens)], color="black", linewidth=0.8, linestyle=":")
        reach = min(max(tokens), 0.93 * top)
        axes.annotate("one by one", (reach, reach), (6, 0), textcoords="offset points", va="center", style="italic")
        axes.plot(tokens, cost, "o-", color="black", linewidth=1.2)
        if len(rows) <= 10:
            for place in zip(tokens, cost, strict=True):
                axes.annotate(f"{place[1]:.2f}", place, (0, -12), textcoords="offset points", ha="center", fontsize=7.5)
        axes.axhline(step, color="black", linewidth=1, linestyle="--")
        axes.annotate(f"a draft step: {step:.2f}", (max(tokens), step), (0, 3), textcoords="offset points", ha="right")
        axes.set_ylim(0, top)
        _counts(axes, range(1, max(tokens) + 1))
        axes.set_xlabel("tokens in one pass of the target")
        axes.set_ylabel("cost, passes of one token")
        steps = ", ".join(f"{t} tokens {c:.2f}" for t, c in zip(tokens, cost, strict=True))
        return f"Cost of a pass: {steps}; a draft step {step:.2f}"

    return _svg("costs", 2.8, draw)


def recall(facts: Facts) -> str:
    """Share of states whose best token is in the clusters kept."""
    found = facts["recall"]
    rows, kept = found["curve"], found["top_k_clusters"]

    def draw(axes: Any) -> str:
        places = [(row["top_k_clusters"], 100 * row["recall"]) for row in rows]
        axes.plot(*zip(*places, strict=True), "o-", color="black", linewidth=1.2, markersize=3)
        axes.set_xscale("log", base=2)
        axes.plot(kept, 100 * found["recall"], "s", color="black", markersize=8)
        low = min(share for _, share in places)
        axes.set_ylim(max(0, low - 8), 104)
        label = f"{kept} kept: {100 * found['recall']:.1f} %"
        late = kept * kept > found["num_clusters"]
        axes.annotate(
            label,
            (kept, 100 * found["recall"]),
            (0, -18),
            textcoords="offset points",
            ha="right" if late else "left",
            weight="bold",
        )
        powers = [count for count, _ in places if count & (count - 1) == 0]
        powers = powers[:: -(-len(powers) // 8)]
        axes.set_xticks(powers, [f"{count}" for count in powers])
        axes.minorticks_off()
        axes.set_xlabel(f"clusters kept, of {found['num_clusters']}")
        axes.set_ylabel("% of best tokens kept")
        return "Best tokens that survive: " + ", ".join(f"{share:.1f} % in {count} clusters" for count, share in places)

    return _svg("recall", 2.5, draw)


def files(facts: Facts) -> str:
    """Sizes of the bundle's files."""
    sizes = sorted(facts["files"].items(), key=lambda item: item[1])

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
            share = size / facts["total_bytes"]
            axes.annotate(
                f"{name}: {human_bytes(size)}, {share:.0%}",
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


def enough(row: Facts) -> bool:
    """Whether a share of the drafts after accepted ones is of so many that it says something."""
    return row["reached"] >= FEW


def _counts(axes: Any, counts: Sequence[int], names: Sequence[str] | None = None) -> None:
    """Ticks at whole numbers, not more than a phone has room for."""
    step = -(-len(counts) // 10)
    axes.set_xticks(list(counts)[::step], list(names or map(str, counts))[::step])
    axes.tick_params(length=2.5, width=0.7)


def _drafts(facts: Facts) -> bool:
    return facts["measured"] is not None and facts["measured"]["drafting"] is not None


def _measured(facts: Facts) -> bool:
    return facts["measured"] is not None


# Name -> whether there is something to show, and the picture of it.
FIGURES: dict[str, tuple[Callable[[Facts], bool], Callable[[Facts], str]]] = {
    "acceptance": (_drafts, acceptance),
    "rounds": (_drafts, rounds),
    "speed": (_drafts, speed),
    "costs": (_measured, costs),
    "recall": (lambda facts: facts["recall"] is not None, recall),
    "files": (lambda facts: True, files),
}
