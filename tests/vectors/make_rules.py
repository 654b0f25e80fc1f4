"""Write rules.json, which tests the rules before the choice of every runtime: `python -m tests.vectors.make_rules`.

Each row has the logits of a whole vocabulary, of which a bundle would give the largest. A token is chosen by the rules
of FORMAT.md in decimal arithmetic of 60 digits, token by token, without the code that is tested. Rows are left out
where two logits lie within 1e-9 of each other without being equal, or the noise within 1e-9 of a boundary: the last
bits of a language's arithmetic would decide them.
"""

import itertools
import json
import random
from collections.abc import Mapping, Sequence
from decimal import Decimal, getcontext
from pathlib import Path
from typing import Any

from tests.vectors.make_sampling import CLOSE, choose, float32, noise

FILE = Path(__file__).with_name("rules.json")
VOCAB, GIVEN, KEPT = 160, 24, 64
NEUTRAL = {"suppressed": [], "logit_bias": {}, "repetition_penalty": 1, "presence_penalty": 0, "frequency_penalty": 0}


def ruled(token: int, logit: float, rules: Mapping[str, Any], prompt: Sequence[int], answer: Sequence[int]) -> Decimal:
    """Return a token's logit after biases and penalties."""
    value, count = Decimal(logit), answer.count(token)
    value += Decimal(rules["logit_bias"].get(str(token), 0))
    if token in prompt or token in answer:
        penalty = Decimal(rules["repetition_penalty"])
        value = value / penalty if value > 0 else value * penalty
    value -= Decimal(rules["frequency_penalty"]) * count
    return value - Decimal(rules["presence_penalty"]) if count else value


def candidates(logits: Sequence[float], given: Sequence[int], row: Mapping[str, Any]) -> dict[int, Decimal]:
    """Return what a token is chosen from: logits after the rules by token id."""
    rules, history = row["rules"], [*row["prompt"], *row["answer"]]
    raised = {int(token) for token, bias in rules["logit_bias"].items() if bias > 0}
    raised.update(history if rules["repetition_penalty"] < 1 else ())
    raised.update(row["answer"] if min(rules["presence_penalty"], rules["frequency_penalty"]) < 0 else ())

    def of(ids: set[int]) -> dict[int, Decimal]:
        left = ids - set(rules["suppressed"])
        return {token: ruled(token, logits[token], rules, row["prompt"], row["answer"]) for token in left}

    chosen = of(raised | set(given))
    if not chosen or max(chosen.values()) < Decimal(logits[given[-1]]):
        return of(set(range(VOCAB)))
    return chosen


def expected(logits: Sequence[float], given: Sequence[int], row: Mapping[str, Any]) -> int | None:
    """Return the token that is chosen; None if arithmetic of another kind might choose another."""
    values = sorted(((-value, token) for token, value in candidates(logits, given, row).items()))[:KEPT]
    gaps = [after[0] - before[0] for before, after in itertools.pairwise(values)]
    if any(0 < gap < CLOSE for gap in gaps):
        return None
    u = Decimal(noise(int(row["seed"]), row["position"])) / 2**24
    descending: Any = [-value for value, _ in values]
    rank = choose(descending, row["temperature"], row["top_k"], row["top_p"], u)
    return None if rank is None else values[rank][1]


def kinds(generator: random.Random, logits: Sequence[float], given: Sequence[int]) -> list[dict[str, Any]]:
    """Return rules of each kind, for tokens that matter: the largest ones and some beyond the bundle's."""
    rest = [token for token in range(VOCAB) if token not in given]
    some = generator.sample(given[:8], 3) + generator.sample(rest, 3)
    biases = {str(token): round(generator.uniform(-8, 8), 2) for token in some}
    return [
        {},
        {"suppressed": given[:2]},
        {"suppressed": [*given, rest[0]]},  # none of the bundle's is left
        {"logit_bias": biases},
        {"logit_bias": dict.fromkeys(map(str, given), -30.5)},  # tokens beyond the bundle's are larger then
        {"logit_bias": {str(rest[0]): 3.25}, "suppressed": given},  # the one that is raised is not the largest
        {"repetition_penalty": 1.3},
        {"repetition_penalty": 0.7},
        {"repetition_penalty": 0.2},
        {"repetition_penalty": 40.0},
        {"presence_penalty": 1.5},
        {"presence_penalty": -2.0},
        {"frequency_penalty": 0.6},
        {"frequency_penalty": -1.1},
        {
            **{"logit_bias": biases, "suppressed": given[:1], "repetition_penalty": 1.2},
            **{"presence_penalty": 0.5, "frequency_penalty": 0.25},
        },
    ]


def vectors() -> list[dict[str, Any]]:
    """Return the rows of rules.json."""
    getcontext().prec = 60
    generator, rows = random.Random(1), []
    for mean in (0, 0, -6, -6, -15, 5):  # a repetition penalty does another thing to negative logits
        logits = [float32(generator.gauss(mean, 4)) for _ in range(VOCAB)]
        for token in generator.sample(range(VOCAB), 20):  # equal ones: the lower id comes first
            logits[token] = logits[generator.randrange(VOCAB)]
        given = sorted(range(VOCAB), key=lambda token: (-logits[token], token))[:GIVEN]
        for rules in kinds(generator, logits, given):
            for temperature, top_k, top_p in ((0.0, 64, 1.0), (1.0, 64, 1.0), (0.7, 8, 0.9)):
                likely = generator.choice((given[:6], []))  # tokens that are not can only be raised
                history = [generator.choice([*likely, generator.randrange(VOCAB)]) for _ in range(14)]
                row = {
                    **{"rules": NEUTRAL | rules, "prompt": history[:5], "answer": history[5:]},
                    **{"temperature": temperature, "top_k": top_k, "top_p": top_p},
                    **{"seed": str(generator.getrandbits(64)), "position": len(history)},
                }
                token = expected(logits, given, row)
                if token is not None:
                    rows.append({**row, "logits": logits, "num_given": GIVEN, "token": token})
    return rows


def text() -> str:
    """Return the text of rules.json: each list of logits once, and the rows that refer to it."""
    rows = vectors()
    tables: list[list[float]] = []
    for row in rows:
        if row["logits"] not in tables:
            tables.append(row["logits"])
        row["logits"] = tables.index(row["logits"])
    parts = (
        f'"{name}": [\n' + ",\n".join(map(json.dumps, part)) + "\n]"
        for name, part in (("logits", tables), ("choose", rows))
    )
    return "{" + ",\n".join(parts) + "}\n"


if __name__ == "__main__":
    FILE.write_text(text())
