"""Comparisons behind decisions of this project; `make bench` runs them. None is a test."""
