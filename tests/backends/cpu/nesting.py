"""Double-quantized absmax for tests."""

import torch

from halfbyte.backends.reference import blockwise
from halfbyte.formats.dynamic import dynamic_map

__all__ = ["nest"]


def nest(absmax: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Second-level absmax, codes, map, offset."""
    code = torch.from_numpy(dynamic_map())
    offset = absmax.mean()
    codes, second = blockwise.quantize_blockwise(absmax - offset, code, 256)
    return second, codes, code, offset
