"""Triton's tool chain: what it needs to compile a kernel on first use. Only asked for where there is a GPU for it."""

from __future__ import annotations

from halfbyte.doctor import versions
from halfbyte.doctor.checks.remedies import blame, class_of, without, writable_cache
from halfbyte.doctor.facts.gpu import Gpu
from halfbyte.doctor.facts.installer import Installer
from halfbyte.doctor.facts.loader import Loader
from halfbyte.doctor.facts.proofs import Proofs
from halfbyte.doctor.facts.toolchain import Ptxas, Toolchain
from halfbyte.doctor.facts.torch_build import TorchBuild
from halfbyte.doctor.facts.torch_import import TorchImport
from halfbyte.doctor.host import Host
from halfbyte.doctor.model import Fix, Result
from halfbyte.doctor.registry import check

__all__: list[str] = []

OLDEST_CAPABILITY = (7, 0)
PTXAS_NEEDS = {
    (8, 9): "11.8",
    (9, 0): "11.8",
    (10, 0): "12.8",
    (12, 0): "12.8",
    (10, 3): "12.9",
    (12, 1): "12.9",
    (11, 0): "13.0",
}
"""First CUDA release whose ptxas knows a compute capability. Source: release notes of CUDA 11.8, 12.8, 12.9, 13.0."""
SECOND_PTXAS_FROM = (9, 0)
"""Triton 3.9 assembles for these with ``ptxas-blackwell``; see ``get_ptxas`` in its ``backends/nvidia/compiler.py``."""


@check("TRITON101", classes=("D9",))
def triton_installed(
    gpu: Gpu, toolchain: Toolchain, torch_build: TorchBuild, host: Host, installer: Installer
) -> Result:
    """Triton is installed where there is a GPU for it.

    What it means: halfbyte's GPU kernels can be compiled.
    Why it matters: without Triton, 4-bit layers on the GPU run in plain torch operations: right, but slow.
    How to fix: install the Triton that torch asks for; on Windows the package is called triton-windows.
    """
    if not gpu.reachable and not gpu.amd:
        return Result.skipped("no GPU to compile for")
    if torch_build.file and not torch_build.accelerated:
        return Result.skipped("torch is a CPU-only build")
    if toolchain.triton:
        return Result.passed(f"triton {toolchain.triton}")
    line = torch_build.triton or versions.triton_for(torch_build.version) or ""
    if host.windows:
        major, _, minor = (line or "3.7").partition(".")
        requirement = f"triton-windows<{major}.{int(minor.split('.')[0] or 0) + 1}"
    else:
        requirement = f"triton=={line}" + (".*" if line.count(".") == 1 else "") if line else "triton"
    return Result.warned(
        "triton is not installed: 4-bit layers on the GPU will be slow",
        fixes=(installer.install("install triton", requirement, upgrade=True),),
        classes=("D9",),
        blocking=True,
    )


@check("TRITON102", requires=("TRITON101",), classes=("D11",))
def triton_fits_torch(toolchain: Toolchain, torch_build: TorchBuild, installer: Installer) -> Result:
    """Triton is the version that torch asks for.

    What it means: the installed triton equals the one that torch's metadata pins.
    Why it matters: the two are developed together; another pair fails with errors from deep inside the compiler.
    How to fix: install the pinned version.
    """
    wanted = torch_build.triton
    if not wanted:
        return Result.skipped("torch names no version of triton")
    if toolchain.triton.split("+")[0] != wanted.split("+")[0]:
        fix = installer.install("install the one that torch asks for", f"triton=={wanted}", force=True)
        return Result.warned(
            f"triton {toolchain.triton} is installed, torch asks for {wanted}", fixes=(fix,), classes=("D11",)
        )
    return Result.passed(f"triton {toolchain.triton} is what torch asks for")


