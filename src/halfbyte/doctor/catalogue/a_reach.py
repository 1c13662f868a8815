"""Group A: no GPU is reachable, through driver, device files, masks, containers or the torch build."""

from __future__ import annotations

import re

from halfbyte.doctor import versions
from halfbyte.doctor.catalogue.builds import torch_for_cuda, torch_for_driver
from halfbyte.doctor.catalogue.entry import FailureClass, Reading, Remedy
from halfbyte.doctor.catalogue.links import links

__all__ = ["CLASSES"]

_DRIVER = Remedy("or upgrade the NVIDIA driver to branch 580 or newer and reboot", "nvidia-smi   # shows the branch")
_UNSET_MASK = Remedy("let every GPU be seen again", "unset CUDA_VISIBLE_DEVICES", safe=True)
_REBOOT = Remedy("restart the machine, so that kernel module and library are of one version", "sudo reboot")
_RUN_WITH_GPUS = Remedy("start the container with its GPUs", "docker run --gpus all IMAGE")
_TOOLKIT = Remedy(
    "where that is refused, install the NVIDIA container toolkit on the host",
    "sudo apt-get install -y nvidia-container-toolkit\n"
    "sudo nvidia-ctk runtime configure --runtime=docker && sudo systemctl restart docker",
)
_DROP_COMPAT = Remedy(
    "take the compatibility folder out of the loader's path",
    'export LD_LIBRARY_PATH="$(printf %s "$LD_LIBRARY_PATH" | tr : \'\\n\' | grep -v /compat | paste -sd:)"',
    safe=True,
)


def _driver_cuda(found: re.Match[str]) -> Reading | None:
    value = found.groupdict().get("number")
    if not value:
        return None
    cuda = versions.cuda_from_number(int(value))
    return Reading(
        f"{value} is not the driver's own version: it says that the driver supports CUDA up to {cuda}",
        torch_for_cuda(cuda),
    )


