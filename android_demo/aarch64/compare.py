"""Compare what run.py wrote on two machines; print tables, and write them as JSON.

    compare.py HERE THERE OUTPUT NAME...

HERE/NAME.json and .npz are of this machine, THERE/NAME of the other. The exit status is 1 if float32 tokens differ, if
drafting changes a text, or if a row is not bitwise the same whatever is verified with it. Differences of logits and
states, and of tokens of low-bit recipes, are only reported.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from run import distance

from runtime_ref.acceptance import common_prefix

OUTPUTS = ("logits", "ids", "state")
Texts = list[dict[str, Any]]


def main(here: str, there: str, output: str, *names: str) -> int:
    """Compare all bundles; returns the exit status."""
    results = {name: compare(name, Path(here) / name, Path(there) / name) for name in names}
    Path(output).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    lines = [("bundle", "texts", "tokens", "texts that differ", "rows", "ids differ", "logits", "state", "seconds")]
    lines += [(name, *map(shown, result["between"].values())) for name, result in results.items()]
    print("\nTokens here and on aarch64, and the target's outputs for the same inputs\n")
    print(aligned(lines))
    print(
        "\nRows that are not bitwise the same alone and in a pass of so many tokens, and the largest state difference\n"
    )
    sides = [side for result in results.values() for side in result["rows"].values()]
    tokens = sorted({row["tokens"] for side in sides for row in side["passes"]})
    lines = [("bundle", "machine", "row multiple", *map(str, tokens))]
    for name, result in results.items():
        for machine, side in result["rows"].items():
            lines.append((name, machine, str(side["row_multiple"]), *map(unlike, side["passes"])))
    print(aligned(lines) + "\n")
    for line in (line for result in results.values() for line in result["told"]):
        print(f"note: {line}")
    wrong = [line for result in results.values() for line in result["wrong"]]
    for line in wrong:
        print(f"DIFFERENT: {line}")
    return 1 if wrong else 0


def compare(name: str, here: Path, there: Path) -> dict[str, Any]:
    """Return the differences of one bundle between two machines, and within each machine."""
    first, second = (json.loads(Path(f"{path}.json").read_text(encoding="utf-8")) for path in (here, there))
    alone = []
    for path in (here, there):
        arrays = np.load(f"{path}.npz")
        alone.append(list(zip(*(arrays[output] for output in OUTPUTS), strict=True)))
    distances = [distance(*pair) for pair in zip(*alone, strict=True)]
    differ = differing(first["texts"], second["texts"], f"{name}, here and on {second['machine']}")
    inside = [
        line for side in (first, second) for line in drafting_differs(side["texts"], f"{name}, {side['machine']}")
    ]
    # Low-bit products round activations to 8 bits, and processors' kernels differ: KleidiAI's on ARM round a row at
    # once, others in blocks. A difference early in the network grows up to its end.
    other_rounding = second["recipe"] != "fp32"
    return {
        "between": {
            "texts": len(first["texts"]),
            "tokens": sum(len(text["tokens"]) for text in first["texts"]),
            "texts_that_differ": len(differ),
            "rows": len(distances),
            "rows_whose_ids_differ": sum(row["ids_differ"] for row in distances),
            "largest_logit_difference": max(row["logits"] for row in distances),
            "largest_state_difference": max(row["state"] for row in distances),
            "seconds": second["seconds"],
        },
        "rows": {
            machine: {"row_multiple": side["row_multiple"], "passes": side["rows"]}
            for machine, side in (("here", first), (second["machine"], second))
        },
        "told": differ if other_rounding else [],
        "wrong": inside + rows_differ(name, first, second) + ([] if other_rounding else differ),
    }


def rows_differ(name: str, *sides: dict[str, Any]) -> list[str]:
    """Return a line for each pass whose rows differ from those verified alone: drafting may change a text then."""
    message = "{}, {}: {differ} of {rows} rows, alone and in a pass of {tokens} tokens"
    return [message.format(name, side["machine"], **row) for side in sides for row in side["rows"] if row["differ"]]


def differing(here: Texts, there: Texts, what: str) -> list[str]:
    """Return a line for each text whose tokens differ."""
    lines = []
    for a, b in zip(here, there, strict=True):
        if a["tokens"] != b["tokens"]:
            first = common_prefix(a["tokens"], b["tokens"])
            lines.append(f"{what}: {a['prompt']!r} {a['way']}, {a['drafts']} drafts, from token {first} on")
    return lines


def drafting_differs(texts: Texts, what: str) -> list[str]:
    """Return a line for each text that drafting changed."""
    plain = {(text["prompt"], text["way"]): text["tokens"] for text in texts if not text["drafts"]}
    lines = []
    for text in texts:
        expected = plain[text["prompt"], text["way"]]
        if text["tokens"] != expected:
            place = f"{text['prompt']!r} {text['way']}, from token {common_prefix(expected, text['tokens'])} on"
            lines.append(f"{what}, plain and speculative: {place}")
    return lines


def unlike(rows: dict[str, Any]) -> str:
    """Return how many rows of a pass differ, and how far their states do."""
    count = f"{rows['differ']} of {rows['rows']}"
    return f"{count}, {rows['state']:.0e}" if rows["differ"] else count


def shown(value: float) -> str:
    """Return a number for a table."""
    return str(value) if isinstance(value, int) else f"{value:.1e}" if value < 1 else f"{value:.1f}"


def aligned(lines: list[tuple[str, ...]]) -> str:
    """Return lines as columns of equal width."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rows = ("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)
    return "\n".join(row.rstrip() for row in rows)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
