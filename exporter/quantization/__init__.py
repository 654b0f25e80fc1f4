"""Low-bit weights: how matrices are rounded to integers, and recipes with the number of bits of each part."""
