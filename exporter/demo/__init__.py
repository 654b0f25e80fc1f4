"""The built-in pair, a small trained Gemma 4 target and drafter (see `pair/README.md`)."""

from pathlib import Path

PAIR = Path(__file__).parent / "pair"
PROMPTS = ("Return a copy of the", "read(self, size=-1)\n", "The class")
