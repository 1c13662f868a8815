"""Group F: platforms other than NVIDIA on ordinary Linux and Windows."""

from __future__ import annotations

from halfbyte.doctor.catalogue.entry import FailureClass, Remedy
from halfbyte.doctor.catalogue.links import links

__all__ = ["CLASSES"]

_INSTEAD = Remedy("use halfbyte in its place; nothing is compiled for one machine", "python -m halfbyte run SCRIPT.py")

CLASSES = (
    FailureClass(
        "F1",
        "ROCm: binary, ROCm version and GPU do not match",
        "The binary was built for another ROCm than torch's (torch.version.hip), or has no code for this GPU (gfx "
        "number).",
        (
            Remedy("see torch's ROCm version", "python -c 'import torch; print(torch.version.hip)'"),
            Remedy(
                "install torch from the index of your ROCm version",
                "python -m pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/rocmX.Y",
            ),
            Remedy(
                "GPU not on AMD's list, Linux, ROCm before 7.14: present it as its listed neighbour",
                "export HSA_OVERRIDE_GFX_VERSION=11.0.0   # 10.3.0 for RDNA 2; unset it from ROCm 7.14 on",
                safe=True,
            ),
            _INSTEAD,
        ),
        texts=(
            r"undefined symbol:? _*device_stub",
            r"Configured ROCm binary not found",
            r"libbitsandbytes_(?:rocm|hip)\d*\.so",
            r"\brocm\d+\.so\b",
            r"HIP error: invalid device function",
            r"hipErrorNoBinaryForGpu",
        ),
        here="Cannot happen: halfbyte ships no binary; Triton compiles for the GPU that is there.",
        sources=links("bnb#1519 bnb#1608 bnb#1550 https://github.com/ROCm/bitsandbytes/issues/91"),
    ),
    FailureClass(
        "F2",
        "macOS: this operation does not exist for Apple GPUs",
        "bitsandbytes covers Apple GPUs only in part (torch 2.9 or newer; no 8-bit or paged optimizers) and calls that "
        "a CPU-only version.",
        (
            _INSTEAD,
            Remedy("or let this part run on the CPU", "export PYTORCH_ENABLE_MPS_FALLBACK=1", safe=True),
        ),
        texts=(
            r"operator 'bitsandbytes::\w+' is not currently implemented for the MPS device",
            r"\bmps\b[\s\S]{0,400}?not available in CPU-only version of bitsandbytes",
            r"not available in CPU-only version of bitsandbytes[\s\S]{0,400}?\bmps\b",
        ),
        sources=links("bnb#1983 bnb#2069"),
    ),
    FailureClass(
        "F3",
        "Jetson: wheels for ARM servers do not run on JetPack",
        "Wheels on PyPI for aarch64 are made for servers (sbsa) and their CUDA; a Jetson has JetPack's.",
        (
            Remedy("wheels made for JetPack", "# choose your JetPack and CUDA at\nhttps://pypi.jetson-ai-lab.io/"),
            _INSTEAD,
        ),
        texts=(
            r"-tegra\b[\s\S]{0,4000}?named symbol not found",
            r"named symbol not found[\s\S]{0,4000}?(?:-tegra\b|nv_tegra_release)",
            r"nv_tegra_release[\s\S]{0,4000}?named symbol not found",
        ),
        sources=links("bnb#1930 bnb#1218 bnb#1941"),
    ),
    FailureClass(
        "F4",
        "Intel GPU on Windows: Triton finds no compiler",
        "Triton for Intel GPUs compiles its launcher with Visual Studio or Intel's own compiler, and older versions "
        "did not look for the gcc that is there.",
        (
            Remedy(
                "newer torch and triton for Intel GPUs",
                install="torch",
                index_url="https://download.pytorch.org/whl/xpu",
                upgrade=True,
            ),
            Remedy(
                "or install the Visual Studio Build Tools and oneAPI, and start from a prompt that knows them",
                '"C:\\Program Files (x86)\\Intel\\oneAPI\\setvars.bat"',
            ),
        ),
        texts=(
            r"triton[\\/]backends[\\/]intel[\s\S]{0,3000}?Failed to find C compiler",
            r"\bxpu\b[\s\S]{0,3000}?Failed to find C compiler",
        ),
        sources=links("xpu-triton#4707 unsloth#10018"),
    ),
)
"""In order of their ids."""
