"""Vocabulary clusters of a two-stage head: making them, their centroids, and the file that holds them."""
