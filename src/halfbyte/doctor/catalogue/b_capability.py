"""Group B: torch sees the GPU, but the code does not run on it, or not rightly."""

from __future__ import annotations

import re

from halfbyte.doctor import versions
from halfbyte.doctor.catalogue.builds import torch_for_capability
from halfbyte.doctor.catalogue.entry import FailureClass, Reading, Remedy
from halfbyte.doctor.catalogue.links import links

__all__ = ["CLASSES"]

_COMPUTE_IN_HALF = Remedy(
    "compute in float16", "BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float16)"
)
_PROVE = Remedy("compute on every GPU against float64", "python -m halfbyte --only NUM")
_OTHER_GPU = Remedy("or use a newer GPU (T4, L4 or later)")


def _capability(found: re.Match[str]) -> Reading | None:
    groups = found.groupdict()
    if groups.get("sm"):
        digits = re.sub(r"\D", "", groups["sm"])
        capability = (int(digits[:-1]), int(digits[-1]))
    elif groups.get("capability"):
        major, minor = groups["capability"].split(".")
        capability = (int(major), int(minor))
    else:
        return None
    remedies = torch_for_capability(capability)
    if not remedies:
        return Reading(f"no torch build from 2.8 on has code for sm_{capability[0]}{capability[1]}")
    last = versions.last_torch_for(capability)
    note = f"; torch {last} is the last with it" if last else ""
    return Reading(f"this torch build has no code for sm_{capability[0]}{capability[1]}{note}", remedies)


_NEWER = r"(?P<sm>sm_(?:8\d|9\d|1[0-3]\d)a?)"
_OLDER = r"(?P<sm>sm_[3-7]\d)"

