"""The rest of ``bitsandbytes.functional``: helpers of its own code that others import, and former functions.

Arguments that make no difference here are kept for callers.
"""

# pyright: reportUnusedFunction=false

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from halfbyte.errors import ArgumentError
from halfbyte.functional import create_dynamic_map, int8_linear_matmul, quantize_blockwise
from halfbyte.integrations.bitsandbytes.cextension import lib

__all__ = [
    "FIRST_CUDA_DEVICE",
    "GlobalPageManager",
    "batched_igemm",
    "check_matmul",
    "create_quantile_map",
    "dequantize",
    "dequantize_no_absmax",
    "dtype2bytes",
    "elementwise_func",
    "estimate_quantiles",
    "fill",
    "get_paged",
    "get_ptr",
    "has_avx512bf16",
    "igemm",
    "is_on_gpu",
    "lib",
    "percentile_clipping",
    "post_call",
    "pre_call",
    "prefetch_tensor",
    "prod",
    "quantize",
    "quantize_no_absmax",
]

FIRST_CUDA_DEVICE = torch.device("cuda", index=0)

dtype2bytes = {torch.float32: 4, torch.float16: 2, torch.bfloat16: 2, torch.uint8: 1, torch.int8: 1}
"""dtype -> bytes of one value."""

prod = math.prod


class GlobalPageManager:
    """Lists paged tensors. There is one: :meth:`get_instance`."""

    _instance: GlobalPageManager | None = None

    def __init__(self) -> None:
        raise RuntimeError("Call get_instance() instead")

    def initialize(self) -> None:
        """Forget every tensor."""
        self.paged_tensors: list[Tensor] = []

    @classmethod
    def get_instance(cls) -> GlobalPageManager:
        """The one manager of this process."""
        if cls._instance is None:
            cls._instance = cls.__new__(cls)
            cls._instance.initialize()
        return cls._instance

    def prefetch_all(self, to_cpu: bool = False) -> None:
        """Nothing to fetch: paged memory of halfbyte stays on the host, pinned."""


def get_paged(
    *shape: int, dtype: torch.dtype = torch.float32, device: torch.device | str | int = FIRST_CUDA_DEVICE
) -> Tensor:
    """Zeros in host memory that ``device`` can read: pinned where there is a GPU."""
    index = torch.device("cuda", device).index if isinstance(device, int) else torch.device(device).index
    made: Any = torch.zeros(*shape, dtype=dtype, pin_memory=torch.cuda.is_available())
    made.is_paged, made.page_deviceid = True, index or 0
    return made


def prefetch_tensor(A: Tensor, to_cpu: bool = False) -> None:
    """Nothing to fetch; refuses a tensor that is not paged.

    Raises:
        ArgumentError: It did not come from :func:`get_paged`.
    """
    if not getattr(A, "is_paged", False):
        raise ArgumentError("the tensor is not paged", expected="one that get_paged made")


def elementwise_func(func_name: str, A: Tensor, B: Tensor | None, value: float, prefetch: bool = True) -> None:
    """``fill``, ``arange`` or ``_mul`` in place.

    Raises:
        ArgumentError: Another name.
    """
    if func_name == "fill":
        A.fill_(value)
    elif func_name == "arange":
        A.copy_(torch.arange(A.numel(), device=A.device).view(A.shape))
    elif func_name == "_mul" and B is not None:
        A.mul_(B)
    else:
        raise ArgumentError(f"func_name is {func_name!r}", expected="fill, arange, or _mul with two tensors")


def fill(A: Tensor, value: float, device: Any = None, prefetch: bool = True) -> None:
    """``A.fill_(value)``."""
    elementwise_func("fill", A, None, value)


def _mul(A: Tensor, B: Tensor, device: Any = None) -> None:
    elementwise_func("_mul", A, B, 0)


