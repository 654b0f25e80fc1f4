"""The built-in pair, a small trained Gemma 4 target and drafter (see `pair/README.md`), and how it was made."""

from pathlib import Path

PAIR = Path(__file__).parent / "pair"
PROMPTS = ("write(self, data)\n", "Return the exception", "Raise an exception if")
