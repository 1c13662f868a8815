"""Imports torch and says what it sees: version, build, devices, whether halfbyte and NumPy get along with it."""

from __future__ import annotations

import importlib
import time
import warnings
from collections.abc import Callable
from typing import Any

__all__ = ["run"]


def run(arguments: dict[str, Any], emit: Callable[..., None]) -> None:
    """Emit ``imported``, ``halfbyte``, ``numpy``, ``cuda``, one ``device`` each, ``mapped``."""
    del arguments
    start = time.perf_counter()
    import torch

    version = torch.__version__  # a file or folder that merely has the name has no version
    torch.zeros(1)
    emit("imported", seconds=time.perf_counter() - start, version=str(version), file=str(torch.__file__))
    emit("halfbyte", **_halfbyte())
    emit("numpy", error=_numpy())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        emit("cuda", **_cuda(caught))
    for device in (*_cuda_devices(), *_other_devices()):
        emit("device", **device)
    emit("mapped", libraries=_mapped())


def _halfbyte() -> dict[str, Any]:
    import torch

    try:
        backends = importlib.import_module("halfbyte.backends")
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    return {"error": "", "file": backends.__file__, "cuda_initialized": torch.cuda.is_initialized()}


def _numpy() -> str:
    import torch

    try:
        import numpy

        torch.from_numpy(torch.ones(2).numpy() + numpy.ones(2, dtype="float32"))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _cuda(caught: list[warnings.WarningMessage]) -> dict[str, Any]:
    import torch

    error = ""
    available = torch.cuda.is_available()
    if not available:
        try:
            torch.cuda.init()
        except Exception as problem:
            error = f"{type(problem).__name__}: {problem}"
    flags = getattr(getattr(torch, "_C"), "_cuda_getArchFlags", lambda: None)()  # noqa: B009  get_arch_list wants a GPU
    texts = dict.fromkeys(str(warning.message).strip() for warning in caught)
    return {"available": available, "error": error, "arches": (flags or "").split(), "warnings": list(texts)}


def _cuda_devices() -> list[dict[str, Any]]:
    import torch

    if not torch.cuda.is_available():
        return []
    found: list[dict[str, Any]] = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(
            {
                "name": f"cuda:{index}",
                "model": properties.name,
                "capability": [properties.major, properties.minor],
                "memory": properties.total_memory,
                "bf16": "native" if torch.version.hip or properties.major >= 8 else "emulated",
            }
        )
    return found


def _other_devices() -> list[dict[str, Any]]:
    import torch

    found: list[dict[str, Any]] = []
    if hasattr(torch, "xpu") and torch.xpu.is_available():
        for index in range(torch.xpu.device_count()):
            properties = torch.xpu.get_device_properties(index)
            found.append({"name": f"xpu:{index}", "model": properties.name, "memory": properties.total_memory})
    if torch.backends.mps.is_available():
        found.append({"name": "mps", "model": "Apple GPU"})
    return found


def _mapped() -> dict[str, list[str]]:
    """CUDA libraries of this process by name, each with the files it is mapped from."""
    wanted = ("libcuda.so", "libcudart", "libnvJitLink", "libcublas.so", "libcublasLt", "libcudnn.so")
    found: dict[str, list[str]] = {}
    try:
        with open("/proc/self/maps", errors="replace") as lines:  # noqa: PTH123
            paths = {line.split(maxsplit=5)[5].strip() for line in lines if line.count("/")}
    except OSError:
        return {}
    for path in sorted(paths):
        name = path.rsplit("/", 1)[-1]
        stem = next((each for each in wanted if name.startswith(each)), "")
        if stem:
            found.setdefault(stem.removesuffix(".so"), []).append(path)
    return found
