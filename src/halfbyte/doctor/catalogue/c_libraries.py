"""Group C: shared libraries and wheels that are missing, mixed, shadowed or built for another system."""

from __future__ import annotations

import re

from halfbyte.doctor import versions
from halfbyte.doctor.catalogue.entry import FailureClass, Reading, Remedy
from halfbyte.doctor.catalogue.links import links

__all__ = ["CLASSES"]

_UPGRADE_BNB = Remedy("install the newest bitsandbytes", install="bitsandbytes", upgrade=True)
_INSTEAD = Remedy("or use halfbyte in its place", "python -m halfbyte run SCRIPT.py")
_UNSET_PATH = Remedy("start without the foreign folders", "unset LD_LIBRARY_PATH", safe=True)
_NO_BINARY = "Cannot happen: halfbyte ships no binary."

_LIBRARIES = r"(?:cusparse(?:Lt)?|nvJitLink|cudart|cublas(?:Lt)?|cusolver|cudnn\w*|cufft|curand|nvrtc[\w-]*|nccl|cupti)"

_FILE = r"(?:[^\n]{0,400}?libbitsandbytes_cuda(?P<cuda>\d{3}))?"
_NATIVE = (
    r"c(?:ada|get_|gemm|igemm|int8|lamb|lars|lion|momentum|rms|percentile|prefetch|fill|transform|dequantize|quantize)"
    r"\w*"
)
_OURS = r"(?:torch|triton|numpy|transformers|accelerate|peft|numba|halfbyte)"


def _wanted_binary(found: re.Match[str]) -> Reading | None:
    digits = found.groupdict().get("cuda")
    if not digits:
        return None
    cuda = f"{digits[:2]}.{digits[2:]}"
    version = versions.bitsandbytes_for(cuda)
    if version is None:
        newest = max(versions.bitsandbytes_binaries("999"), key=versions.number)
        return Reading(
            f"no bitsandbytes known here has a binary for CUDA {cuda}; the newest is for CUDA {newest}",
            (_INSTEAD,),
        )
    return Reading(
        f"bitsandbytes {version} is the first that loads a binary for CUDA {cuda}",
        (Remedy(f"install one that has it ({version} or newer)", install=f"bitsandbytes>={version}", upgrade=True),),
    )


