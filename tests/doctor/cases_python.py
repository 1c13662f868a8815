"""Cases of groups E, F and G: the Python environment, platforms, and what fails in silence."""

from __future__ import annotations

from dataclasses import replace

from halfbyte.doctor.facts.gpu import Gpu, SmiGpu
from halfbyte.doctor.facts.packages import Package, Packages
from halfbyte.doctor.facts.proofs import Proofs, StepProof
from halfbyte.doctor.facts.torch_build import TorchBuild
from halfbyte.doctor.facts.transformers import TransformersImport
from halfbyte.doctor.host import Host
from halfbyte.doctor.model import Measurement
from tests.doctor.cases import CPU_BUILD, FAIL, PEER, T4, WARN, Case, step
from tests.support.doctor_facts import H100, package_table, proof_of


def four_bits_as_fast(factor: float) -> dict[str, Proofs]:
    """A proof in which 4-bit layers are that many times as fast as those in 16 bits."""
    speed = StepProof("done", measurements=(Measurement("cuda:0", "speed", factor, 0.8, "x", True),))
    return {"proofs": Proofs((proof_of(H100, speed_4bit=speed),))}


CASES = (
    # E. Python environment and Hugging Face stack
    Case(
        "E1",
        "HF105",
        {"transformers_import": TransformersImport(True, True, "", "ImportError: accelerate")},
        "transformers",
        WARN,
    ),
    Case("E2", "HF101", {"packages": package_table(transformers="4.49.0")}, "--upgrade transformers"),
    Case("E3", "HF104", {"peer": replace(PEER, version="0.48.1")}, "--upgrade bitsandbytes", WARN),
    Case(
        "E4",
        "HF105",
        {"transformers_import": TransformersImport(True, False, "cannot import name 'x' from 'y'")},
        "transformers",
        WARN,
    ),
    Case("E5", "PY102", {"torch_build": TorchBuild()}, '--force-reinstall "torch==2.13.0"'),
    Case(
        "E5-metadata",
        "PY104",
        {
            "packages": Packages(
                {**package_table().found, "numpy": (Package("numpy", "2.3.0", "/site", complete=False),)}
            )
        },
        "--force-reinstall numpy",
        WARN,
    ),
    Case("E6", "PY108", {"torch_build": {"version": "2.2.0"}}, '"numpy<2"'),
    Case(
        "E6-bridge", "TORCH108", {"torch_import": {"numpy_error": "RuntimeError: Numpy is not available"}}, '"numpy<2"'
    ),
    Case("E7", "MEM105", {"gpu": {"smi": (SmiGpu("NVIDIA H100", 81559, 70000, (9, 0)),)}}, "nvidia-smi", WARN),
    Case("E7-ram", "MEM101", {"memory": {"available": 1 << 30}}, "ps aux", WARN),
    Case("E8", "HF102", {"packages": package_table(accelerate="0.20.0")}, "--upgrade accelerate", WARN),
    Case("E10", "HF103", {"packages": package_table(peft="0.13.0")}, "--upgrade peft", WARN),
    Case("E11", "NUM101", step("allocate", "torch.OutOfMemoryError: CUDA out of memory."), "explain E11"),
    # F. Platforms
    Case(
        "F1",
        "TORCH101",
        {**CPU_BUILD, "gpu": Gpu(bus=("AMD",), kfd="")},
        "whl/rocm",
        FAIL,
        {"gpu": Gpu(bus=("AMD",), kfd=""), "torch_build": {"cuda": "", "hip": "6.4"}},
    ),
    Case(
        "F1-group",
        "GPU103",
        {"gpu": Gpu(bus=("AMD",), kfd="EACCES")},
        "render",
        FAIL,
        {"gpu": Gpu(bus=("AMD",), kfd="")},
    ),
    Case("F3", "GPU110", {"gpu": {"jetson": "# R36 (release)"}, "host": Host(machine="aarch64")}, "jetson", WARN),
    # G. Silent
    Case("G1", "SPEED104", four_bits_as_fast(0.4), "SPEED101", WARN, four_bits_as_fast(2.4)),
    Case("G3", "MEM105", {"gpu": {"smi": (SmiGpu("NVIDIA H100", 81559, 70000, (9, 0)),)}}, "nvidia-smi", WARN),
    Case("G6", "TORCH110", {"torch_import": {"devices": (T4,)}}, "torch.float16", WARN),
)
