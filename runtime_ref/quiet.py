"""Keep log messages of other packages off the user's terminal."""

import contextlib
import logging
import warnings
from collections.abc import Iterator

# Loggers of packages that ExecuTorch imports; they report optional parts that are not installed.
EXECUTORCH_LOGGERS = ("torchao", "torch.utils._pytree", "executorch")


@contextlib.contextmanager
def quiet(*names: str) -> Iterator[None]:
    """Let loggers report errors only, and hide Python's warnings, while the block runs.

    Args:
        names: names of the loggers.
    """
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
