"""PyTorch as a child process found it: does it import, does it see every device, can it compute on them."""

from __future__ import annotations

import re

from halfbyte.doctor import versions
from halfbyte.doctor.checks.remedies import blame, without
from halfbyte.doctor.checks.torch_build import numbers, wrong_architecture
from halfbyte.doctor.facts.gpu import Gpu
from halfbyte.doctor.facts.installer import Installer
from halfbyte.doctor.facts.loader import GPU_MASKS, Environment
from halfbyte.doctor.facts.torch_build import TorchBuild
from halfbyte.doctor.facts.torch_import import Device, TorchImport
from halfbyte.doctor.host import Host
from halfbyte.doctor.model import Fix, Result
from halfbyte.doctor.registry import check

__all__: list[str] = []

_LOADER_CLASSES = (
    (r"nvJitLink|undefined symbol", "C6"),
    (r"GLIBCXX|CXXABI", "C9"),
    (r"GLIBC_", "C8"),
    (r"cannot open shared object file|file too short|invalid ELF", "C5"),
    (r"_ARRAY_API|NumPy 1\.x", "E6"),
)


@check("TORCH105", requires=("PY102",), classes=("C5", "C6", "C8", "C9", "C12", "E6"))
def torch_imports(torch_import: TorchImport, torch_build: TorchBuild, installer: Installer) -> Result:
    """`import torch` works.

    What it means: a child process has imported torch and made a tensor.
    Why it matters: a library that is missing, of another version or shadowed shows here first.
    How to fix: the report names what stands in the way, found by importing again without it.
    """
    if torch_import.ok:
        if torch_import.culprit is None and torch_import.seconds > 20:
            return Result.warned(f"import torch took {torch_import.seconds:.0f} s", "slow disk or network folder?")
        return Result.passed(f"import torch works ({torch_import.seconds:.1f} s)", torch_import.file)
    text = " ".join((torch_import.error, *torch_import.trace))
    classes = tuple(name for pattern, name in _LOADER_CLASSES if re.search(pattern, text))[:1]
    release = torch_build.version or "torch"
    again = installer.install(
        "install torch again", f"torch=={release}" if torch_build.version else "torch", force=True
    )
    culprit = torch_import.culprit
    how = f" ({torch_import.ended})" if torch_import.ended and not torch_import.ended.startswith("exit status") else ""
    if culprit is not None:
        shadow = culprit.name in {"cwd", "PYTHONPATH"}
        return Result.failed(
            f"import torch fails because of {'a file in this folder' if culprit.name == 'cwd' else culprit.name}{how}",
            torch_import.error,
            blame(culprit),
            fixes=(without(culprit),),
            classes=("C12",) if shadow else classes or ("C6",),
        )
    return Result.failed(
        f"import torch fails{how}", torch_import.error, *torch_import.trace, fixes=(again,), classes=classes
    )


@check("TORCH106", requires=("TORCH105", "TORCH101"), classes=("A2", "A3", "A4", "A9", "A10", "A11"))
def sees_gpus(torch_import: TorchImport, torch_build: TorchBuild, gpu: Gpu, environment: Environment) -> Result:
    """torch sees every GPU of the machine.

    What it means: `torch.cuda.device_count()` is what nvidia-smi lists, unless you chose a part of them.
    Why it matters: `is_available()` is False without an error when a variable hides the GPUs or the driver is ill.
    How to fix: the report names the variable that hides them, or what CUDA answers.
    """
    count = len(torch_import.devices)
    expected = len(gpu.smi) or len(gpu.gpu_nodes)
    if not gpu.reachable and not gpu.amd and not count:
        return Result.skipped("no GPU on this machine")
    if not torch_build.accelerated and not count:
        return Result.skipped("torch is a CPU-only build")
    if count == 0:
        return _sees_none(torch_import)
    lines = [f"{each.label}, {each.memory / 2**30:.0f} GiB" + _capability(each) for each in torch_import.devices]
    chosen = [f"{name}={value}" for name in GPU_MASKS if (value := environment.get(name)) is not None]
    if count < expected and not chosen:
        return Result.warned(
            f"torch sees {count} of {expected} GPUs",
            *lines,
            fixes=(Fix("see whether each of them answers", "nvidia-smi"),),
            classes=("A4",),
        )
    return Result.passed(f"torch sees {count} GPU{'s' if count > 1 else ''}", *lines, *chosen)


