"""GPU and driver, as the operating system sees them; torch is not asked."""

from __future__ import annotations

from halfbyte.doctor import versions
from halfbyte.doctor.facts.gpu import Gpu
from halfbyte.doctor.facts.loader import Loader
from halfbyte.doctor.host import Host
from halfbyte.doctor.model import Fix, Result
from halfbyte.doctor.registry import check

__all__: list[str] = []

REBOOT = Fix("restart the machine, so that the driver is loaded anew", "sudo reboot")


@check("GPU101", classes=("A6", "F1"))
def driver_loaded(gpu: Gpu, host: Host) -> Result:
    """The GPUs of this machine have a driver.

    What it means: each GPU on the bus is served by a kernel driver that programs can talk to.
    Why it matters: without it nothing can compute on the GPU, whatever is installed in Python.
    How to fix: install the vendor's driver and restart; in a container, see GPU102.
    """
    if not gpu.nvidia and not gpu.amd and not gpu.bus:
        return Result.skipped("no GPU on this machine")
    if gpu.reachable or gpu.amd or gpu.container:
        driver = f"NVIDIA driver {gpu.driver}" if gpu.driver else "driver loaded"
        lines = [f"{each.name}, {each.memory / 1024:.0f} GiB" for each in gpu.smi]
        return Result.passed(
            f"{gpu.names}, {driver}" if not gpu.container or gpu.reachable else "in a container", *lines
        )
    if "NVIDIA" in gpu.bus:
        blocker = ("the kernel module nouveau holds the GPU",) if "nouveau" in gpu.modules else ()
        fix = Fix("install NVIDIA's driver, then restart", _driver_command(host))
        return Result.failed(
            "an NVIDIA GPU is on the bus, but no driver is loaded", *blocker, fixes=(fix,), classes=("A6",)
        )
    if "AMD" in gpu.bus and host.system == "Linux":
        return Result.warned(
            "an AMD GPU is on the bus, but /dev/kfd is missing, so it cannot compute",
            fixes=(Fix("load AMD's compute driver", "sudo modprobe amdgpu"),),
            classes=("F1",),
        )
    return Result.skipped(f"{gpu.names}: no GPU that torch's CUDA or ROCm builds use")


@check("GPU102", classes=("A6",))
def container_has_gpu(gpu: Gpu) -> Result:
    """A container was given its host's GPUs.

    What it means: the device files of the GPUs are visible inside the container.
    Why it matters: a container started without them sees no GPU, and torch falls back to the CPU without a word.
    How to fix: start it again with `--gpus all`, after installing the NVIDIA container toolkit on the host.
    """
    if not gpu.container:
        return Result.skipped("not in a container")
    if not gpu.nvidia or gpu.gpu_nodes or gpu.wsl_library or gpu.jetson:
        return Result.passed(f"{gpu.container} container" + (", with its host's GPU" if gpu.gpu_nodes else ""))
    command = {
        "Kubernetes": "kubectl set resources deployment/NAME --limits=nvidia.com/gpu=1",
        "Podman": "podman run --device nvidia.com/gpu=all IMAGE",
    }.get(gpu.container, "docker run --gpus all IMAGE")
    return Result.warned(
        "the host has an NVIDIA GPU, but this container was started without it",
        "no /dev/nvidia0, /dev/nvidia1, ...",
        fixes=(Fix("start the container with the GPU (the host needs nvidia-container-toolkit)", command),),
        classes=("A6",),
    )


@check("GPU103", requires=("GPU101",), classes=("A7", "F1"), proof="TORCH106")
def device_permissions(gpu: Gpu, host: Host) -> Result:
    """You may open the GPU's device files.

    What it means: /dev/nvidia* (or /dev/kfd) can be read and written by this user.
    Why it matters: else the driver answers "Insufficient Permissions" and torch finds no GPU.
    How to fix: join the group that owns the files, then log in again; in rootless podman keep the groups.
    """
    closed = [node for node in gpu.nodes if node.problem == "EACCES"]
    if gpu.kfd == "EACCES":
        return Result.failed(
            "this user may not open /dev/kfd",
            fixes=(Fix("join the groups, then log in again", "sudo usermod -aG render,video $USER"),),
            classes=("A7", "F1"),
        )
    if closed:
        lines = [f"{node.path}: mode {node.mode:o}, group {node.group}" for node in closed]
        group = closed[0].group if closed[0].group not in {"", "root", "0"} else "video"
        fixes = [Fix("join the group that owns them, then log in again", f"sudo usermod -aG {group} $USER")]
        if gpu.container:
            fixes.insert(0, Fix("keep the user's groups in the container", "podman run --group-add keep-groups ..."))
        return Result.failed(
            "this user may not open the GPU's device files", *lines, fixes=tuple(fixes), classes=("A7",)
        )
    if "Insufficient Permissions" in gpu.smi_error:
        fix = Fix("join the group of /dev/nvidia*, then log in again", "sudo usermod -aG video $USER")
        return Result.failed("the driver refuses this user", gpu.smi_error, fixes=(fix,), classes=("A7",))
    if not gpu.nodes and gpu.kfd:
        return Result.skipped("no device files to open" if host.system == "Linux" else "not needed on this system")
    return Result.passed("the device files can be opened")


