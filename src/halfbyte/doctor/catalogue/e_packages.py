"""Group E: versions of the Python packages around a quantized model, and messages that name the wrong culprit."""

from __future__ import annotations

import re

from halfbyte.doctor.catalogue.entry import FailureClass, Reading, Remedy
from halfbyte.doctor.catalogue.links import links

__all__ = ["CLASSES"]

_UPGRADE_TRANSFORMERS = Remedy("install the newest transformers", install="transformers", upgrade=True)
_UPGRADE_BNB = Remedy("install the newest bitsandbytes", install="bitsandbytes", upgrade=True)
_UPGRADE_ACCELERATE = Remedy("install the newest accelerate", install="accelerate", upgrade=True)
_REINSTALL_BNB = Remedy("install it again", install="bitsandbytes", force=True)


def _renamed(found: re.Match[str]) -> Reading | None:
    if "has no attribute" not in found[0] and "not a package" not in found[0]:
        return None
    return Reading("Python imported a file or folder of yours named bitsandbytes, not the package")


CLASSES = (
    FailureClass(
        "E1",
        "transformers says bitsandbytes is missing or old; the true reason is another",
        "transformers tried to import it, failed for any reason (no CUDA, an old accelerate, a broken library) and "
        "prints this text for all of them.",
        (
            Remedy("see the true error", "python -c 'import accelerate, bitsandbytes'"),
            Remedy("use halfbyte in its place", "python -m halfbyte run SCRIPT.py"),
            _UPGRADE_ACCELERATE,
            _UPGRADE_BNB,
        ),
        texts=(
            r"Using '?bitsandbytes'? (?:8-bit|4-bit|8-bit/4-bit|4-bit/8-bit) quantization requires",
            r"requires (?:Accelerate: [^\n]{0,400}and )?the latest version of bitsandbytes",
        ),
        kind="symptom",
        follows=(
            *("A1", "A2", "A3", "A13", "C1", "C2", "C3", "C4", "C5", "C6", "C8", "C9", "C10", "C11", "C12"),
            *("D9", "D10", "D11", "E4", "E5", "E6"),
        ),
        sources=links("transformers#27764 transformers#38528 transformers#26165"),
    ),
    FailureClass(
        "E2",
        "A bug of transformers 4.49",
        "Its quantizer changes a set that Python made unchangeable.",
        (_UPGRADE_TRANSFORMERS,),
        texts=(r"'frozenset' object has no attribute 'discard'",),
        sources=links("transformers#36371 transformers#36949"),
    ),
    FailureClass(
        "E3",
        "transformers 5 with an older bitsandbytes",
        "transformers 5 hands new arguments to the 4-bit parameter that this bitsandbytes does not know.",
        (_UPGRADE_BNB,),
        texts=(r"(?:Params4bit|Int8Params)\.__new__\(\) got an unexpected keyword argument '\w+'",),
        here="halfbyte's parameters accept them.",
        sources=links("bnb#1900"),
    ),
    FailureClass(
        "E4",
        "A file of yours named bitsandbytes.py, or packages of different times",
        "Python imports your file in the place of the package; or peft and transformers are of versions that do not "
        "belong together.",
        (
            Remedy("see which file is imported", "python -c 'import bitsandbytes; print(bitsandbytes.__file__)'"),
            Remedy("rename a file or folder of yours with that name"),
            _UPGRADE_TRANSFORMERS,
            Remedy("and peft", install="peft", upgrade=True),
        ),
        texts=(
            r"cannot import name 'get_keys_to_not_convert'",
            r"No module named 'bitsandbytes\.[\w.]+'; 'bitsandbytes' is not a package",
            r"partially initialized module 'bitsandbytes' has no attribute",
            r"module 'bitsandbytes' has no attribute '(?:nn|optim|functional|__version__)'",
        ),
        sources=links("bnb#1309"),
        read=_renamed,
    ),
    FailureClass(
        "E5",
        "bitsandbytes' package record is broken or missing",
        "The code is there but its .dist-info folder is not (a half finished installation, a frozen application), so "
        "its version cannot be read.",
        (_REINSTALL_BNB,),
        texts=(
            r"No package metadata was found for '?bitsandbytes",
            r"PackageNotFoundError: '?bitsandbytes",
            r"bitsandbytes'? that is not compatible with (?:4|8)-?bit",
            r"bitsandbytes[^\n]{0,80} incompatible with 4-?bit",
        ),
        sources=links("https://blog.csdn.net/gitblog_07443/article/details/148943854"),
    ),
    FailureClass(
        "E6",
        "A package built for NumPy 1 runs with NumPy 2",
        "torch 2.3 is the first made for NumPy 2; older ones, and other packages of that time, need NumPy 1.",
        (
            Remedy("go back to NumPy 1", install="numpy<2", force=False),
            Remedy("or forward to a newer torch", install="torch", upgrade=True),
        ),
        texts=(
            r"A module that was compiled using NumPy 1\.x cannot be run in",
            r"_ARRAY_API not found",
            r"numpy\.core\.multiarray failed to import",
            r"numpy\.dtype size changed, may indicate binary incompatibility",
        ),
        sources=links("torch#107302 torch#132179 transformers#35220 exo#109"),
    ),
    FailureClass(
        "E7",
        "The model does not fit on the GPU; parts were put on the CPU or disk",
        "device_map='auto' found too little free GPU memory, and quantized layers cannot run from there. The flag that "
        "the message names keeps those layers in float32.",
        (
            Remedy("free the GPU, or keep everything on it and see what is short", "device_map={'': 0}"),
            Remedy("see what other programs hold", "nvidia-smi"),
            Remedy("use a smaller model or context, or 4 bits in the place of 8"),
        ),
        texts=(
            r"Some modules are dispatched on the CPU or the disk",
            r"make sure you have enough GPU RAM to fit the quantized model",
        ),
        sources=links("transformers#26153 textgen#2380"),
    ),
    FailureClass(
        "E8",
        "A quantized model was moved with .to()",
        "The installed accelerate, transformers or diffusers, or the program itself, moves a model that is already in "
        "its place.",
        (
            Remedy("place it while loading, and remove .to() or .cuda()", "device_map={'': 0}"),
            _UPGRADE_ACCELERATE,
            _UPGRADE_TRANSFORMERS,
        ),
        texts=(
            r"'?\.?(?:to|cuda)(?:\(\))?'? is not supported for '?(?:4-bit|8-bit)'?",
            r"Calling '(?:to|cuda)\(\)' is not supported for",
        ),
        sources=links("transformers#38717 bnb#547 diffusers#10653"),
    ),
    FailureClass(
        "E9",
        "bitsandbytes 0.50 looked for faster CPU code on the Hub; harmless",
        "It tries to fetch CPU kernels when it is imported, and says so when the package kernels is missing, even on a "
        "GPU machine.",
        (Remedy("nothing has to be done; to silence it", install="kernels"),),
        texts=(r"Failed to load CPU \w+ from kernels-community", r"No module named 'kernels'"),
        kind="notice",
        here="halfbyte fetches nothing when it is imported.",
        sources=links("bnb#2064 bnb#2065 bnb#1972"),
    ),
    FailureClass(
        "E10",
        "An old peft with bitsandbytes 0.45 or newer, on 8-bit layers",
        "bitsandbytes 0.45 changed how 8-bit weights lie in memory and dropped what older peft versions used; merging "
        "or even attaching an adapter fails, or gives wrong weights.",
        (Remedy("install peft 0.14 or newer", install="peft>=0.14", upgrade=True),),
        texts=(
            r"'MatmulLtState' object has no attribute '\w+'",
            r"module 'bitsandbytes\.functional' has no attribute '(?:transform|igemmlt|mm_dequant|double_quant|"
            r"nvidia_transform|vectorwise_\w+)'",
        ),
        sources=links("bnb#1450 llamafactory#6548"),
    ),
    FailureClass(
        "E11",
        "The GPU's memory is full",
        "Weights, activations, optimizer state and what other programs hold do not fit together.",
        (
            Remedy("see what other programs hold", "nvidia-smi"),
            Remedy("load in 4 bits", "BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_use_double_quant=True)"),
            Remedy("training: recompute activations, take smaller batches", "model.gradient_checkpointing_enable()"),
            Remedy(
                "if much is reserved but free", "export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True", safe=True
            ),
        ),
        texts=(r"CUDA out of memory", r"torch\.(?:cuda\.)?OutOfMemoryError", r"CUDA error: out of memory"),
        sources=links("https://pytorch.org/docs/stable/notes/cuda.html"),
    ),
)
"""In order of their ids."""