def is_on_gpu(tensors: Iterable[Tensor | None]) -> bool:
    """Whether all of them (None and paged ones aside) are on one GPU.

    Raises:
        ArgumentError: They are not.
    """
    devices = {t.device for t in tensors if t is not None and not getattr(t, "is_paged", False)}
    if len(devices) > 1 or any(device.type == "cpu" for device in devices):
        raise ArgumentError(f"tensors on {', '.join(sorted(map(str, devices)))}", expected="all on one GPU")
    return True


def get_ptr(A: Tensor | None) -> ctypes.c_void_p | None:
    """Address of a tensor's data, for ctypes; None for None."""
    return None if A is None else ctypes.c_void_p(A.data_ptr())


def _get_tensor_stream(tensor: Tensor) -> ctypes.c_void_p:
    """Handle of the current stream on the tensor's device."""
    handle = torch.accelerator.current_stream(tensor.device).cuda_stream if tensor.device.type != "cpu" else 0  # pyright: ignore[reportAttributeAccessIssue]
    return ctypes.c_void_p(handle)


get_tensor_stream = _get_tensor_stream


def _cuda_device_of(a: Tensor) -> Any:
    """A guard that makes the tensor's device the current one."""
    return torch.cuda.device_of(a)


def pre_call(device: torch.device) -> torch.device:
    """Make ``device`` current; returns the one that was."""
    previous = torch.cuda.current_device()
    torch.cuda.set_device(device)
    return torch.device("cuda", previous)


def post_call(prev_device: torch.device) -> None:
    """Make ``prev_device`` current again."""
    torch.cuda.set_device(prev_device)


def has_avx512bf16() -> bool:
    """Whether this CPU multiplies bf16 with AVX-512."""
    probe = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return bool(probe is not None and probe())


def check_matmul(
    A: Tensor,
    B: Tensor,
    out: Tensor | None,
    transposed_A: bool,
    transposed_B: bool,
    expected_type: torch.dtype = torch.int8,
) -> tuple[int, ...]:
    """Shape of ``A @ B``, each transposed first where asked.

    Raises:
        ArgumentError: Another dtype, or shapes that do not multiply, or an ``out`` of another shape.
    """
    if A.dtype != expected_type or B.dtype != expected_type:
        raise ArgumentError(f"A is {A.dtype} and B {B.dtype}", expected=f"{expected_type}")
    left = A.transpose(-1, -2) if transposed_A else A
    right = B.transpose(-1, -2) if transposed_B else B
    if left.shape[-1] != right.shape[-2]:
        raise ArgumentError(
            f"shapes {tuple(left.shape)} and {tuple(right.shape)} do not multiply",
            expected=f"{right.shape[-2]} as the first one's last dimension",
        )
    shape = (*left.shape[:-1], right.shape[-1])
    if out is not None and tuple(out.shape) != shape:
        raise ArgumentError(f"out has shape {tuple(out.shape)}", expected=f"{shape}")
    return shape


def igemm(
    A: Tensor, B: Tensor, out: Tensor | None = None, transposed_A: bool = False, transposed_B: bool = False
) -> Tensor:
    """``A @ B`` of int8 tensors as exact int32 sums. ``int8_linear_matmul(A, B.t())`` is the present name of it."""
    check_matmul(A, B, out, transposed_A, transposed_B)
    if B.dim() == 3:
        return batched_igemm(A, B, out, transposed_A, transposed_B)
    left = A.transpose(-1, -2) if transposed_A else A
    product = int8_linear_matmul(left.contiguous(), (B if transposed_B else B.t()).contiguous())
    return product if out is None else out.copy_(product)


def batched_igemm(
    A: Tensor, B: Tensor, out: Tensor | None = None, transposed_A: bool = False, transposed_B: bool = False
) -> Tensor:
    """:func:`igemm` of every pair of matrices in two batches."""
    check_matmul(A, B, out, transposed_A, transposed_B)
    pairs = zip(A, B, strict=True)
    product = torch.stack([igemm(a, b, None, transposed_A, transposed_B) for a, b in pairs])
    return product if out is None else out.copy_(product)