CLASSES = (
    FailureClass(
        "C1",
        "An old bitsandbytes (0.42 or older) does not find its CUDA library",
        "Up to 0.42 bitsandbytes searched the machine for CUDA by itself, and often failed; 0.43 and newer ask torch. "
        "An application may hold the old version back.",
        (_UPGRADE_BNB, Remedy("if an application pins the old version, report it there"), _INSTEAD),
        texts=(
            r"CUDA Setup failed despite (?:GPU|CUDA) being available",
            r"bitsandbytes[\\/]cuda_setup[\\/]main\.py",
            r"CUDA SETUP: (?:CUDA detection failed|Setup Failed)",
        ),
        follows=("A2", "A6", "A13", "B6", "C2", "C3", "C5", "C6", "C8", "C9", "C10", "C11"),
        here=_NO_BINARY,
        sources=links("bnb#966 bnb#572 bnb#1559"),
    ),
    FailureClass(
        "C2",
        "bitsandbytes has no binary for torch's CUDA version",
        "Each bitsandbytes release ships binaries for some CUDA versions. Up to 0.49 it wanted exactly torch's, since "
        "0.50 any of the same major version.",
        (
            _UPGRADE_BNB,
            Remedy(
                "or load another one that is there",
                "export BNB_CUDA_VERSION=130   # digits of the file name",
                safe=True,
            ),
            _INSTEAD,
        ),
        texts=(
            rf"(?:Configured CUDA binary not|No compatible CUDA binary) found at{_FILE}",
            rf"Required library version not found{_FILE}",
            rf"Could not find the bitsandbytes CUDA binary at{_FILE}",
            r"CUDA VERSION MISMATCH",
        ),
        here=_NO_BINARY,
        sources=links("bnb#1848 bnb#1688 bnb#631"),
        read=_wanted_binary,
    ),
    FailureClass(
        "C3",
        "bitsandbytes runs from its own source folder, or its library failed to load",
        "Python imports the checkout in the working directory, which was never compiled, in the place of the installed "
        "package; or loading the GPU library failed before and this is the fallback.",
        (Remedy("leave the source folder", "cd ~ && python -m bitsandbytes"), _UPGRADE_BNB),
        texts=(r"libbitsandbytes_cpu\.(?:so|dylib): cannot open shared object file",),
        follows=("A1", "C2", "C5", "C8", "C9"),
        here=_NO_BINARY,
        sources=links("bnb#1190 bnb#1180"),
    ),
    FailureClass(
        "C4",
        "bitsandbytes goes on without its library and fails later",
        "The library did not load when bitsandbytes was imported; what fails now is only the first use of it. The "
        "first message is the one to look at.",
        (
            Remedy("see what failed first", "python -c 'import bitsandbytes'"),
            Remedy("decide what this machine lacks", "python -m halfbyte"),
        ),
        texts=(
            r"was compiled without GPU support\.? 8-bit optimizers",
            r"was compiled without GPU support",
            rf"'NoneType' object has no attribute '{_NATIVE}'",
            r"name 'str2optimizer(?:32bit|8bit\w*)' is not defined",
            r"Attempted to use bitsandbytes native library functionality but it's not available",
            r"not available in CPU-only version of bitsandbytes",
        ),
        kind="symptom",
        follows=("A1", "A2", "A13", "B6", "C1", "C2", "C3", "C5", "C6", "C8", "C9", "C10", "C11", "F1", "F2"),
        here=_NO_BINARY,
        sources=links("bnb#719 bnb#853 textgen#1995 bnb#1615"),
    ),
    FailureClass(
        "C5",
        "A CUDA library that a binary needs is not on the loader's path",
        "torch brings its CUDA libraries as pip packages of its own version; this binary wants another version, or one "
        "that was never installed.",
        (
            Remedy("install torch with the libraries that belong to it", install="torch", force=True),
            _UPGRADE_BNB,
            Remedy("notebook: restart the runtime after an upgrade"),
        ),
        texts=(
            rf"lib{_LIBRARIES}\.so(?:\.\d+)*: cannot open shared object file",
            rf"Missing dependency: lib{_LIBRARIES}\.so",
            rf"Could not load library lib{_LIBRARIES}\.so",
        ),
        here=_NO_BINARY,
        sources=links("bnb#1452 bnb#1905 llamafactory#6742"),
    ),
    FailureClass(
        "C6",
        "Another CUDA's libraries shadow the ones that belong to torch",
        "LD_LIBRARY_PATH (or a conda environment) puts a system CUDA first, so torch's libraries meet a wrong "
        "neighbour.",
        (
            _UNSET_PATH,
            Remedy(
                "or put torch's own folder first",
                'export LD_LIBRARY_PATH=$(python -c "import sysconfig; '
                "print(sysconfig.get_paths()['purelib'])\")/nvidia/nvjitlink/lib:$LD_LIBRARY_PATH",
                safe=True,
            ),
        ),
        texts=(
            r"undefined symbol: __nvJitLink\w+",
            rf"lib{_LIBRARIES}\.so(?:\.\d+)*: (?:undefined symbol|version '[^'\n]+' not found)",
            r"undefined symbol: (?:nccl[A-Z]|cudnn[A-Z]|cublas[A-Z]|cusparse[A-Z]|cudaGet)\w*",
        ),
        sources=links("torch#111469 torch#134929 torch#152783"),
    ),
    FailureClass(
        "C7",
        "Several CUDA runtimes were found; usually harmless",
        "conda, /usr/local and pip each brought one. Only the one that the process has loaded counts.",
        (Remedy("see which one is loaded", "python -m halfbyte --only ENV -v"),),
        texts=(r"Found duplicate CUDA runtime files", r"Found duplicate \['libcudart"),
        kind="notice",
        sources=links("bnb#331 bnb#631"),
    ),
    FailureClass(
        "C8",
        "The C library of this system is older than the wheel needs",
        "The wheel was built for a newer Linux distribution than this one.",
        (
            Remedy("bitsandbytes: 0.46 and newer run from glibc 2.24 on", install="bitsandbytes>=0.46", upgrade=True),
            Remedy("other wheels: a newer distribution, or a container with one", "ldd --version"),
        ),
        texts=(r"version 'GLIBC_[\d.]+' not found", r"\bGLIBC_[\d.]+' not found"),
        sources=links("lora-scripts#694 bnb#957"),
    ),
    FailureClass(
        "C9",
        "The C++ library of this system or environment is older than the binary needs",
        "libstdc++ lacks a version that the binary was linked against; in conda an old copy may come before the "
        "system's.",
        (
            Remedy("conda: a newer one", "conda install -c conda-forge libstdcxx-ng"),
            Remedy("otherwise upgrade the distribution, or compile the package here"),
            _UPGRADE_BNB,
        ),
        texts=(r"\b(?:GLIBCXX|CXXABI)_\d+(?:\.\d+)+'? not found",),
        sources=links("bnb#1663 bnb#1139"),
    ),
    FailureClass(
        "C10",
        "pip fell back to bitsandbytes 0.42.0, the last wheel for any platform",
        "No newer wheel fits this Python, pip, system or processor, so pip took an old one that says it fits "
        "everywhere; its binaries do not.",
        (
            Remedy("let pip see newer wheels", "python -m pip install --upgrade pip"),
            Remedy("then demand one", install="bitsandbytes>=0.45", upgrade=True),
            _INSTEAD,
        ),
        texts=(r"bitsandbytes-0\.42\.0-py3-none-any\.whl",),
        here="Cannot happen: halfbyte's one wheel is right for every platform.",
        sources=links("bnb#1172"),
    ),
    FailureClass(
        "C11",
        "Two versions of a package are mixed, as after an upgrade without a restart",
        "Files of the old and the new version meet: the running notebook still holds the old one, or the upgrade "
        "stopped half way.",
        (
            Remedy("restart the runtime (kernel) first"),
            Remedy("if it stays, install it again", install="bitsandbytes", force=True),
        ),
        texts=(
            rf"undefined symbol: {_NATIVE}",
            r"cannot import name 'sync_gpu'",
        ),
        follows=("A1", "C2"),
        sources=links("bnb#629"),
    ),
    FailureClass(
        "C12",
        "A file or folder of yours hides a package of the same name",
        "Python looks in the working directory first: a folder triton/ or a file torch.py there is imported in the "
        "place of the package.",
        (
            Remedy("see which file is imported", "python -c 'import triton; print(triton.__file__)'"),
            Remedy("work in another folder, or rename the file", "cd ~"),
        ),
        texts=(
            r"No module named 'triton\.language'",
            rf"No module named '({_OURS})\.[\w.]+'; '\1' is not a package",
            rf"partially initialized module '{_OURS}' has no attribute",
            r"\(consider renaming '[^'\n]+' (?:since|if) it has the same name as",
        ),
        sources=links("bnb#561"),
    ),
    FailureClass(
        "C13",
        "conda gave a torch without CUDA, or two installers were mixed",
        "conda resolved a CPU build, or one built differently, or torch from conda and from pip lie over each other. "
        "PyTorch itself no longer publishes for conda; conda-forge does.",
        (
            Remedy(
                "one installer an environment; conda-forge's CUDA build", "conda install -c conda-forge pytorch-gpu"
            ),
            Remedy(
                "or a fresh environment with pip's wheel",
                "conda create -n halfbyte python=3.12 && conda activate halfbyte && python -m pip install torch",
            ),
        ),
        texts=(r"pytorch\.cuda:\s*not available", r"build\.cuda_version:\s*None"),
        sources=links("unsloth#221 torch#144071"),
    ),
)
"""In order of their ids."""
