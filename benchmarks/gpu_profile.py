"""Where the GPU's time goes in a call: kernel times by class, from torch's profiler."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from typing import Any

__all__ = ["CLASSES", "class_of", "kernel_times"]

CLASSES = (
    ("elementwise", r"^triton_"),
    ("dequantize", r"dequant"),
    ("attention", r"flash|fmha|attention|sdpa|softmax"),
    ("linear", r"gemm|gemv|nvjet|cutlass|cublas|splitk|sum_partial|4bit"),
    ("copies", r"copy|memcpy|memset|index|catarray"),
    ("elementwise", r""),
)
"""Class and pattern of kernel names, the first that is found. Elementwise is what remains, norms included, and what
torch's compiler makes: it names its kernels after all that stands near them."""


def class_of(kernel: str) -> str:
    """The class of a kernel by its name.

    >>> class_of("_gemm_4bit_small_batch_kernel"), class_of("_dequantize_4bit_kernel"), class_of("triton_red_gemm_4bit")
    ('linear', 'dequantize', 'elementwise')
    """
    return next(name for name, pattern in CLASSES if re.search(pattern, kernel, re.IGNORECASE))


def kernel_times(call: Callable[[], Any], repeats: int = 3, top: int = 8) -> tuple[dict[str, float], list[str]]:
    """Microseconds and number of kernels of each class in one call, the head apart, and the longest kernels in words.

    The head of a language model is what takes longest among a call's products.

    Args:
        call: Enqueues work on the current stream.
        repeats: Calls that are profiled.
        top: How many kernels the words name.
    """
    import torch
    from torch.autograd import DeviceType

    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
        for _ in range(repeats):
            call()
        torch.cuda.synchronize()
    kernels = [
        (event.name, event.time_range.elapsed_us())
        for event in found.events()  # pyright: ignore[reportOptionalIterable]
        if event.device_type == DeviceType.CUDA and not event.name.startswith(("gpu_", "ProfilerStep", "## "))
    ]
    times: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    by_name: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    products = sorted(((us, name) for name, us in kernels if class_of(name) == "linear"), reverse=True)
    heads = products[:repeats]
    for name, us in kernels:
        times[class_of(name)] += us
        counts[class_of(name)] += 1
        by_name[name] += us
        calls[name] += 1
    for us, _ in heads:
        times["linear"] -= us
        times["head"] += us
        counts["linear"] -= 1
        counts["head"] += 1
    row: dict[str, float] = {}
    for name in ("linear", "head", *dict.fromkeys(name for name, _ in CLASSES if name != "linear")):
        row[f"{name}_us"] = round(times[name] / repeats, 1)
        row[f"{name}_kernels"] = round(counts[name] / repeats, 1)
    words = [
        f"{us / repeats:9.1f} us {calls[name] / repeats:6.1f}x {us / calls[name]:7.2f} us  {name[:110]}"
        for name, us in by_name.most_common(top)
    ]
    return row, words
