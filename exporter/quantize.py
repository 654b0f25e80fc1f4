"""Numbers of few bits."""

import torch
from torch import Tensor


def quantize_rows(rows: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Rows [.., E], E even, as symmetric integers of 8 or 4 bits, and each row's scale: a number is integer * scale.

    Returns:
        int8 [.., E] and float32 [..]. With 4 bits, int8 [.., E/2]: number i of a row, plus 8, in the lower half of
        byte i, number E/2 + i in the upper half, as `exporter.modeling.two_stage` reads them.
    """
    limit = 2 ** (bits - 1) - 1
    scales = rows.abs().amax(-1) / limit
    scales = torch.where(scales > 0, scales, 1.0)
    numbers = (rows / scales.unsqueeze(-1)).round().to(torch.int8)
    if bits == 8:
        return numbers, scales
    first, second = numbers.chunk(2, dim=-1)
    return 16 * second + first + 8, scales
