"""Write sampling.json, which tests the sampling of every runtime: `python tests/vectors/make_sampling.py`.

Tokens are chosen by FORMAT.md's rule in decimal arithmetic of 60 digits, without the code that is tested. Cases whose
noise lies within 1e-9 of a boundary are left out, because the last bits of a language's exp() would decide them.
"""

import json
import random
import struct
from decimal import Decimal, getcontext
from pathlib import Path

FILE = Path(__file__).with_name("sampling.json")
CLOSE = Decimal("1e-9")
MASK = 2**64 - 1


def noise(seed: int, position: int) -> int:
    """Return the top 24 bits of SplitMix64 for a seed and a position."""
    z = ((seed ^ (position * 0x9E3779B97F4A7C15 & MASK)) + 0x9E3779B97F4A7C15) & MASK
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & MASK
    return (z ^ (z >> 31)) >> 40


def choose(logits: list[float], temperature: float, top_k: int, top_p: float, u: Decimal) -> int | None:
    """Choose a token by its logits.

    Args:
        logits: logits in descending order.
        temperature: 0 is greedy.
        top_k: number of logits to keep.
        top_p: total probability to keep.
        u: noise, from 0 to 1.

    Returns:
        Index of the chosen logit; None if the noise or `top_p` is too close to a boundary.
    """
    if temperature == 0:
        return 0
    kept = [Decimal(logit) / Decimal(temperature) for logit in logits[:top_k]]
    weights = [(logit - kept[0]).exp() for logit in kept]
    total, cumulative = sum(weights), Decimal(0)
    prefix: list[Decimal] = []
    for weight in weights:
        cumulative += weight / total
        prefix.append(cumulative)
        if abs(cumulative - Decimal(top_p)) < CLOSE and top_p < 1:
            return None
        if cumulative >= Decimal(top_p):
            break
    bounds = [cumulative / prefix[-1] for cumulative in prefix]
    if any(abs(bound - u) < CLOSE for bound in bounds[:-1]):
        return None
    return next((i for i, bound in enumerate(bounds) if bound > u), len(bounds) - 1)


def float32(value: float) -> float:
    """Round a number to float32."""
    return float(struct.unpack("<f", struct.pack("<f", value))[0])


def vectors() -> dict[str, object]:
    """Return the content of sampling.json: noise by seed and position, and choices."""
    getcontext().prec = 60
    generator = random.Random(0)
    seeds = [0, 1, 2**63, 2**64 - 1, *(generator.getrandbits(64) for _ in range(4))]
    positions = [0, 1, 7, 4095, 131071]
    rows = []
    for count in (2, 5, 64):
        for temperature in (0.0, 0.3, 1.0, 2.5):
            for top_p, top_k in ((1.0, 64), (0.95, 64), (0.5, 8), (1e-6, 64), (1.0, 1)):
                for _ in range(3):
                    logits = sorted((float32(generator.gauss(0, 3)) for _ in range(count)), reverse=True)
                    if generator.random() < 0.3:
                        logits[1] = logits[0]
                    ids = generator.sample(range(262144), count)
                    seed, position = generator.choice(seeds), generator.randrange(131072)
                    u = Decimal(noise(seed, position)) / 2**24
                    rank = choose(logits, temperature, top_k, top_p, u)
                    if rank is not None:
                        options = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
                        place = {"seed": str(seed), "position": position}
                        rows.append({**options, **place, "logits": logits, "ids": ids, "token": ids[rank]})
    return {
        "noise": [
            {"seed": str(s), "position": p, "u_times_2_to_the_24": noise(s, p)} for s in seeds for p in positions
        ],
        "choose": rows,
    }


def text() -> str:
    """Return the text of sampling.json, a row in each line."""
    parts = (
        f'"{name}": [\n' + ",\n".join(map(json.dumps, rows)) + "\n]"  # type: ignore[call-overload]
        for name, rows in vectors().items()
    )
    return "{" + ",\n".join(parts) + "}\n"


if __name__ == "__main__":
    FILE.write_text(text())
