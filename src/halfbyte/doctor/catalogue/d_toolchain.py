"""Group D: what Triton and numba need to compile on the spot: compiler, headers, assembler, driver library, cache."""

from __future__ import annotations

import re

from halfbyte.doctor import versions
from halfbyte.doctor.catalogue.entry import FailureClass, Reading, Remedy
from halfbyte.doctor.catalogue.links import links

__all__ = ["CLASSES"]


def _triton_windows(torch: str) -> str:
    """Installs the triton release that a torch release asks for."""
    major, minor = versions.number(versions.triton_for(torch) or "3.9")
    return f'python -m pip install --upgrade "triton-windows<{major}.{minor + 1}"   # torch {torch}'


_TRITON_WINDOWS = Remedy(
    "Windows: the package made for it, in the release that your torch asks for",
    "\n".join(_triton_windows(torch) for torch in versions.torch_versions()[-3:]),
)
_LIBCUDA_PATH = Remedy(
    "name the folder that has libcuda.so.1",
    "export TRITON_LIBCUDA_PATH=/usr/lib64-nvidia   # Colab; WSL: /usr/lib/wsl/lib",
    safe=True,
)
_CACHE = Remedy(
    "put Triton's cache where you may write and run files",
    "export TRITON_CACHE_DIR=$HOME/.cache/triton   # or /tmp/triton-$UID",
    safe=True,
)
_REINSTALL_TORCH = Remedy(
    "install torch again; it brings the triton that it was made with", install="torch", force=True
)


def _assembler(found: re.Match[str]) -> Reading | None:
    groups = found.groupdict()
    if not groups.get("sm"):
        return Reading("the assembler refused; the lines that it printed itself, if any, say whether the GPU is why")
    return Reading(f"the ptxas in use does not know {groups['sm']}; its release is older than the GPU")


def _numpy_wanted(found: re.Match[str]) -> Reading | None:
    limit = found.groupdict().get("numpy")
    if not limit or "less" not in found[0]:
        return None
    major, minor = limit.split(".")
    return Reading(
        f"this numba goes up to NumPy {limit}",
        (Remedy("keep numba, take the NumPy that it supports", install=f"numpy<{major}.{int(minor) + 1}"),),
    )


