"""What every process of a test run needs. The fixtures are in tests/fixtures.py."""

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

# transformers reads the first when it is imported. Two threads on a busy machine can be a hundred times slower.
os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

Directories = tuple[Path, Path]
Run = Callable[..., tuple[int, str, str]]
WEEK_SECONDS = 7 * 24 * 3600


def pytest_configure(config: pytest.Config) -> None:
    """Load the fixtures, unless this process only hands out tests to others: they import torch, which takes seconds."""
    if hasattr(config, "workerinput") or config.getoption("dist", "no") == "no":
        config.pluginmanager.import_plugin("tests.fixtures")


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Delete what was kept and not used for a week, in the process that the others belong to."""
    if not hasattr(session.config, "workerinput") and session.config.cache is not None:
        for name in ("traces", "bundles", "texts"):
            for path in session.config.cache.mkdir(name).iterdir():
                if path.stat().st_mtime < time.time() - WEEK_SECONDS:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