def _capability(device: Device) -> str:
    return f", capability {device.capability[0]}.{device.capability[1]}" if device.capability != (0, 0) else ""


def _sees_none(torch_import: TorchImport) -> Result:
    answers = tuple(line for line in (torch_import.cuda_error, *torch_import.warnings) if line)
    answers = (*answers, f"torch.cuda.is_available() is {torch_import.available}")
    mask = torch_import.mask_culprit
    if mask is not None:
        return Result.failed(
            f"{mask.name} hides every GPU from torch", blame(mask), *answers, fixes=(without(mask),), classes=("A3",)
        )
    text = " ".join(answers)
    known = {
        "Error 803": ("A9", Fix("take CUDA compatibility libraries out of the way", "unset LD_LIBRARY_PATH")),
        "Error 804": ("A10", Fix("take CUDA compatibility libraries out of the way", "unset LD_LIBRARY_PATH")),
        "Error 802": ("A11", Fix("start the fabric manager", "sudo systemctl enable --now nvidia-fabricmanager")),
        "unknown error": (
            "A4",
            Fix("load the memory module again", "sudo modprobe -r nvidia_uvm && sudo modprobe nvidia_uvm"),
        ),
        "driver on your system is too old": ("A2", Fix("upgrade the driver", "visit https://www.nvidia.com/drivers")),
    }
    for part, (name, fix) in known.items():
        if part in text:
            return Result.failed("CUDA does not start", *answers, fixes=(fix,), classes=(name,))
    fix = Fix("see whether the driver itself works", "nvidia-smi")
    return Result.failed("torch finds no GPU", *answers, fixes=(fix,), classes=("A4",))


@check("TORCH107", requires=("TORCH106",), classes=("B1", "B2"), proof="NUM102")
def architecture_of_devices(
    torch_import: TorchImport, torch_build: TorchBuild, installer: Installer, host: Host, gpu: Gpu
) -> Result:
    """The running torch has code for each device that it sees.

    What it means: what torch itself lists as its architectures covers each device's capability.
    Why it matters: as TORCH103, for builds that no table knows (nightly, conda, distribution).
    How to fix: as TORCH103.
    """
    built = _sass(torch_import.arches)
    cuda = [each for each in torch_import.devices if each.name.startswith("cuda")]
    if not cuda or not built or torch_build.hip:
        return Result.skipped("no CUDA device")
    newest_ptx = max((pair for pair in _ptx(torch_import.arches)), default=None)
    for device in cuda:
        by_ptx = newest_ptx is not None and newest_ptx <= device.capability
        if not versions.runs_on(built, device.capability) and not by_ptx:
            parts = (gpu, torch_build, installer, host)
            return wrong_architecture(device.label, device.capability, numbers(built), parts)
    return Result.passed("each device's architecture is in the build", " ".join(torch_import.arches))


def _sass(arches: tuple[str, ...]) -> tuple[tuple[int, int], ...]:
    found = (re.fullmatch(r"sm_(\d+)(\d)[a-z]?", arch) for arch in arches)
    return tuple((int(match[1]), int(match[2])) for match in found if match)


def _ptx(arches: tuple[str, ...]) -> tuple[tuple[int, int], ...]:
    found = (re.fullmatch(r"compute_(\d+)(\d)[a-z]?", arch) for arch in arches)
    return tuple((int(match[1]), int(match[2])) for match in found if match)