@check("TRITON103", requires=("TRITON101",), classes=("D1",), proof="TRITON111")
def c_compiler(toolchain: Toolchain, installer: Installer, host: Host) -> Result:
    """A C compiler is there for Triton.

    What it means: gcc or clang is on PATH, or CC names one that exists.
    Why it matters: Triton compiles a small C file on first use: "Failed to find C compiler".
    How to fix: install a compiler; without root rights, conda-forge has one.
    """
    if toolchain.own_build:
        return Result.passed("triton-windows brings a compiler")
    if toolchain.compiler:
        return Result.passed(f"C compiler {toolchain.compiler}")
    conda = Fix("or, without root rights, in a conda environment", "conda install -c conda-forge gcc_linux-64")
    if toolchain.compiler_from == "CC":
        return Result.failed(
            "CC names a compiler that is not there",
            f"CC={host.environ.get('CC', '')}",
            fixes=(Fix("let Triton look for gcc", "unset CC"),),
            classes=("D1",),
        )
    return Result.failed(
        "no C compiler on PATH, so Triton cannot start",
        fixes=(*installer.system("compiler", "install a compiler"), conda),
        classes=("D1",),
    )


@check("TRITON104", requires=("TRITON101",), classes=("D2",), proof="TRITON111")
def python_headers(toolchain: Toolchain, installer: Installer, host: Host) -> Result:
    """Python's C headers are there for Triton.

    What it means: Python.h lies where this interpreter says.
    Why it matters: Triton compiles a small C file against it: "fatal error: Python.h: No such file or directory".
    How to fix: install the headers of this Python version; Pythons from uv and conda have them.
    """
    if toolchain.header:
        return Result.passed("Python.h is there")
    other = Fix("or use a Python that has them", f"uv venv --python {host.python[0]}.{host.python[1]} --managed-python")
    return Result.failed(
        "Python.h is missing, so Triton cannot start",
        f"looked in {host.include}",
        fixes=(*installer.system("headers", "install Python's headers"), other),
        classes=("D2",),
    )


@check("TRITON105", requires=("TRITON101",), classes=("D3",), proof="TRITON111")
def ptxas_knows_gpu(toolchain: Toolchain, gpu: Gpu, installer: Installer) -> Result:
    """Triton's assembler knows the GPU.

    What it means: the ptxas that Triton will use runs, and is from a CUDA release that knows the compute capability.
    Why it matters: else compiling ends in "Value 'sm_...' is not defined for option 'gpu-name'".
    How to fix: point TRITON_PTXAS_PATH (TRITON_PTXAS_BLACKWELL_PATH from capability 9.0 on) to a newer one, or upgrade.
    """
    known = [each for each in gpu.smi if each.capability != (0, 0)]
    if not known or not toolchain.ptxas.path:
        return Result.skipped("no NVIDIA GPU whose capability is known")
    newest = max(known, key=lambda each: each.capability)
    second = newest.capability >= SECOND_PTXAS_FROM and toolchain.ptxas_new.path != ""
    used = toolchain.ptxas_new if second else toolchain.ptxas
    variable = "TRITON_PTXAS_BLACKWELL_PATH" if second else "TRITON_PTXAS_PATH"
    needed = next(
        (PTXAS_NEEDS[each] for each in sorted(PTXAS_NEEDS, reverse=True) if newest.capability >= each), "11.0"
    )
    return _judge_ptxas(used, variable, needed, newest.name, installer)


def _judge_ptxas(used: Ptxas, variable: str, needed: str, gpu_name: str, installer: Installer) -> Result:
    if not used.version:
        fix = (
            Fix("use the one that Triton brings", f"unset {used.named_by}")
            if used.named_by
            else (installer.install("install triton again", "triton", force=True))
        )
        return Result.failed("Triton's assembler does not run", used.path, fixes=(fix,), classes=("D3",))
    if versions.number(used.version) < versions.number(needed):
        fixes = (
            Fix("use the one of an installed CUDA toolkit", f"export {variable}=/usr/local/cuda/bin/ptxas", safe=True),
            installer.install("or upgrade triton with torch", "torch", upgrade=True),
        )
        return Result.failed(
            f"ptxas of CUDA {used.version} does not know {gpu_name} (needs {needed})",
            used.path,
            fixes=fixes,
            classes=("D3",),
        )
    return Result.passed(f"ptxas of CUDA {used.version} knows {gpu_name}")