CLASSES = (
    FailureClass(
        "D1",
        "No C compiler for Triton",
        "Triton compiles a small launcher in C the first time; this system (a slim image, or Windows) has no gcc or "
        "clang, or CC names one that is not there.",
        (
            Remedy("Debian, Ubuntu", "sudo apt-get install -y build-essential"),
            Remedy("Fedora, RHEL", "sudo dnf install -y gcc"),
            Remedy(
                "without root, in conda",
                "conda install -c conda-forge gcc_linux-64 && export CC=x86_64-conda-linux-gnu-gcc",
            ),
            Remedy(
                "without root, with pip alone (400 MB)",
                "python -m pip install ziglang\n"
                "printf '#!/bin/sh\\nexec python -m ziglang cc \"$@\"\\n' > ~/zigcc\n"
                "chmod +x ~/zigcc && export CC=~/zigcc",
            ),
            _TRITON_WINDOWS,
        ),
        texts=(r"Failed to find C compiler",),
        follows=("F4",),
        here="Only GPUs need it: on the CPU halfbyte compiles without a C compiler.",
        sources=links("unsloth#1772 torch#136361"),
    ),
    FailureClass(
        "D2",
        "Python's header files are missing",
        "Triton's launcher includes Python.h. System Pythons leave it to a separate package, Windows' embedded Python "
        "leaves it out; Pythons from uv, conda and python.org bring it.",
        (
            Remedy("Debian, Ubuntu", "sudo apt-get install -y python3-dev   # python3.12-dev for that version"),
            Remedy("Fedora, RHEL", "sudo dnf install -y python3-devel"),
            Remedy(
                "without root: a Python that has them",
                "uv venv --python 3.12 --managed-python && uv pip install halfbyte",
            ),
            Remedy("Windows, embedded Python: copy Include/ and libs/ from an installer of the same version"),
        ),
        texts=(
            r"Python\.h'?: No such file or directory",
            r"include file 'Python\.h' not found",
            r"'Python\.h' file not found",
            r"Cannot open include file: 'Python\.h'",
        ),
        here="Only GPUs need it: on the CPU halfbyte compiles without C headers.",
        sources=links("sglang#1117 triton-windows#113"),
    ),
    FailureClass(
        "D3",
        "Triton's assembler (ptxas) is older than the GPU",
        "The ptxas inside the triton wheel does not know this architecture. Triton 3.9 has two: `ptxas` for GPUs "
        "before sm_90 and `ptxas-blackwell` from there on.",
        (
            Remedy("newer torch and triton together", install="torch", upgrade=True),
            Remedy(
                "or one of an installed CUDA 13 toolkit",
                "export TRITON_PTXAS_PATH=/usr/local/cuda/bin/ptxas\n"
                "export TRITON_PTXAS_BLACKWELL_PATH=/usr/local/cuda/bin/ptxas",
                safe=True,
            ),
        ),
        texts=(
            r"ptxas fatal\s*: Value '(?P<sm>sm_\w+)' is not defined for option 'gpu-name'",
            r"Value '(?P<sm>sm_\w+)' is not defined for option 'gpu-name'",
            r"'(?P<sm>sm_\w+)' is not a recognized processor for this target",
            r"\bPTXASError\b",
            r"Internal Triton PTX codegen error",
            r"'ptxas' failed with error code \d+",
        ),
        follows=("B4",),
        sources=links("triton#8539 vllm#31338"),
        read=_assembler,
    ),
    FailureClass(
        "D4",
        "Triton does not find the driver's library",
        "Triton asks ldconfig for libcuda.so.1, and the system's list lacks it: Colab, Kaggle, WSL, some containers.",
        (Remedy("write the list again", "sudo ldconfig"), _LIBCUDA_PATH),
        texts=(
            r"libcuda\.so cannot found",
            r"cannot find -lcuda\b",
            r"Possible files are located at[\s\S]{0,400}?Please create a symlink",
        ),
        follows=("A6",),
        sources=links("triton#2019 mamba#14 unsloth#679"),
    ),
    FailureClass(
        "D5",
        "This system has no /sbin/ldconfig",
        "Triton calls it by that fixed path; NixOS and distroless images do not have it.",
        (_LIBCUDA_PATH,),
        texts=(r"FileNotFoundError[^\n]{0,400}/sbin/ldconfig", r"No such file or directory: '(?:/sbin/)?ldconfig"),
        sources=links("kernels#670 mamba#363"),
    ),
    FailureClass(
        "D6",
        "Triton was asked to compile without a usable GPU",
        "Triton found no driver to compile for. The reason is above: torch without CUDA, a driver too old, or "
        "hidden GPUs.",
        (Remedy("find the first thing that is broken", "python -m halfbyte"),),
        texts=(r"\b0 active drivers \(\[\]\)",),
        kind="symptom",
        follows=("A1", "A2", "A3", "A4", "A5", "A6", "A7", "A8", "A9", "A10", "A11", "A13"),
        here="halfbyte goes to its CPU code before Triton is asked.",
    ),
    FailureClass(
        "D7",
        "Triton's cache folder cannot be written",
        "The home folder is / or read-only (OpenShift, slim containers), or the cache in a shared folder belongs to "
        "someone else.",
        (_CACHE,),
        texts=(
            r"(?:PermissionError|FileNotFoundError|OSError)[^\n]{0,400}'[^'\n]*(?:\.triton|[\\/]triton|torchinductor)[^'\n]*'",
            r"Permission denied:? '?[^'\n]*[\\/]\.?triton\b",
            r"(?:PermissionError|Permission denied)[^\n]{0,400}[\\/]triton[\\/][^\n]{0,400}\.lock",
            r"/tmp/triton/\S*\.lock",
            r"triton[\\/]runtime[\\/]cache\.py[\s\S]{0,1500}?^[^\n]{0,80}?(?:PermissionError|FileNotFoundError|NotADirectoryError|OSError):",
            r"Read-only file system: '[^'\n]*(?:\.triton|[\\/]triton|torchinductor)",
        ),
        here="halfbyte moves the cache to a temporary folder by itself.",
        sources=links("https://github.com/foundation-model-stack/fms-hf-tuning/issues/367 triton#518"),
    ),
    FailureClass(
        "D8",
        "The cache lies where nothing may be run (noexec)",
        "The compiled file is there, but its folder is mounted noexec, as docker's tmpfs is by default, so it cannot "
        "be loaded.",
        (
            _CACHE,
            Remedy("docker: a tmpfs that may run files", "docker run --tmpfs /tmp:exec ..."),
        ),
        texts=(r"failed to map segment from shared object",),
        sources=links("torch#123054 https://github.com/docker/compose/issues/1339"),
    ),
    FailureClass(
        "D9",
        "Triton is not installed",
        "CPU builds of torch, macOS and Windows do not bring Triton; or it was removed.",
        (
            Remedy("Linux: install torch again; its CUDA builds bring triton", install="torch", force=True),
            _TRITON_WINDOWS,
            Remedy("Windows: it needs the Visual C++ runtime", "winget install Microsoft.VCRedist.2015+.x64"),
        ),
        texts=(
            r"No module named 'triton'",
            r"No module named triton\b(?![.\w])",
            r"Cannot find a working triton installation",
        ),
        follows=("A1", "D11"),
        here="halfbyte computes without Triton, on the CPU or with plain torch.",
        sources=links("torch#136361 unsloth#210 triton-windows#3"),
    ),
    FailureClass(
        "D10",
        "bitsandbytes before 0.45.2 with Triton 3.2 or newer",
        "It imports triton.ops, which Triton 3.2 removed.",
        (Remedy("install the newest bitsandbytes", install="bitsandbytes>=0.45.2", upgrade=True),),
        texts=(r"No module named 'triton\.ops",),
        here="Cannot happen: halfbyte uses Triton's public language only.",
        sources=links("bnb#1492 triton#5471"),
    ),
    FailureClass(
        "D11",
        "triton is not the version that this torch was made with",
        "torch pins one triton release; another one was installed over it, and the two call each other by names that "
        "moved.",
        (_REINSTALL_TORCH, Remedy("see what torch asks for", "python -m pip show torch | grep -i requires")),
        texts=(
            r"cannot import name '\w+' from 'triton[\w.]*'",
            r"module 'triton[\w.]*' has no attribute '\w+'(?! \(consider renaming)",
            r"No module named 'triton\.compiler[\w.]*'",
            r"\btriton\.compiler\.errors\.\w+",
        ),
        follows=("B3", "B4", "D1", "D2", "D3", "D12"),
        sources=links("triton#5471 unsloth#460"),
    ),
    FailureClass(
        "D12",
        "Triton cannot read the kernels' source",
        "Triton compiles from source text; a frozen, zipped or .pyc-only application has none.",
        (
            Remedy("PyInstaller: ship the source too", "pyinstaller --collect-all triton --collect-all halfbyte ..."),
            Remedy("or leave the package out of the archive, as .py files"),
        ),
        texts=(r"@jit functions should be defined in a Python file", r"No function definition found for \w+"),
    ),
    FailureClass(
        "D13",
        "The first call compiles, and looks as if it hung",
        "Kernels are compiled and cached at their first use: seconds each. Later runs start from the cache.",
        (
            Remedy("compile before the first request", "halfbyte warmup MODEL"),
            Remedy("in containers keep the cache between runs", "docker run -v triton-cache:/root/.triton ..."),
        ),
        sources=links("triton#4781 vllm#47456"),
    ),
    FailureClass(
        "D14",
        "numba cannot place its cache",
        "The package is installed where this user may not write, and no other folder for compiled code is known.",
        (Remedy("name one", "export NUMBA_CACHE_DIR=/tmp/numba-$UID", safe=True),),
        texts=(r"cannot cache function\b", r"no locator available for file"),
        here="halfbyte names a folder by itself.",
        sources=links("numba#4908 outlines#983"),
    ),
    FailureClass(
        "D15",
        "numba does not support this NumPy or Python yet",
        "numba follows new releases of NumPy and Python with some delay.",
        (Remedy("a newer numba", install="numba", upgrade=True),),
        texts=(
            r"Numba needs NumPy (?P<numpy>\d+\.\d+) or (?:less|greater)",
            r"Numba requires at least version \S+ of NumPy",
            r"Cannot install on Python version [\d.]+; only versions",
        ),
        here="halfbyte computes without numba too, with plain torch, slower.",
        sources=links("https://numba.readthedocs.io/en/stable/user/installing.html"),
        read=_numpy_wanted,
    ),
)
"""In order of their ids."""