@check("GPU104", requires=("GPU103",), classes=("A8",), proof="TORCH106")
def device_answers(gpu: Gpu) -> Result:
    """The GPU's control device answers.

    What it means: opening /dev/nvidiactl works.
    Why it matters: EPERM there means that the container's device rules were lost, as by `systemctl daemon-reload`.
    How to fix: make the container anew; use the cgroupfs driver, or CDI devices, so that it does not come back.
    """
    if "no answer in" in gpu.smi_error:
        return Result.failed("the driver does not answer", gpu.smi_error, fixes=(REBOOT,))
    refused = [node for node in gpu.nodes if node.problem not in {"", "EACCES", "missing"}]
    if refused or "Unknown Error" in gpu.smi_error:
        lines = [f"{node.path}: {node.problem}" for node in refused] + ([gpu.smi_error] if gpu.smi_error else [])
        command = "docker restart CONTAINER" if gpu.container else "sudo systemctl restart nvidia-persistenced"
        return Result.failed(
            "the device files exist, but the kernel refuses to open them",
            *lines,
            fixes=(Fix("start the container anew" if gpu.container else "restart the driver's service", command),),
            classes=("A8",),
        )
    return Result.passed("the control device answers") if gpu.nodes else Result.skipped("no NVIDIA device files")


@check("GPU105", requires=("GPU101",), classes=("A5",), proof="TORCH106")
def driver_versions_agree(gpu: Gpu) -> Result:
    """The loaded driver and its libraries are of one version.

    What it means: the kernel module that is running is the one whose libraries are installed.
    Why it matters: after an unattended update they differ until a restart: "Driver/library version mismatch".
    How to fix: restart the machine.
    """
    if "version mismatch" in gpu.smi_error:
        return Result.failed(
            "the loaded driver and its libraries are of different versions",
            gpu.smi_error,
            fixes=(REBOOT,),
            classes=("A5",),
        )
    if gpu.wsl or not gpu.driver or not gpu.userspace:
        return Result.skipped("one of the two versions is not known")
    if gpu.driver != gpu.userspace:
        return Result.failed(f"kernel module {gpu.driver}, libraries {gpu.userspace}", fixes=(REBOOT,), classes=("A5",))
    return Result.passed(f"kernel module and libraries are {gpu.driver}")


@check("GPU106", requires=("GPU101",), classes=("A4",), proof="TORCH106")
def unified_memory_module(gpu: Gpu) -> Result:
    """The driver's memory module is loaded.

    What it means: /dev/nvidia-uvm exists, which CUDA needs and nvidia-smi does not.
    Why it matters: without it, often after suspend, nvidia-smi looks fine and CUDA says "unknown error".
    How to fix: load the module again, or restart.
    """
    if gpu.wsl or gpu.windows_driver or gpu.jetson or not gpu.gpu_nodes:
        return Result.skipped("not used here")
    if any(node.path == "/dev/nvidia-uvm" for node in gpu.nodes):
        return Result.passed("/dev/nvidia-uvm is there")
    if gpu.container:
        fix = Fix(
            "start the container with all driver parts", "docker run --gpus all -e NVIDIA_DRIVER_CAPABILITIES=all IMAGE"
        )
    else:
        fix = Fix("load the module again", "sudo modprobe -r nvidia_uvm && sudo modprobe nvidia_uvm")
    return Result.failed("/dev/nvidia-uvm is missing", "CUDA will say: unknown error", fixes=(fix,), classes=("A4",))


@check("GPU107", requires=("GPU101",), classes=("A9", "A10"), proof="TORCH106")
def no_compat_library(gpu: Gpu, loader: Loader) -> Result:
    """No compatibility libcuda stands in front of the driver's own.

    What it means: LD_LIBRARY_PATH names no .../compat folder with a libcuda.
    Why it matters: it only works on data centre GPUs with the driver branch it was made for; else Error 803 or 804.
    How to fix: take that folder out of LD_LIBRARY_PATH.
    """
    if not loader.compat:
        return Result.passed("libcuda comes from the driver")
    consumer = any("GeForce" in each.name or "RTX" in each.name for each in gpu.smi)
    classes = ("A10",) if consumer else ("A9",)
    consequence = "this GPU does not support forward compatibility (Error 804)" if consumer else "risk of Error 803"
    rest = "export LD_LIBRARY_PATH=$(echo $LD_LIBRARY_PATH | tr ':' '\\n' | grep -v compat | paste -sd:)"
    result = Result.failed if consumer else Result.warned
    return result(
        "a CUDA compatibility libcuda hides the driver's own",
        f"{loader.compat}: {consequence}",
        fixes=(Fix("take it out of the search path", rest),),
        classes=classes,
    )


