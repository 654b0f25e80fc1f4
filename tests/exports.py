"""Exports that run in a process of their own."""

from pathlib import Path

import torch

from exporter.bundle import ExportOptions, export_bundle
from exporter.pair import open_pair


def export(target: Path, drafter: Path, output: Path, backend: str) -> Path:
    """Write a bundle with the context that the tests expect, and return where it is."""
    torch.set_num_threads(1)
    export_bundle(open_pair(target, drafter), output, ExportOptions(backend, max_seq_len=300))
    return output
