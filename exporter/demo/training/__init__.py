"""How the built-in pair was trained."""
