"""Compares what run.py wrote on two machines, prints a table and writes it as JSON; exit status 1 if tokens differ.

    compare.py OURS THEIRS OUTPUT NAME...

OURS/NAME.json and .npz are of this machine, THEIRS of the other. Differences of logits and states are told, not judged.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from run import distance

OUTPUTS = ("logits", "ids", "state")


def main(ours: str, theirs: str, output: str, *names: str) -> int:
    found = {name: compared(Path(ours) / name, Path(theirs) / name) for name in names}
    Path(output).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    machines = next(iter(found.values()))["machines"]
    print(f"\n{' and '.join(machines)}: tokens, and rows of the target's outputs for the same inputs\n")
    lines = [("bundle", "texts", "tokens", "texts differ", "rows", "ids differ", "logits", "state", "seconds")]
    lines += [(name, *map(shown, facts["table"].values())) for name, facts in found.items()]
    print(aligned(lines))
    print("\nrows that are not the same to the last bit in a pass of so many tokens as alone, and by how much logits\n")
    lines = [("bundle", "machine", *(f"{count} tokens" for count in next(iter(found.values()))["rows"][machines[0]]))]
    for name, facts in found.items():
        for machine, passes in facts["rows"].items():
            told = (f"{p['differ']} of {p['rows']}, {p['logits']:.1e}" for p in passes.values())
            lines.append((name, machine, *(text.replace(", 0.0e+00", "") for text in told)))
    print(aligned(lines) + "\n")
    wrong = [line for facts in found.values() for line in facts["wrong"]]
    for line in wrong:
        print(f"TOKENS DIFFER: {line}")
    return 1 if wrong else 0


def compared(ours: Path, theirs: Path) -> dict[str, Any]:
    """The facts of one bundle."""
    us, them = (json.loads(path.with_suffix(".json").read_text(encoding="utf-8")) for path in (ours, theirs))
    arrays = [np.load(path.with_suffix(".npz")) for path in (ours, theirs)]
    apart = [
        distance(*pair)
        for pair in zip(*(list(zip(*(a[n] for n in OUTPUTS), strict=True)) for a in arrays), strict=True)
    ]
    between = differing(us["texts"], them["texts"], f"{ours.name}: {us['machine']} and {them['machine']}")
    inside = [
        line for side in (us, them) for line in drafting_differs(side["texts"], f"{ours.name}: {side['machine']}")
    ]
    return {
        "machines": [us["machine"], them["machine"]],
        "table": {
            "texts": len(us["texts"]),
            "tokens": sum(len(text["tokens"]) for text in us["texts"]),
            "texts_differ": len(between),
            "rows": len(apart),
            "rows_ids_differ": sum(one["ids_differ"] for one in apart),
            "largest_logit_difference": max(one["logits"] for one in apart),
            "largest_state_difference": max(one["state"] for one in apart),
            "seconds": them["seconds"],
        },
        "rows": {side["machine"]: side["rows"] for side in (us, them)},
        "wrong": between + inside,
    }


def differing(ours: list[dict[str, Any]], theirs: list[dict[str, Any]], what: str) -> list[str]:
    """A line for each text whose tokens are not the same."""
    return [
        f"{what}: {a['prompt']!r} {a['way']}, {a['drafts']} drafts, from token {first(a['tokens'], b['tokens'])} on"
        for a, b in zip(ours, theirs, strict=True)
        if a["tokens"] != b["tokens"]
    ]


def drafting_differs(texts: list[dict[str, Any]], machine: str) -> list[str]:
    """A line for each text that drafting changed."""
    plain = {(text["prompt"], text["way"]): text for text in texts if not text["drafts"]}
    return [
        f"{machine}: {text['prompt']!r} {text['way']}, plain and speculative, from token"
        f" {first(plain[text['prompt'], text['way']]['tokens'], text['tokens'])} on"
        for text in texts
        if plain[text["prompt"], text["way"]]["tokens"] != text["tokens"]
    ]


def first(ours: list[int], theirs: list[int]) -> int:
    """Where two texts part."""
    same = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)
    return min(len(ours), len(theirs)) if same is None else same


def shown(value: float) -> str:
    return f"{value:.1e}" if isinstance(value, float) and value < 1 else str(value)


def aligned(lines: list[tuple[str, ...]]) -> str:
    """Lines as columns."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