CLASSES = (
    FailureClass(
        "A1",
        "CPU-only torch on a machine with a GPU",
        "The installed torch is the build without CUDA: it is the default on Windows, and another package can pull it "
        "in. On a machine without an NVIDIA GPU nothing is wrong: run on the CPU.",
        (
            *torch_for_driver("580", "driver 580 or newer"),
            *torch_for_driver("525", "driver 525 to 579"),
            Remedy("see which of the two fits this driver", "python -m halfbyte"),
        ),
        texts=(
            r"Torch not compiled with CUDA enabled",
            r"No CUDA, ROCm, or XPU detected; CPU library loaded",
            r"libbitsandbytes_cudaNone\.",
            r"torch\.__version__[^\n]{0,12}\n?[^\n]{0,12}\+cpu",
        ),
        follows=("A2", "A4", "A5", "A6", "A13"),
        sources=links("bnb#1254 bnb#287 textgen#1969"),
    ),
    FailureClass(
        "A2",
        "Driver too old for the CUDA version of this torch",
        "torch was built for a newer CUDA than the driver supports. CUDA 13 needs driver 580 or newer, CUDA 12 needs "
        "525; the number in the message is the CUDA version that the driver supports, not the driver's own.",
        (*torch_for_driver("525", "driver 525 to 579"), _DRIVER),
        texts=(
            r"NVIDIA driver on your system is too old(?: \(found version (?P<number>\d{4,5})\))?",
            r"CUDA driver version is insufficient for CUDA runtime version",
            r"cudaErrorInsufficientDriver",
        ),
        sources=links(
            "torch#25581 torch#4546 colab#1685 "
            "https://docs.nvidia.com/deploy/cuda-compatibility/minor-version-compatibility.html"
        ),
        read=_driver_cuda,
    ),
    FailureClass(
        "A3",
        "CUDA_VISIBLE_DEVICES hides the GPUs",
        "A scheduler, an IDE or a script set CUDA_VISIBLE_DEVICES to nothing, to -1, or to a device that is not there "
        "(an old MIG or GPU name). Set in Python after torch has started, it has no effect or a wrong one.",
        (_UNSET_MASK, Remedy("in Python set it before the first import of torch", "CUDA_VISIBLE_DEVICES=0 python ...")),
        texts=(
            r"CUDA_VISIBLE_DEVICES'?\s*[=:]\s*(?:''|'?-1\b)",
            r"No CUDA GPUs are available",
            r"CUDA error: invalid device ordinal",
        ),
        follows=("A1", "A2", "A4", "A5", "A6", "A7", "A8", "A9", "A10", "A11"),
        sources=links("bnb#930"),
    ),
    FailureClass(
        "A4",
        "CUDA does not start: the nvidia-uvm module is missing or stale",
        "nvidia-smi works without the kernel module nvidia-uvm, CUDA does not: it is not loaded, or went stale (often "
        "after the machine was suspended). The same text appears when CUDA_VISIBLE_DEVICES changes after CUDA started.",
        (
            Remedy("load the module again", "sudo modprobe -r nvidia_uvm && sudo modprobe nvidia_uvm"),
            Remedy("if it is in use, restart the machine", "sudo reboot"),
            Remedy("if the program sets CUDA_VISIBLE_DEVICES, set it before the program starts"),
        ),
        texts=(r"CUDA unknown error\s*- this may be due to an incorrectly set up environment", r"CUDA unknown error"),
        follows=("A5",),
        sources=links("cog-svd#11 torch#49327 torch#49081"),
    ),
    FailureClass(
        "A5",
        "Driver was updated under the running kernel",
        "The loaded kernel module and the driver's library have different versions: the driver package was updated "
        "(often unattended) and the machine was not restarted since.",
        (
            _REBOOT,
            Remedy("keep it from happening again", "sudo apt-mark hold 'nvidia-driver-*' 'libnvidia-*'"),
        ),
        texts=(r"Driver/library version mismatch", r"NVML library version:\s*[\d.]+"),
        sources=links("ubuntu-driver#3 torch#45109"),
    ),
    FailureClass(
        "A6",
        "No NVIDIA driver is visible, as in a container without its GPUs",
        "Neither device files nor the driver's library are there: the container was started without GPUs or the host "
        "lacks the container toolkit; outside a container no driver is installed.",
        (_RUN_WITH_GPUS, _TOOLKIT),
        texts=(
            r"NVIDIA Driver was not detected",
            r"libcuda\.so(?:\.1)? not found",
            r"Found no NVIDIA driver on your system",
            r"could not select device driver '' with capabilities: \[\[gpu\]\]",
        ),
        sources=links("llama-cpp-python#1882 bnb#584 nvidia-container-toolkit#210"),
    ),
    FailureClass(
        "A7",
        "No permission to open the GPU's device files",
        "/dev/nvidia* belong to a group (often video) that this user, or this rootless container, is not a member of.",
        (
            Remedy("join the group, then log out and in", "sudo usermod -aG video,render $USER"),
            Remedy(
                "rootless podman (with crun): keep your groups",
                "podman run --device nvidia.com/gpu=all --group-add keep-groups IMAGE",
            ),
            Remedy("with SELinux: let containers use devices", "sudo setsebool -P container_use_devices true"),
        ),
        texts=(r"NVML: Insufficient Permissions", r"Permission denied: '/dev/nvidia"),
        sources=links("nvidia-container-toolkit#210 nvidia-container-toolkit#268 nvidia-container-toolkit#580"),
    ),
    FailureClass(
        "A8",
        "A running container lost its GPUs",
        "The device files are there, opening them is refused: the container's cgroup rules were rewritten, by a reload "
        "of systemd or by Kubernetes' CPU manager.",
        (
            Remedy("make the container again; a restart of the program is not enough", "docker restart CONTAINER"),
            Remedy(
                "for good: let docker manage cgroups itself",
                '# in /etc/docker/daemon.json\n"exec-opts": ["native.cgroupdriver=cgroupfs"]',
            ),
        ),
        texts=(r"NVML: Unknown Error", r"/dev/nvidia(?:ctl|\d)[^\n]{0,60}(?:EPERM|Operation not permitted)"),
        sources=links("https://github.com/mattshma/bigdata/issues/150 nvidia-docker#1730"),
    ),
    FailureClass(
        "A9",
        "A compatibility libcuda in the container shadows the host's driver",
        "The image's own /usr/local/cuda/compat/libcuda.so is found before the one of the host's driver, and the two "
        "do not fit.",
        (_DROP_COMPAT, Remedy("or use an image for the host's CUDA version, or upgrade the host's driver")),
        texts=(r"system has unsupported display driver\s*/\s*cuda driver combination", r"\bError 803\b"),
        sources=links("stable-diffusion#439 nvidia-docker#1256"),
    ),
    FailureClass(
        "A10",
        "Forward compatibility library on a GPU that it is not made for",
        "The image brings NVIDIA's forward compatibility library, which serves data center GPUs only; this is another.",
        (_DROP_COMPAT, _DRIVER),
        texts=(r"forward compatibility was attempted on non supported HW", r"\bError 804\b"),
        sources=links("gpustack#1254 https://docs.nvidia.com/deploy/cuda-compatibility/forward-compatibility.html"),
    ),
    FailureClass(
        "A11",
        "NVSwitch machine without its Fabric Manager",
        "GPUs joined by NVSwitch (HGX A100, H100 and later) start only when the service nvidia-fabricmanager of the "
        "driver's own version runs.",
        (
            Remedy(
                "install it for the driver's branch and start it",
                "sudo apt-get install -y nvidia-fabricmanager-$(cut -d. -f1 /sys/module/nvidia/version)\n"
                "sudo systemctl enable --now nvidia-fabricmanager",
            ),
        ),
        texts=(r"system not yet initialized", r"\bError 802\b", r"cudaErrorSystemNotReady"),
        sources=links("torch#35710 dlami#33"),
    ),
    FailureClass(
        "A12",
        "CUDA was started before the process forked",
        "A library touched the GPU while it was imported, then workers were made with fork; CUDA cannot follow.",
        (
            Remedy(
                "make workers with spawn, first thing in the main program",
                "torch.multiprocessing.set_start_method('spawn')",
            ),
            Remedy("vLLM: the same through its variable", "export VLLM_WORKER_MULTIPROC_METHOD=spawn", safe=True),
        ),
        texts=(r"Cannot re-?initialize CUDA in forked subprocess",),
        here="Importing halfbyte never starts CUDA.",
        sources=links("torch#40403 vllm#8893"),
    ),
    FailureClass(
        "A13",
        "The loader does not find libcuda, as in WSL",
        "In WSL the driver's library lies in /usr/lib/wsl/lib, which is not in the loader's path, or a Linux driver "
        "was installed over it. Outside WSL the driver is missing, or the container has no GPUs.",
        (
            Remedy(
                "WSL: put the folder on the loader's path",
                "export LD_LIBRARY_PATH=/usr/lib/wsl/lib:$LD_LIBRARY_PATH",
                safe=True,
            ),
            Remedy("WSL: never install a Linux driver inside; remove one", "sudo apt-get purge 'nvidia-driver-*'"),
            _RUN_WITH_GPUS,
        ),
        texts=(r"libcuda\.so(?:\.1)?: cannot open shared object file",),
        follows=("A6",),
        here="Triton asks ldconfig for the library; halfbyte's doctor names the folder it is in.",
        sources=links("bnb#17 bnb#337 wsl#8587"),
    ),
)
"""In order of their ids."""
