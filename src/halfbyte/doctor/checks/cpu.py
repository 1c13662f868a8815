"""The CPU: what halfbyte's CPU kernels need to be fast."""

from __future__ import annotations

from halfbyte.doctor.checks.remedies import writable_cache
from halfbyte.doctor.facts.cpu import Cpu
from halfbyte.doctor.facts.installer import Installer
from halfbyte.doctor.facts.proofs import Proofs
from halfbyte.doctor.facts.toolchain import Toolchain
from halfbyte.doctor.host import Host
from halfbyte.doctor.model import Fix, Result
from halfbyte.doctor.registry import check

__all__: list[str] = []


@check("CPU101")
def vector_units(cpu: Cpu, host: Host) -> Result:
    """The CPU has vector units that the fast kernels use.

    What it means: AVX2 or later on x86, NEON on ARM.
    Why it matters: without them the portable kernels run, several times slower.
    How to fix: in a virtual machine, pass the host's CPU through (`-cpu host`).
    """
    wide = set(cpu.features) & {"avx2", "avx512f", "asimd", "sve"}
    arm = host.machine.lower() in {"aarch64", "arm64"}
    if wide or arm or not cpu.name:
        found = ", ".join(cpu.features) or "features not listed"
        return Result.passed(cpu.name or f"{host.machine} CPU", found)
    return Result.warned(
        "the CPU has no AVX2: the portable kernels are used, which are slower",
        cpu.name,
        fixes=(Fix("in a virtual machine, pass the host's CPU through", "qemu-system-x86_64 -cpu host ..."),),
    )


@check("CPU102", requires=("PY104",), classes=("D15",))
def numba_installed(cpu: Cpu, installer: Installer) -> Result:
    """numba is installed and accepts this NumPy.

    What it means: halfbyte's CPU kernels can be compiled.
    Why it matters: without numba, 4-bit layers on the CPU run in plain torch operations: right, but slow.
    How to fix: install numba; it follows new Pythons and NumPys some months later.
    """
    if not cpu.numba:
        return Result.warned(
            "numba is not installed: 4-bit layers on the CPU will be slow",
            fixes=(installer.install("install numba", "numba>=0.61"),),
            classes=("D15",),
            blocking=True,
        )
    from packaging.requirements import Requirement  # PY104 holds here, and not yet when this module is imported

    wanted = cpu.numba_requires_numpy
    if wanted and cpu.numpy and not Requirement(wanted).specifier.contains(cpu.numpy, prereleases=True):
        return Result.warned(
            f"numba {cpu.numba} does not accept numpy {cpu.numpy}",
            f"it asks for {wanted}",
            fixes=(
                installer.install("upgrade numba", "numba", upgrade=True),
                installer.install("or take that NumPy", wanted),
            ),
            classes=("D15",),
        )
    return Result.passed(f"numba {cpu.numba}")


@check("CPU103", requires=("CPU102",), classes=("D14",))
def numba_cache(toolchain: Toolchain, host: Host) -> Result:
    """Compiled CPU kernels can be kept.

    What it means: the cache folder exists or can be made.
    Why it matters: else each process compiles anew, or numba says "no locator available".
    How to fix: set NUMBA_CACHE_DIR to a folder that can be written.
    """
    folder = toolchain.numba_cache
    if folder.problem:
        return Result.warned(
            "the cache for CPU kernels cannot be written",
            f"{folder.path}: {folder.problem}",
            fixes=(writable_cache(host, "NUMBA_CACHE_DIR", "numba"),),
            classes=("D14",),
        )
    return Result.passed(f"CPU kernels are kept in {folder.path}")


@check("CPU104")
def cores(cpu: Cpu, host: Host) -> Result:
    """The process may use the cores that it sees.

    What it means: the container's CPU quota and OMP_NUM_THREADS fit the number of cores.
    Why it matters: many threads on a small quota stop each other; one thread leaves cores idle.
    How to fix: set OMP_NUM_THREADS to the number of cores that you may use.
    """
    threads = host.environ.get("OMP_NUM_THREADS", "")
    if cpu.quota and cpu.quota + 1 < cpu.usable and not threads:
        count = max(1, int(cpu.quota))
        return Result.warned(
            f"the container may use {cpu.quota:g} cores and sees {cpu.usable}",
            fixes=(Fix("start as many threads as there are cores", f"export OMP_NUM_THREADS={count}", safe=True),),
        )
    note = f"{cpu.usable} of {cpu.cores} cores" + (f", OMP_NUM_THREADS={threads}" if threads else "")
    return Result.passed(note)


@check("CPU105", steps=("numba_kernel",), requires=("CPU102", "TORCH105"), classes=("D14", "D15", "E6"))
def numba_compiles(proofs: Proofs, installer: Installer) -> Result:
    """numba compiles and its result is right.

    What it means: a child process has compiled a function and compared what it returns.
    Why it matters: it is the proof that CPU kernels can run here.
    How to fix: install numba again; the error below tells more.
    """
    step = next((proof.steps.get("numba_kernel") for proof in proofs.chosen if proof.device.name == "cpu"), None)
    if step is None or step.state in {"skip", "blocked"}:
        return Result.skipped(step.text if step else "nothing was computed on the CPU")
    if step.ok:
        return Result.passed("numba compiles", measurements=step.measurements)
    again = installer.install("install numba again", "numba>=0.61", force=True)
    return Result.warned(
        "numba does not work, so the CPU kernels stay slow", step.text, fixes=(again,), classes=("D15",)
    )
