"""Export Gemma 4 and its MTP drafter into bundles.

The folders follow the way of the data. `pyproject.toml` lists them in the order in which they may import each other.
"""
