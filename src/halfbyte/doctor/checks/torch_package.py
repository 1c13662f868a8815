"""PyTorch: does it import, was it built for this driver and GPU, does it see every device."""

from __future__ import annotations

import re

from halfbyte.doctor import versions
from halfbyte.doctor.checks.remedies import ROCM_INDEX, blame, fitting_torch, without
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


@check("TORCH101", requires=("PY102",), classes=("A1", "C13", "F1"))
def built_for_gpu(gpu: Gpu, torch_build: TorchBuild, installer: Installer, host: Host) -> Result:
    """torch was built for the GPU that is here.

    What it means: with an NVIDIA GPU and driver, torch is a CUDA build; with an AMD GPU, a ROCm build.
    Why it matters: the CPU build is the default on Windows and comes along with some packages; the GPU then stays idle.
    How to fix: install torch from the index for the driver's CUDA version, over the one that is there.
    """
    if not gpu.reachable and not gpu.amd:
        return Result.passed("no GPU to be built for") if not gpu.nvidia else Result.skipped("the GPU has no driver")
    if not torch_build.version and not torch_build.accelerated:
        return Result.skipped("torch does not say what it was built for")
    if gpu.reachable and not torch_build.cuda:
        return Result.failed(
            f"torch {torch_build.version} is {_article(torch_build.kind)} build, so {gpu.names} stays idle",
            *_driver_line(gpu),
            fixes=fitting_torch(installer, host, gpu),
            classes=("A1",) if torch_build.installer != "conda" else ("C13",),
        )
    if gpu.amd and not gpu.reachable and not torch_build.hip:
        fix = installer.install("install torch for ROCm", "torch", index_url=ROCM_INDEX, force=True)
        return Result.failed(
            f"torch {torch_build.version} is {_article(torch_build.kind)} build, so the AMD GPU stays idle",
            fixes=(fix,),
            classes=("F1",),
        )
    return Result.passed(f"torch {torch_build.version} is built for {torch_build.kind}")


def _article(kind: str) -> str:
    return f"a {kind.replace('CPU only', 'CPU-only')}"


def _driver_line(gpu: Gpu) -> list[str]:
    if not gpu.driver:
        return []
    newest = versions.cuda_for_driver(gpu.driver)
    return [f"NVIDIA driver {gpu.driver}" + (f" (CUDA {newest})" if newest else "")]


@check("TORCH102", requires=("PY102", "TORCH101"), classes=("A2", "B7"), proof="TORCH106")
def driver_new_enough(gpu: Gpu, torch_build: TorchBuild, installer: Installer, host: Host) -> Result:
    """The driver is new enough for torch's CUDA version.

    What it means: CUDA 12.x needs driver 525 or later, CUDA 13.x needs 580 or later.
    Why it matters: else torch finds no GPU. The number in its message is a CUDA version: 12040 is 12.4.
    How to fix: upgrade the driver, or install a torch for an older CUDA version; the report prints both.
    """
    if not torch_build.cuda or not gpu.driver:
        return Result.passed("no NVIDIA driver and CUDA build to compare")
    fits = versions.driver_runs(gpu.driver, torch_build.cuda)
    needed = versions.driver_needed(torch_build.cuda)
    if fits is None:
        return Result.passed(f"CUDA {torch_build.cuda} is not in the table of {versions.table_date()}")
    if not fits:
        upgrade = Fix(
            f"or upgrade the driver to {needed} or later, then restart", "visit https://www.nvidia.com/drivers"
        )
        return Result.failed(
            f"driver {gpu.driver} is too old for torch {torch_build.version}: CUDA {torch_build.cuda} needs {needed}",
            *_driver_line(gpu),
            fixes=(*fitting_torch(installer, host, gpu), upgrade),
            classes=("A2",),
        )
    return Result.passed(f"driver {gpu.driver} runs CUDA {torch_build.cuda} (needs {needed})")


@check("TORCH103", requires=("TORCH101",), classes=("B1", "B2"), proof="NUM102")
def architecture_in_build(gpu: Gpu, torch_build: TorchBuild, installer: Installer, host: Host) -> Result:
    """torch's build has code for every GPU.

    What it means: each GPU's compute capability is among the architectures that this wheel was compiled for.
    Why it matters: `torch.cuda.is_available()` says True all the same, and the first operation ends in
    "no kernel image is available for execution on the device".
    How to fix: a GPU that is too new wants a wheel of a later CUDA version, one that is too old an earlier one.
    """
    known = [each for each in gpu.smi if each.capability != (0, 0)]
    built = versions.arches(torch_build.version, torch_build.cuda, host.machine) if torch_build.cuda else ()
    if not known or not built:
        return Result.skipped("the build's architectures or the GPU's are not known without starting torch")
    for each in known:
        if not versions.runs_on(built, each.capability):
            return _wrong_architecture(each.name, each.capability, _numbers(built), (gpu, torch_build, installer, host))
    return Result.passed(f"torch has code for {gpu.names}")


def _numbers(built: tuple[tuple[int, int], ...]) -> str:
    return ", ".join(f"{major}.{minor}" for major, minor in built)


def _wrong_architecture(
    name: str, capability: tuple[int, int], built: str, parts: tuple[Gpu, TorchBuild, Installer, Host]
) -> Result:
    gpu, torch_build, installer, host = parts
    oldest = min(tuple(map(int, number.split("."))) for number in built.split(", "))
    too_old = capability < oldest
    word = f"{capability[0]}.{capability[1]}"
    last = versions.last_torch_for(capability)
    note = (f"torch {last} is the last with code for it",) if last else ()
    return Result.failed(
        f"torch {torch_build.version} (CUDA {torch_build.cuda}) has no code for {name}: capability {word} is too "
        + ("old" if too_old else "new"),
        f"built for {built}",
        *note,
        fixes=fitting_torch(installer, host, gpu, capability=capability),
        classes=("B2",) if too_old else ("B1",),
    )


@check("TORCH104", requires=("PY102",), classes=("C5",))
def runtime_packages(torch_build: TorchBuild, installer: Installer) -> Result:
    """The CUDA libraries that torch requires are installed.

    What it means: each nvidia-... package that torch's metadata names is there, in that version.
    Why it matters: another package may have replaced one; then a symbol or a file is missing at import.
    How to fix: install the named version again.
    """
    if torch_build.missing:
        wanted = [line.split(" (")[0] for line in torch_build.missing]
        return Result.warned(
            f"CUDA libraries of torch missing, or of another version: {len(wanted)}",
            *torch_build.missing,
            fixes=tuple(installer.install(f"install {name.split('==')[0]}", name) for name in wanted[:3]),
            classes=("C5",),
        )
    return Result.passed("torch's CUDA libraries are there" if torch_build.cuda else "torch requires none")


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
            return _wrong_architecture(device.label, device.capability, _numbers(built), parts)
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