@check("TRITON106", requires=("TRITON101",), classes=("D4", "D5"), proof="TRITON111")
def libcuda_found(loader: Loader, gpu: Gpu, host: Host) -> Result:
    """Triton finds libcuda.

    What it means: `/sbin/ldconfig -p` lists libcuda.so.1, or TRITON_LIBCUDA_PATH names its folder.
    Why it matters: Triton links against it and looks nowhere else: "libcuda.so cannot found!".
    How to fix: set TRITON_LIBCUDA_PATH to the folder, or refresh the loader's cache.
    """
    if host.system != "Linux" or gpu.amd or not gpu.reachable:
        return Result.skipped("not needed here")
    named = host.environ.get("TRITON_LIBCUDA_PATH")
    if named or loader.libcuda_listed or any("libcuda.so.1" in each.libraries for each in loader.overrides):
        return Result.passed(f"libcuda in {named or loader.libcuda or 'LD_LIBRARY_PATH'}")
    folder = loader.libcuda.rsplit("/", 1)[0] if loader.libcuda else ("/usr/lib/wsl/lib" if gpu.wsl_library else "")
    point = Fix("name its folder", f"export TRITON_LIBCUDA_PATH={folder}", safe=True)
    if not loader.ldconfig:
        return Result.failed(
            "/sbin/ldconfig is missing, and Triton asks it for libcuda",
            fixes=(point if folder else Fix("name its folder", "export TRITON_LIBCUDA_PATH=/path/to/folder"),),
            classes=("D5",),
        )
    refresh = Fix("refresh the loader's cache", f"sudo ldconfig {folder}".strip())
    return Result.failed(
        "the loader's cache does not list libcuda.so.1",
        *((f"it lies in {folder}",) if folder else ("it was not found in the usual folders either",)),
        fixes=(point, refresh) if folder else (refresh,),
        classes=("D4",),
    )


@check("TRITON107", requires=("TRITON101",), classes=("D7",), proof="TRITON111")
def triton_cache(toolchain: Toolchain, host: Host) -> Result:
    """Triton can write its cache.

    What it means: the folder for compiled kernels exists or can be made, and has room.
    Why it matters: else the first kernel fails with PermissionError or FileNotFoundError.
    How to fix: set TRITON_CACHE_DIR to a folder that can be written.
    """
    folder = toolchain.triton_cache
    if folder.problem:
        return Result.failed(
            "Triton cannot write its cache",
            f"{folder.path}: {folder.problem}",
            fixes=(writable_cache(host, "TRITON_CACHE_DIR", "triton"),),
            classes=("D7",),
        )
    if 0 < folder.free < 100 * 2**20:
        return Result.warned(
            f"only {folder.free // 2**20} MiB are free for Triton's cache",
            folder.path,
            fixes=(writable_cache(host, "TRITON_CACHE_DIR", "triton"),),
            classes=("D7",),
        )
    return Result.passed(f"Triton's cache is {folder.path}")


@check("TRITON108", requires=("TRITON107",), classes=("D8",), proof="TRITON111")
def cache_may_execute(toolchain: Toolchain, host: Host) -> Result:
    """Libraries in Triton's cache may be loaded.

    What it means: the cache is not on a file system mounted noexec.
    Why it matters: Triton loads what it has compiled from there: "failed to map segment from shared object".
    How to fix: set TRITON_CACHE_DIR to a folder on another file system.
    """
    if toolchain.triton_cache.noexec:
        return Result.failed(
            "Triton's cache is on a file system mounted noexec",
            toolchain.triton_cache.path,
            fixes=(Fix("move it", f"export TRITON_CACHE_DIR={host.home}/.triton/cache", safe=True),),
            classes=("D8",),
        )
    return Result.passed("libraries can be loaded from the cache")


