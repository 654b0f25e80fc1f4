"""Low-bit weights: how numbers are rounded, and the recipes that say how many bits each part gets."""
