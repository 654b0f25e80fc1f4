"""Scripts that trained the built-in pair: `train.py` first, then `qat.py`."""
