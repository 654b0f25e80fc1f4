"""Keep the notes of other packages off the user's terminal."""

import contextlib
import logging
import warnings
from collections.abc import Iterator

# ExecuTorch brings these along, and they tell of optional parts that are not there.
EXECUTORCH = ("torchao", "torch.utils._pytree", "executorch")


@contextlib.contextmanager
def quiet(*names: str) -> Iterator[None]:
    """Let these loggers tell errors only, and Python's warnings nothing, while the block runs."""
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
