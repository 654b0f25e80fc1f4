"""Measurements of the `bench` command: time and memory of a bundle on this machine."""
