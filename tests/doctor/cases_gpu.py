"""Cases of groups A and B: no GPU is reached, or it cannot run this code."""

from __future__ import annotations

from halfbyte.doctor.differential import Culprit
from halfbyte.doctor.facts.gpu import Node, SmiGpu
from halfbyte.doctor.facts.loader import Environment
from halfbyte.doctor.host import Host
from tests.doctor.cases import CPU_BUILD, FAIL, GB10, T4, WARN, Case, no_gpu_seen, step, wrong_number

GTX1080 = SmiGpu("NVIDIA GeForce GTX 1080", 8192, 0, (6, 1))
CONTAINER = {"container": "Docker", "nodes": (), "smi": (), "driver": ""}
WSL = {"wsl": True, "wsl_library": True, "userspace": ""}

CASES = (
    # A. Is a GPU reachable at all?
    Case("A1", "TORCH101", CPU_BUILD, "--index-url https://download.pytorch.org/whl/cu13"),
    Case("A1-driver", "TORCH101", {**CPU_BUILD, "gpu": {"driver": "550.54.14"}}, "whl/cu126"),
    Case("A2", "TORCH102", {"gpu": {"driver": "550.54.14"}}, "whl/cu126"),
    Case(
        "A2-seen",
        "TORCH106",
        no_gpu_seen("The NVIDIA driver on your system is too old (found version 12040)"),
        "nvidia",
    ),
    Case(
        "A3", "ENV104", {"environment": Environment({"CUDA_VISIBLE_DEVICES": ""})}, "unset CUDA_VISIBLE_DEVICES", WARN
    ),
    Case("A3-minus", "ENV104", {"environment": Environment({"CUDA_VISIBLE_DEVICES": "-1"})}, "unset CUDA_VIS", WARN),
    Case(
        "A3-proved",
        "TORCH106",
        no_gpu_seen("", mask_culprit=Culprit("CUDA_VISIBLE_DEVICES", "", "MIG-1")),
        "unset CUDA_VISI",
    ),
    Case("A4", "GPU106", {"gpu": {"nodes": (Node("/dev/nvidia0"), Node("/dev/nvidiactl"))}}, "modprobe nvidia_uvm"),
    Case("A4-seen", "TORCH106", no_gpu_seen("CUDA unknown error - this may be due to"), "modprobe nvidia_uvm"),
    Case("A5", "GPU105", {"gpu": {"userspace": "580.105.08"}}, "reboot"),
    Case(
        "A5-smi",
        "GPU105",
        {"gpu": {"smi_error": "Failed to initialize NVML: Driver/library version mismatch"}},
        "reboot",
    ),
    Case("A6", "GPU102", {"gpu": CONTAINER}, "--gpus all", WARN, {"gpu": {"container": "Docker"}}),
    Case(
        "A6-pod",
        "GPU102",
        {"gpu": {**CONTAINER, "container": "Kubernetes"}},
        "nvidia.com/gpu=1",
        WARN,
        {"gpu": {"container": "Podman"}},
    ),
    Case(
        "A6-bare",
        "GPU101",
        {"gpu": {**CONTAINER, "container": "", "userspace": "", "modules": frozenset({"nouveau"})}},
        "nvidia-driver",
    ),
    Case("A7", "GPU103", {"gpu": {"nodes": (Node("/dev/nvidia0", "EACCES", "video", 0o660),)}}, "usermod -aG video"),
    Case("A7-smi", "GPU103", {"gpu": {"smi_error": "Failed to initialize NVML: Insufficient Permissions"}}, "usermod"),
    Case(
        "A8", "GPU104", {"gpu": {"nodes": (Node("/dev/nvidiactl", "EPERM"),), "container": "Docker"}}, "docker restart"
    ),
    Case("A8-smi", "GPU104", {"gpu": {"smi_error": "Failed to initialize NVML: Unknown Error"}}, "restart"),
    Case("A9", "GPU107", {"loader": {"compat": "/usr/local/cuda/compat"}}, "grep -v compat", WARN),
    Case(
        "A9-seen", "TORCH106", no_gpu_seen("Error 803: system has unsupported display driver"), "unset LD_LIBRARY_PATH"
    ),
    Case(
        "A10",
        "GPU107",
        {
            "loader": {"compat": "/usr/local/cuda/compat"},
            "gpu": {"smi": (SmiGpu("NVIDIA GeForce RTX 4090", 24564, 0, (8, 9)),)},
        },
        "grep -v compat",
    ),
    Case(
        "A10-seen",
        "TORCH106",
        no_gpu_seen("Error 804: forward compatibility was attempted on"),
        "unset LD_LIBRARY_PATH",
    ),
    Case(
        "A11",
        "GPU108",
        {"gpu": {"nvswitches": 4, "fabric_manager": False}},
        "systemctl enable --now nvidia-fabricmanager",
        FAIL,
        {"gpu": {"nvswitches": 4, "fabric_manager": True}},
    ),
    Case("A11-seen", "TORCH106", no_gpu_seen("Error 802: system not yet initialized"), "nvidia-fabricmanager"),
    Case("A12", "TORCH109", {"torch_import": {"cuda_at_import": True}}, "pip list"),
    Case("A13", "GPU109", {"gpu": WSL, "loader": {"libcuda_listed": False}}, "/usr/lib/wsl/lib:", WARN, {"gpu": WSL}),
    Case("A13-linux", "GPU109", {"gpu": {**WSL, "userspace": "580.95.05"}}, "apt-get purge", FAIL, {"gpu": WSL}),
    # B. The GPU is visible but cannot run this code
    Case("B1", "TORCH103", {"torch_build": {"version": "2.8.0", "cuda": "12.6"}, "gpu": {"smi": (GB10,)}}, "whl/cu13"),
    Case("B1-running", "TORCH107", {"torch_import": {"arches": ("sm_50", "sm_80")}}, "torch=="),
    Case(
        "B1-proved",
        "NUM102",
        step("torch_op", "no kernel image is available for execution on the device"),
        "explain B1",
    ),
    Case("B2", "TORCH103", {"gpu": {"smi": (GTX1080,)}}, "whl/cu126"),
    Case("B3", "TRITON110", {"gpu": {"smi": (GTX1080,)}, "torch_import": {"devices": ()}}, "float16", WARN),
    Case("B4", "TRITON111", step("triton_kernel", "Feature '.bf16' requires .target sm_80 or higher"), "explain B4"),
    Case(
        "B4-ptxas",
        "TRITON111",
        step("triton_kernel", "PTXASError: ptxas /tmp/x.ptx: error: Feature '.bf16' requires .target sm_80 or higher"),
        "explain B4",
    ),
    Case("B5", "TORCH110", {"torch_import": {"devices": (T4,)}}, "torch.float16", WARN),
    Case("B6", "GPU110", {"gpu": {"jetson": "# R36 (release)"}, "host": Host(machine="aarch64")}, "jetson", WARN),
    Case("B6-proved", "NUM103", step("nf4", "Error named symbol not found at line 74"), "explain B6"),
    Case("B7", "NUM102", step("torch_op", "the provided PTX was compiled with an unsupported toolchain"), "explain B7"),
    Case("B8", "NUM105", step("matmul_4bit", "cublasLt ran into an error!"), "explain B8"),
    Case("B9", "NUM105", wrong_number("matmul_4bit"), "HALFBYTE_BACKEND=reference"),
    Case("B9-nf4", "NUM103", wrong_number("nf4"), "HALFBYTE_BACKEND=reference"),
)