CLASSES = (
    FailureClass(
        "B1",
        "This torch build has no code for this GPU (GPU newer than the build)",
        "Compiled code runs on GPUs of the same major architecture only, and this build has none for this one. RTX 50, "
        "B200 and GB10 (sm_100 to sm_121) need a build for CUDA 12.8 or newer.",
        (*torch_for_capability((12, 0)), _PROVE),
        texts=(
            rf"CUDA capability {_NEWER} is not compatible with the current PyTorch installation",
            r"of cuda capability (?P<capability>(?:8|9|1\d)\.\d)\.? Minimum and Maximum cuda capability supported",
            r"of compute capability \(CC\) (?P<capability>(?:8|9|1\d)\.\d)",
            r"no kernel image is available for execution on the device",
            r"cudaErrorNoKernelImageForDevice",
        ),
        follows=("B2",),
        sources=links("torch#149845 vllm#19906 comfy#10382"),
        read=_capability,
    ),
    FailureClass(
        "B2",
        "This torch build has no code for this GPU any more (GPU older than the build)",
        "Builds for CUDA 12.8 and newer left out Maxwell and Pascal, those for CUDA 13 Volta too. is_available() still "
        "says True; the first computation fails.",
        (*torch_for_capability((6, 0)), _OTHER_GPU),
        texts=(
            rf"CUDA capability {_OLDER} is not compatible with the current PyTorch installation",
            r"of cuda capability (?P<capability>[3-7]\.\d)\.? Minimum and Maximum cuda capability supported",
            r"of compute capability \(CC\) (?P<capability>[3-7]\.\d)",
            r"PyTorch no longer supports this GPU because it is too old",
        ),
        sources=links("kaggle#1546 torch#172352 torch#190385"),
        read=_capability,
    ),
    FailureClass(
        "B3",
        "GPU too old for Triton (before Volta)",
        "Triton compiles for compute capability 7.0 and newer only.",
        (
            Remedy(
                "run without Triton's kernels; slower, same results", "export HALFBYTE_BACKEND=reference", safe=True
            ),
            _OTHER_GPU,
        ),
        texts=(
            r"too old to be supported by the triton GPU compiler",
            r"Triton only supports devices of CUDA Capability >= 7\.0",
        ),
        follows=("B2",),
        here="halfbyte computes with plain torch on such a GPU.",
        sources=links("torch#93528 triton-windows#133"),
    ),
    FailureClass(
        "B4",
        "bfloat16 code compiled for a GPU without bfloat16 (before Ampere)",
        "The GPU has no bfloat16 instructions (T4, V100, RTX 20): the compiler rejects the kernel or aborts "
        "the process.",
        (_COMPUTE_IN_HALF, Remedy("with the Trainer", "TrainingArguments(bf16=False, fp16=True)")),
        texts=(
            r"Feature '\.bf16' requires \.target sm_80 or higher",
            r"Feature '[^'\n]*bf16[^'\n]*' requires \.target sm_\d+",
            r"UNREACHABLE[\s\S]{0,200}?Unsupported conversion",
            r"Unsupported conversion from b?f\d+ to b?f\d+",
        ),
        sources=links("lightning#18070 triton#2780 triton#1609"),
    ),
    FailureClass(
        "B5",
        "bfloat16 is emulated on this GPU, and slow",
        "torch.cuda.is_bf16_supported() says True on a T4 because emulation counts; programs that ask it choose "
        "bfloat16 although the GPU has no instructions for it.",
        (
            _COMPUTE_IN_HALF,
            Remedy("ask for the hardware's answer", "torch.cuda.is_bf16_supported(including_emulation=False)"),
        ),
        texts=(r"bf16: emulated",),
        sources=links("soup#385"),
    ),
    FailureClass(
        "B6",
        "bitsandbytes' binary and this GPU's CUDA libraries do not match",
        "The binary was compiled for other libraries or GPUs than these. On a Jetson: the aarch64 wheel is made for "
        "servers and their CUDA, not for JetPack's.",
        (
            Remedy(
                "use halfbyte in its place; nothing is compiled for one machine", "python -m halfbyte run SCRIPT.py"
            ),
            Remedy(
                "Jetson: wheels made for JetPack",
                "# choose your JetPack and CUDA at\nhttps://pypi.jetson-ai-lab.io/",
            ),
            Remedy("elsewhere: a newer bitsandbytes", install="bitsandbytes", upgrade=True),
        ),
        texts=(
            r"Error named symbol not found",
            r"named symbol not found at line \d+ in file",
            r"named symbol not found",
        ),
        follows=("F3",),
        here="Cannot happen: halfbyte ships no binary.",
        sources=links("bnb#791 bnb#1930 bnb#1939 bnb#571"),
    ),
    FailureClass(
        "B7",
        "Intermediate code (PTX) newer than the driver can read",
        "A library brings PTX from a CUDA toolkit newer than the driver. Triton is seldom the one: it assembles "
        "machine code itself.",
        (
            Remedy("upgrade the NVIDIA driver", "nvidia-smi   # CUDA Version must not be lower than the library's"),
            Remedy("or install the library built for an older CUDA"),
        ),
        texts=(r"provided PTX was compiled with an unsupported toolchain", r"cudaErrorUnsupportedPtxVersion"),
        sources=links("trak#68 triton#479"),
    ),
    FailureClass(
        "B8",
        "8-bit matrix product not supported on this GPU",
        "cuBLASLt has no 8-bit product for this GPU or shape: GTX 16 cards, GPUs before Turing, and early versions on "
        "Hopper.",
        (
            Remedy("use 4 bits instead", "BitsAndBytesConfig(load_in_4bit=True)"),
            Remedy("on Hopper: a newer bitsandbytes", install="bitsandbytes", upgrade=True),
        ),
        texts=(r"cublasLt ran into an error", r"cuBLAS API failed with status 15"),
        sources=links("textgen#379 bnb#383"),
    ),
    FailureClass(
        "B9",
        "8-bit model answers with nonsense on GPUs before Turing",
        "A wrong result without an error, seen with 8-bit layers over several V100s; only a comparison of numbers on "
        "each device shows it.",
        (_PROVE, Remedy("use 4 bits instead", "BitsAndBytesConfig(load_in_4bit=True)")),
        sources=links("bnb#491"),
    ),
)
"""In order of their ids."""