@check("TORCH108", requires=("TORCH105",), classes=("E6",))
def numpy_bridge(torch_import: TorchImport, installer: Installer) -> Result:
    """Tensors and NumPy arrays can be exchanged.

    What it means: a child process has turned a tensor into an array and back.
    Why it matters: torch built for NumPy 1 imports under NumPy 2 with a warning and fails at the first exchange.
    How to fix: upgrade torch, or stay with numpy<2.
    """
    if torch_import.numpy_error:
        return Result.failed(
            "torch and NumPy do not fit together",
            torch_import.numpy_error,
            fixes=(
                installer.install("upgrade torch", "torch", upgrade=True),
                installer.install("or stay with NumPy 1", "numpy<2"),
            ),
            classes=("E6",),
        )
    return Result.passed("tensors and arrays can be exchanged")


@check("TORCH109", requires=("TORCH105", "PY104"), classes=("A12", "C11"))
def halfbyte_imports(torch_import: TorchImport, installer: Installer) -> Result:
    """halfbyte's ops import, and importing them starts no CUDA context.

    What it means: the ops are defined, and `torch.cuda.is_initialized()` is still False afterwards.
    Why it matters: it would break every later fork: "Cannot re-initialize CUDA in forked subprocess".
    How to fix: install halfbyte again; start workers with `spawn` where your own code uses CUDA before forking.
    """
    if torch_import.halfbyte_error:
        again = installer.install("install halfbyte again", "halfbyte", force=True)
        return Result.failed(
            "halfbyte's ops do not import", torch_import.halfbyte_error, fixes=(again,), classes=("C11",)
        )
    if torch_import.cuda_at_import:
        return Result.failed(
            "importing halfbyte started a CUDA context",
            "a backend package may do this",
            fixes=(Fix("use the built-in backends only", "pip list | grep -i halfbyte"),),
            classes=("A12",),
        )
    return Result.passed("halfbyte's ops import without starting CUDA")


@check("TORCH110", requires=("TORCH106",), classes=("B4", "B5", "G6"))
def bfloat16(torch_import: TorchImport) -> Result:
    """The GPUs compute in bfloat16 themselves.

    What it means: compute capability 8.0 or later.
    Why it matters: on a T4 torch says that bfloat16 is supported, and emulates it slowly; some compilers abort.
    How to fix: use float16 as the compute dtype; halfbyte chooses it by itself when none is named.
    """
    emulated = [each.label for each in torch_import.devices if each.bf16 == "emulated"]
    if not torch_import.devices:
        return Result.skipped("no GPU")
    if emulated:
        return Result.warned(
            "bfloat16 is emulated, and slow",
            *emulated,
            fixes=(Fix("in your code", "BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float16)"),),
            classes=("B5", "G6"),
        )
    return Result.passed("bfloat16 is native")


@check("TORCH111", requires=("TORCH105",), classes=("C7",))
def one_runtime_loaded(torch_import: TorchImport) -> Result:
    """Each CUDA library is loaded once.

    What it means: the process that imported torch has mapped one copy of libcudart, cuBLAS and the like.
    Why it matters: two copies of a runtime hold two states, and pointers of one are strangers to the other.
    How to fix: unset LD_LIBRARY_PATH, or uninstall the package that brings the second copy.
    """
    twice = {name: places for name, places in torch_import.mapped if len(places) > 1}
    if twice:
        lines = [f"{name}: {place}" for name, places in twice.items() for place in places]
        return Result.warned(
            f"loaded twice: {', '.join(twice)}",
            *lines,
            fixes=(Fix("leave the choice to torch", "unset LD_LIBRARY_PATH"),),
            classes=("C7",),
        )
    return Result.passed("each library is loaded once")


@check("TORCH112", requires=("PY102",))
def other_accelerators(host: Host, torch_build: TorchBuild) -> Result:
    """What halfbyte can use on this platform is known.

    What it means: on a Mac torch's MPS device is used through plain torch operations; on Windows and XPU, Triton is
    optional.
    Why it matters: it tells what speed to expect.
    How to fix: nothing to do.
    """
    if host.system == "Darwin":
        return Result.passed("macOS: CPU kernels, and plain torch operations on MPS")
    if torch_build.xpu:
        return Result.passed("XPU build: Triton kernels where Intel's Triton is installed")
    return Result.skipped("not a Mac, no XPU build")
