"""Compares what run.py wrote on two machines, prints tables and writes them as JSON; exit status 1 if one is wrong.

    compare.py OURS THEIRS OUTPUT NAME...

OURS/NAME.json and .npz are of this machine, THEIRS/NAME of the other. Differences of logits and states are told, not
judged; so are other tokens of recipes of few bits. Judged are tokens of float32, that drafting changes no text, and
that a row is the same to the last bit whatever is verified with it.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from run import distance

OUTPUTS = ("logits", "ids", "state")
Texts = list[dict[str, Any]]


def main(ours: str, theirs: str, output: str, *names: str) -> int:
    found = {name: compared(name, Path(ours) / name, Path(theirs) / name) for name in names}
    Path(output).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    lines = [("bundle", "texts", "tokens", "texts that differ", "rows", "ids differ", "logits", "state", "seconds")]
    lines += [(name, *map(shown, facts["between"].values())) for name, facts in found.items()]
    print("\nTokens here and on aarch64, and the target's outputs for the same inputs\n")
    print(aligned(lines))
    print(
        "\nRows that are not the same to the last bit alone and in a pass of so many tokens, and how far states are\n"
    )
    sides = [side for facts in found.values() for side in facts["rows"].values()]
    tokens = sorted({row["tokens"] for side in sides for row in side["passes"]})
    lines = [("bundle", "machine", "passes filled up to", *map(str, tokens))]
    for name, facts in found.items():
        for machine, side in facts["rows"].items():
            lines.append((name, machine, str(side["row_multiple"]), *map(unlike, side["passes"])))
    print(aligned(lines) + "\n")
    for line in (line for facts in found.values() for line in facts["told"]):
        print(f"told: {line}")
    wrong = [line for facts in found.values() for line in facts["wrong"]]
    for line in wrong:
        print(f"DIFFERENT: {line}")
    return 1 if wrong else 0


def compared(name: str, ours: Path, theirs: Path) -> dict[str, Any]:
    """The facts of one bundle."""
    us, them = (json.loads(Path(f"{path}.json").read_text(encoding="utf-8")) for path in (ours, theirs))
    alone = []
    for path in (ours, theirs):
        arrays = np.load(f"{path}.npz")
        alone.append(list(zip(*(arrays[output] for output in OUTPUTS), strict=True)))
    apart = [distance(*pair) for pair in zip(*alone, strict=True)]
    differ = differing(us["texts"], them["texts"], f"{name}, here and on {them['machine']}")
    inside = [line for side in (us, them) for line in drafting_differs(side["texts"], f"{name}, {side['machine']}")]
    # Their products round activations to 8 bits, each processor's kernels in a way of their own: KleidiAI's on ARM a
    # row at once, others in blocks. What is rounded otherwise early in the network is another number at its end.
    other_rounding = them["recipe"] != "fp32"
    return {
        "between": {
            "texts": len(us["texts"]),
            "tokens": sum(len(text["tokens"]) for text in us["texts"]),
            "texts_that_differ": len(differ),
            "rows": len(apart),
            "rows_whose_ids_differ": sum(one["ids_differ"] for one in apart),
            "largest_logit_difference": max(one["logits"] for one in apart),
            "largest_state_difference": max(one["state"] for one in apart),
            "seconds": them["seconds"],
        },
        "rows": {
            machine: {"row_multiple": side["row_multiple"], "passes": side["rows"]}
            for machine, side in (("here", us), (them["machine"], them))
        },
        "told": differ if other_rounding else [],
        "wrong": inside + rows_differ(name, us, them) + ([] if other_rounding else differ),
    }


def rows_differ(name: str, *sides: dict[str, Any]) -> list[str]:
    """A line for each pass that computes a row in another way than alone: drafting could change a text then."""
    told = "{}, {}: {differ} of {rows} rows, alone and in a pass of {tokens} tokens"
    return [told.format(name, side["machine"], **row) for side in sides for row in side["rows"] if row["differ"]]


def differing(ours: Texts, theirs: Texts, what: str) -> list[str]:
    """A line for each text whose tokens are not the same."""
    return [
        f"{what}: {a['prompt']!r} {a['way']}, {a['drafts']} drafts, from token {first(a['tokens'], b['tokens'])} on"
        for a, b in zip(ours, theirs, strict=True)
        if a["tokens"] != b["tokens"]
    ]


def drafting_differs(texts: Texts, what: str) -> list[str]:
    """A line for each text that drafting changed."""
    plain = {(text["prompt"], text["way"]): text["tokens"] for text in texts if not text["drafts"]}
    found = []
    for text in texts:
        expected = plain[text["prompt"], text["way"]]
        if text["tokens"] != expected:
            place = f"{text['prompt']!r} {text['way']}, from token {first(expected, text['tokens'])} on"
            found.append(f"{what}, plain and speculative: {place}")
    return found


def first(ours: list[int], theirs: list[int]) -> int:
    """Where two texts part."""
    parted = (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b)
    return next(parted, min(len(ours), len(theirs)))


def unlike(facts: dict[str, Any]) -> str:
    told = f"{facts['differ']} of {facts['rows']}"
    return f"{told}, {facts['state']:.0e}" if facts["differ"] else told


def shown(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.1e}" if value < 1 else f"{value:.1f}"


def aligned(lines: list[tuple[str, ...]]) -> str:
    """Lines as columns."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rows = ("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)
    return "\n".join(row.rstrip() for row in rows)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
