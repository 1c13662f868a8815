"""Tensor's short names for a move, for parameters whose ``to`` does more than move."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

__all__ = ["Moves"]


class Moves:
    """``cpu``, ``cuda``, ``xpu`` and the dtypes by way of the class's own ``to``; torch would go around it."""

    if TYPE_CHECKING:

        def to(self, *args: Any, **kwargs: Any) -> Any: ...

    def cpu(self) -> Any:
        """``to("cpu")``."""
        return self.to("cpu")

    def cuda(self, device: Any = None, non_blocking: bool = False) -> Any:
        """``to("cuda")`` or that CUDA device."""
        return self._to_index("cuda", device, non_blocking)

    def xpu(self, device: Any = None, non_blocking: bool = False) -> Any:
        """``to("xpu")`` or that XPU device."""
        return self._to_index("xpu", device, non_blocking)

    def _to_index(self, kind: str, device: Any, non_blocking: bool) -> Any:
        where = torch.device(kind, device) if isinstance(device, int) else (device or kind)
        return self.to(where, non_blocking=non_blocking)

    def half(self) -> Any:
        """fp16, or itself once quantized."""
        return self.to(torch.float16)

    def bfloat16(self) -> Any:
        """bf16, or itself once quantized."""
        return self.to(torch.bfloat16)

    def float(self) -> Any:
        """fp32, or itself once quantized."""
        return self.to(torch.float32)

    def double(self) -> Any:
        """fp64, or itself once quantized."""
        return self.to(torch.float64)
