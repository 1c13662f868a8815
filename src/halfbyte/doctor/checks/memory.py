"""Memory and disk: room for a model, its download and its workers."""

from __future__ import annotations

from halfbyte.doctor.facts.gpu import Gpu
from halfbyte.doctor.facts.memory import Memory
from halfbyte.doctor.host import Host
from halfbyte.doctor.model import Fix, Result
from halfbyte.doctor.registry import check

__all__: list[str] = []

GIB = 2**30


@check("MEM101", classes=("E7",))
def main_memory(memory: Memory) -> Result:
    """There is main memory for a small model.

    What it means: at least 2 GiB are available to this process, the container's limit included.
    Why it matters: loading passes every shard through main memory, also for the GPU; else the system ends the process.
    How to fix: close other programs, or give the container more.
    """
    if not memory.total:
        return Result.skipped("not known on this system")
    note = f"{memory.usable / GIB:.1f} GiB of {(memory.limit or memory.total) / GIB:.1f} GiB available"
    if memory.usable < 2 * GIB:
        return Result.warned(
            f"only {note}", fixes=(Fix("see who uses it", "ps aux --sort=-rss | head"),), classes=("E7",)
        )
    return Result.passed(note)


@check("MEM102")
def disk_for_models(memory: Memory, host: Host) -> Result:
    """Downloaded models have a folder with room.

    What it means: the Hugging Face cache can be written and has at least 5 GiB free.
    Why it matters: a download that fills the disk fails at its end.
    How to fix: set HF_HOME to a folder on a larger disk.
    """
    folder = memory.models
    if not folder.path:
        return Result.skipped("not known on this system")
    fix = Fix("move it to a larger disk", f"export HF_HOME={'D:' if host.windows else '/path/on/a/larger/disk'}")
    if folder.problem:
        return Result.warned("downloaded models cannot be kept", f"{folder.path}: {folder.problem}", fixes=(fix,))
    if folder.free < 5 * GIB:
        return Result.warned(f"only {folder.free / GIB:.1f} GiB free for downloaded models", folder.path, fixes=(fix,))
    return Result.passed(f"{folder.free / GIB:.0f} GiB free for downloaded models")


@check("MEM103")
def temporary_files(memory: Memory) -> Result:
    """Temporary files can be written.

    What it means: the folder for temporary files can be written.
    Why it matters: compilers and downloads need it.
    How to fix: set TMPDIR to a folder that can be written.
    """
    folder = memory.temporary
    if folder.problem:
        return Result.warned(
            "temporary files cannot be written",
            f"{folder.path}: {folder.problem}",
            fixes=(Fix("use another folder", "mkdir -p ~/tmp && export TMPDIR=~/tmp", safe=True),),
        )
    return Result.passed("temporary files can be written")


@check("MEM104")
def shared_memory(memory: Memory, gpu: Gpu) -> Result:
    """A container has shared memory for data loader workers.

    What it means: /dev/shm is larger than Docker's default of 64 MiB.
    Why it matters: workers pass batches through it: "bus error", or "insufficient shared memory (shm)".
    How to fix: start the container with `--shm-size=8g` or `--ipc=host`.
    """
    if not gpu.container or not memory.shared:
        return Result.skipped("not in a container")
    if memory.shared < GIB // 8:
        return Result.warned(
            f"/dev/shm has {memory.shared // 2**20} MiB",
            fixes=(Fix("start the container with more", "docker run --shm-size=8g ..."),),
        )
    return Result.passed(f"/dev/shm has {memory.shared / GIB:.1f} GiB")


@check("MEM105", requires=("GPU101",), classes=("E7", "G3"))
def gpu_memory_free(gpu: Gpu) -> Result:
    """The GPUs' memory is free.

    What it means: other processes hold less than half of it.
    Why it matters: `device_map="auto"` then moves layers to the CPU, which is many times slower.
    How to fix: end the processes that nvidia-smi lists.
    """
    if not gpu.smi:
        return Result.skipped("nvidia-smi lists no GPU")
    full = [each for each in gpu.smi if each.memory and each.used > each.memory / 2]
    lines = [f"{each.name}: {each.used / 1024:.1f} of {each.memory / 1024:.1f} GiB in use" for each in gpu.smi]
    if full:
        return Result.warned(
            "other processes hold most of a GPU's memory",
            *lines,
            fixes=(Fix("see which", "nvidia-smi"),),
            classes=("E7", "G3"),
        )
    return Result.passed("the GPUs' memory is free", *lines)