@check("GPU108", requires=("GPU101",), classes=("A11",), proof="TORCH106")
def fabric_manager(gpu: Gpu) -> Result:
    """The fabric manager runs where GPUs are joined by NVSwitch.

    What it means: nvidia-fabricmanager has set up the switches of an HGX or DGX machine.
    Why it matters: until it has, CUDA does not start: "Error 802: system not yet initialized".
    How to fix: install and start it, in exactly the driver's version.
    """
    if not gpu.nvswitches:
        return Result.skipped("no NVSwitch here")
    if gpu.fabric_manager is None:
        return Result.skipped("in a container, where the host's services cannot be seen")
    if not gpu.fabric_manager:
        branch = versions.number(gpu.driver)[:1]
        package = f"nvidia-fabricmanager-{branch[0]}" if branch else "nvidia-fabricmanager"
        return Result.failed(
            "GPUs are joined by NVSwitch, but the fabric manager is not running",
            fixes=(
                Fix("start it", "sudo systemctl enable --now nvidia-fabricmanager"),
                Fix("or install it first", f"sudo apt-get install -y {package}"),
            ),
            classes=("A11",),
        )
    return Result.passed("the fabric manager runs")


@check("GPU109", classes=("A13",), proof="TORCH106")
def wsl_library(gpu: Gpu, loader: Loader) -> Result:
    """Under WSL, Windows' driver is found and no Linux driver is installed.

    What it means: libcuda comes from /usr/lib/wsl/lib, which Windows provides.
    Why it matters: a Linux driver inside WSL overwrites it, and Triton cannot link without it.
    How to fix: put that folder on the loader's path; remove any nvidia-driver package inside WSL.
    """
    if not gpu.wsl:
        return Result.skipped("not under WSL")
    if not gpu.wsl_library:
        return Result.warned(
            "Windows gives this WSL no GPU driver",
            "no /usr/lib/wsl/lib/libcuda.so.1",
            fixes=(Fix("update WSL and NVIDIA's Windows driver (in a Windows shell)", "wsl --update"),),
            classes=("A13",),
        )
    if gpu.userspace:
        return Result.failed(
            "a Linux NVIDIA driver is installed inside WSL",
            f"libcuda {gpu.userspace} in a system folder",
            fixes=(
                Fix("remove it; Windows' driver serves WSL", "sudo apt-get purge -y 'nvidia-driver-*' 'libnvidia-*'"),
            ),
            classes=("A13",),
        )
    listed = loader.libcuda_listed or any("/usr/lib/wsl/lib" in each.folder for each in loader.overrides)
    if not listed:
        return Result.warned(
            "the loader does not look into /usr/lib/wsl/lib",
            fixes=(
                Fix("add it to the search path", "export LD_LIBRARY_PATH=/usr/lib/wsl/lib:$LD_LIBRARY_PATH", safe=True),
            ),
            classes=("A13",),
        )
    return Result.passed("Windows' driver is found")


@check("GPU110", classes=("B6", "F3"))
def jetson(gpu: Gpu, host: Host) -> Result:
    """A Jetson has wheels made for Jetson.

    What it means: on NVIDIA's embedded boards, torch comes from NVIDIA's index for JetPack.
    Why it matters: ordinary ARM wheels have no code for its GPU: "named symbol not found".
    How to fix: install torch from the Jetson AI Lab index that matches JetPack.
    """
    if not gpu.jetson or host.machine.lower() not in {"aarch64", "arm64"}:
        return Result.skipped("not a Jetson")
    return Result.warned(
        "this is a Jetson: only wheels made for JetPack run on its GPU",
        gpu.jetson,
        fixes=(Fix("see which index matches this JetPack", "visit https://pypi.jetson-ai-lab.io"),),
        classes=("B6", "F3"),
    )


def _driver_command(host: Host) -> str:
    text = host.read("/etc/os-release").lower()
    if "ubuntu" in text:
        return "sudo ubuntu-drivers install && sudo reboot"
    if "debian" in text:
        return "sudo apt-get install -y nvidia-driver && sudo reboot"
    return "visit https://www.nvidia.com/drivers"