@check("TRITON109", requires=("TRITON101",), classes=("D12",), proof="TRITON111")
def triton_sources(toolchain: Toolchain, installer: Installer) -> Result:
    """Triton's Python sources are there.

    What it means: kernels lie as .py files, not only compiled or inside an archive.
    Why it matters: Triton reads their source: "@jit functions should be defined in a Python file".
    How to fix: install unpacked; with PyInstaller, collect the sources of triton and halfbyte.
    """
    if toolchain.triton_source:
        return Result.passed("sources are there")
    return Result.failed(
        "Triton's .py files are missing",
        fixes=(
            installer.install("install triton again", "triton", force=True),
            Fix("or, with PyInstaller", "pyinstaller --collect-all triton --collect-all halfbyte"),
        ),
        classes=("D12",),
    )


@check("TRITON110", requires=("TRITON101",), classes=("B3",))
def capability_for_triton(gpu: Gpu, torch_import: TorchImport) -> Result:
    """The GPUs are new enough for Triton.

    What it means: compute capability 7.0 or later.
    Why it matters: Triton refuses older ones; halfbyte then computes in plain torch operations.
    How to fix: nothing needs fixing; a T4 or later is faster.
    """
    found = [(each.label, each.capability) for each in torch_import.devices if each.name.startswith("cuda")]
    found = found or [(each.name, each.capability) for each in gpu.smi]
    known = [(name, capability) for name, capability in found if capability != (0, 0)]
    if not known or gpu.amd:
        return Result.skipped("no NVIDIA GPU whose capability is known")
    old = [f"{name}: {capability[0]}.{capability[1]}" for name, capability in known if capability < OLDEST_CAPABILITY]
    if old:
        return Result.warned(
            "too old for Triton: plain torch operations are used, which are slower",
            *old,
            fixes=(
                Fix(
                    "compute in float16 there",
                    "BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float16)",
                ),
            ),
            classes=("B3",),
        )
    return Result.passed("the GPUs are new enough for Triton")


@check(
    "TRITON111",
    steps=("triton_kernel",),
    requires=("TRITON101", "TORCH106"),
    classes=("B1", "B4", "D1", "D2", "D3", "D4", "D5", "D6", "D7", "D8", "D11", "D12"),
)
def kernel_runs(proofs: Proofs) -> Result:
    """A Triton kernel compiles and runs on every GPU.

    What it means: a child process has compiled a kernel that adds two vectors, launched it and compared each sum.
    Why it matters: it is the proof that the tool chain as a whole works.
    How to fix: the error below names the part; the checks above have the command for it.
    """
    steps = [(proof, proof.steps["triton_kernel"]) for proof in proofs.chosen if "triton_kernel" in proof.steps]
    steps = [(proof, step) for proof, step in steps if step.state != "skip"]
    if not steps:
        return Result.skipped("no device that Triton compiles for")
    failed = [(proof, step) for proof, step in steps if not step.ok]
    measured = tuple(each for _, step in steps for each in step.measurements)
    if not failed:
        return Result.passed(
            f"compiled and ran on {', '.join(proof.label for proof, _ in steps)}", measurements=measured
        )
    proof, step = failed[0]
    if step.state == "blocked":
        return Result.skipped(f"not reached on {proof.label}: {step.text}")
    classes = class_of(step.text)
    culprit = step.culprit
    fixes = (
        (without(culprit),)
        if culprit
        else (Fix("see what is behind this", f"halfbyte explain {(classes or ('D1',))[0]}"),)
    )
    lines = [f"{each.label}: {_last_line(found.text)}" for each, found in failed]
    found = Result.failed(
        "a Triton kernel does not run", *lines, *([blame(culprit)] if culprit else []), fixes=fixes, classes=classes
    )
    return Result(found.status, found.summary, found.evidence, found.fixes, measured, found.classes)


def _last_line(text: str) -> str:
    return next((line for line in reversed(text.splitlines()) if line.strip()), text)
