"""PyTorch as its files describe it: was it built for this GPU, driver and architecture; torch is not imported."""

from __future__ import annotations

from halfbyte.doctor import versions
from halfbyte.doctor.checks.remedies import ROCM_INDEX, fitting_torch
from halfbyte.doctor.facts.gpu import Gpu
from halfbyte.doctor.facts.installer import Installer
from halfbyte.doctor.facts.torch_build import TorchBuild
from halfbyte.doctor.host import Host
from halfbyte.doctor.model import Fix, Result
from halfbyte.doctor.registry import check

__all__ = ["numbers", "wrong_architecture"]


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
            return wrong_architecture(each.name, each.capability, numbers(built), (gpu, torch_build, installer, host))
    return Result.passed(f"torch has code for {gpu.names}")


def numbers(built: tuple[tuple[int, int], ...]) -> str:
    """Architectures in words: ``"8.0, 9.0"``."""
    return ", ".join(f"{major}.{minor}" for major, minor in built)


def wrong_architecture(
    name: str, capability: tuple[int, int], built: str, parts: tuple[Gpu, TorchBuild, Installer, Host]
) -> Result:
    """The failure of a GPU that a build has no code for.

    Args:
        name: The GPU.
        capability: Its compute capability.
        built: Of :func:`numbers`.
        parts: What the fix is chosen by.
    """
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