def quantize_no_absmax(A: Tensor, code: Tensor, out: Tensor | None = None) -> Tensor:
    """Codes of values that lie in -1 to 1 already, nearest in a rising map of 256."""
    # One more value fixes the scale of the one block at 1.
    padded = torch.cat([A.detach().reshape(-1).float().clamp(-1.0, 1.0), torch.ones(1, device=A.device)])
    codes, _ = quantize_blockwise(padded, code, blocksize=padded.numel())
    codes = codes[:-1].view(A.shape)
    return codes if out is None else out.copy_(codes)


def dequantize_no_absmax(A: Tensor, code: Tensor, out: Tensor | None = None) -> Tensor:
    """``code[A]``, fp32."""
    values = code.to(A.device)[A.int()].float()
    return values if out is None else out.copy_(values)


def quantize(A: Tensor, code: Tensor | None = None, out: Tensor | None = None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """8-bit codes with one scale for the whole tensor; ``quantize_blockwise`` loses less.

    Returns:
        Codes, and (absmax, code map).
    """
    code = (create_dynamic_map() if code is None else code).to(A.device)
    absmax = A.detach().float().abs().max()
    scale = torch.where(absmax > 0, absmax, torch.ones_like(absmax))
    return quantize_no_absmax(A.detach().float() / scale, code, out), (absmax, code)


def dequantize(
    A: Tensor,
    state: tuple[Tensor, Tensor] | None = None,
    absmax: Tensor | None = None,
    code: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Values of :func:`quantize`'s codes.

    Raises:
        ArgumentError: Neither ``state`` nor ``absmax``.
    """
    if state is None:
        if absmax is None:
            raise ArgumentError("neither state nor absmax", expected="one of them")
        state = (absmax, create_dynamic_map() if code is None else code)
    values = dequantize_no_absmax(A, state[1]) * state[0]
    return values if out is None else out.copy_(values)


def estimate_quantiles(
    A: Tensor, out: Tensor | None = None, offset: float = 1 / 512, num_quantiles: int = 256
) -> Tensor:
    """Quantiles of a tensor's values at equal distances from ``offset`` to ``1 - offset``; exact, not estimated.

    Raises:
        ArgumentError: More than 256 of them, or fewer values than that.
    """
    if num_quantiles > 256 or A.numel() < num_quantiles:
        raise ArgumentError(
            f"{num_quantiles} quantiles of {A.numel()} values", expected="at most 256, and as many values"
        )
    offset = 1 / (2 * num_quantiles) if num_quantiles < 256 and offset == 1 / 512 else offset
    order = A.detach().reshape(-1).float().sort().values
    place = torch.linspace(offset, 1 - offset, num_quantiles, dtype=torch.float64) * (A.numel() - 1)
    found = order[place.round().long().to(A.device)]
    return found if out is None else out.copy_(found)


def create_quantile_map(A: Tensor, total_bits: int = 8) -> Tensor:
    """A rising map of 256 from a tensor's own quantiles, zero among them, largest magnitude 1."""
    quantiles = estimate_quantiles(A, num_quantiles=2**total_bits - 1)
    values = torch.cat([quantiles, quantiles.new_zeros(1 + 256 - 2**total_bits)]).sort().values
    return values / values.abs().max()


def percentile_clipping(
    grad: Tensor, gnorm_vec: Tensor, step: int, percentile: int = 5
) -> tuple[Tensor, Tensor, float]:
    """The gradient's norm, the bound from the last 100 norms, and the factor that brings it there.

    Args:
        grad: Any shape.
        gnorm_vec: fp32 ``(100,)`` squared norms, updated in place.
        step: Number of this step, from 1.
        percentile: Which of the 100 sorted norms is the bound.
    """
    from halfbyte.optim.clipping import check_percentile, percentile_scale

    squared = grad.detach().float().square().sum()
    scale = percentile_scale(squared, gnorm_vec, step, check_percentile(percentile))
    bound = gnorm_vec.sort().values[percentile].sqrt()
    return squared.sqrt(), bound, float(scale)


def supports_igemmlt(device: torch.device) -> bool:
    """Whether int8 products are computed there: on every device."""
    return True
