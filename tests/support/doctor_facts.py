"""Facts of a healthy GPU machine, as the doctor's checks take them, and ways to break them one at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import halfbyte.doctor.checks
import halfbyte.doctor.facts  # noqa: F401  registers
from halfbyte.doctor.facts.cpu import Cpu
from halfbyte.doctor.facts.gpu import Gpu, Node, SmiGpu
from halfbyte.doctor.facts.installer import Installer
from halfbyte.doctor.facts.loader import Environment, Loader
from halfbyte.doctor.facts.memory import Memory
from halfbyte.doctor.facts.packages import Package, Packages
from halfbyte.doctor.facts.peer import Peer
from halfbyte.doctor.facts.proofs import DeviceProof, Proofs, StepProof
from halfbyte.doctor.facts.toolchain import Folder, Ptxas, Toolchain
from halfbyte.doctor.facts.torch_build import TorchBuild
from halfbyte.doctor.facts.torch_import import Device, TorchImport
from halfbyte.doctor.facts.transformers import TransformersImport
from halfbyte.doctor.host import Host
from halfbyte.doctor.model import Measurement

GIB = 2**30
H100 = Device("cuda:0", "NVIDIA H100 80GB HBM3", (9, 0), 80 * GIB)
VERSIONS = {
    "torch": "2.13.0",
    "triton": "3.7.0",
    "numpy": "2.3.0",
    "numba": "0.63.0",
    "packaging": "25.0",
    "safetensors": "0.7.0",
    "psutil": "7.0",
    "rich": "14.0",
    "transformers": "5.23.0",
    "accelerate": "1.15.0",
    "peft": "0.21.0",
}


def package_table(**changed: str | None) -> Packages:
    """The healthy packages with other versions; None takes one away."""
    versions = {**VERSIONS, **{name.replace("_", "-"): version for name, version in changed.items()}}
    return Packages({name: (Package(name, version, "/site"),) for name, version in versions.items() if version})


def proof_of(device: Device, **changed: StepProof) -> DeviceProof:
    """A device on which every step went well, but for those given."""
    names = ["allocate", "torch_op", "nf4", "fp4", "matmul_4bit", "blockwise_8bit", "int8", "optimizer_8bit"]
    names.append("numba_kernel" if device.name == "cpu" else "triton_kernel")
    good = {name: StepProof("done", measurements=(Measurement(device.name, name, 1e-7, 1e-6),)) for name in names}
    if device.name != "cpu":
        good["triton_kernel"] = StepProof("done", measurements=(Measurement(device.name, "first call", 1.5, unit="s"),))
    backend = "cpu" if device.name == "cpu" else "triton"
    return DeviceProof(device, {**good, **changed}, ((backend, ""), ("reference", "")))


def healthy_facts() -> dict[str, Any]:
    """Every fact of a machine with one H100, driver 580 and torch for CUDA 13.0."""
    cache = Folder("/home/someone/.cache", free=100 * GIB)
    return {
        "host": Host(environ={"PATH": "/usr/bin"}, cwd=Path("/home/someone/project"), prefix="/venv"),
        "packages": package_table(),
        "installer": Installer("pip", "debian", "3.11"),
        "torch_build": TorchBuild("2.13.0+cu130", cuda="13.0", file="/site/torch/__init__.py", triton="3.7.0"),
        "gpu": Gpu(
            bus=("NVIDIA",),
            driver="580.95.05",
            userspace="580.95.05",
            nodes=(Node("/dev/nvidia0"), Node("/dev/nvidiactl"), Node("/dev/nvidia-uvm")),
            smi=(SmiGpu("NVIDIA H100 80GB HBM3", 81559, 0, (9, 0)),),
        ),
        "loader": Loader(libcuda="/usr/lib/x86_64-linux-gnu/libcuda.so.1", libcuda_listed=True, glibc="2.36"),
        "environment": Environment(),
        "toolchain": Toolchain(
            triton="3.7.0",
            compiler="/usr/bin/gcc",
            ptxas=Ptxas("/site/triton/ptxas", "12.9"),
            ptxas_new=Ptxas("/site/triton/ptxas-blackwell", "13.0"),
            triton_cache=cache,
            numba_cache=cache,
        ),
        "cpu": Cpu("AMD EPYC", ("avx2",), 8, 8, 0.0, "0.63.0", "numpy<2.4,>=1.22", "2.3.0"),
        "memory": Memory(64 * GIB, 60 * GIB, 0, 8 * GIB, cache, cache),
        "peer": Peer(),
        "torch_import": TorchImport(
            ok=True,
            seconds=2.0,
            version="2.13.0+cu130",
            file="/site/torch/__init__.py",
            available=True,
            arches=("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"),
            devices=(H100,),
            cuda_at_import=False,
            mapped=(("libcudart", ("/site/nvidia/libcudart.so.13",)),),
        ),
        "proofs": Proofs((proof_of(H100), proof_of(Device("cpu")))),
        "transformers_import": TransformersImport(True, True, "", "", "torch.float32"),
    }
