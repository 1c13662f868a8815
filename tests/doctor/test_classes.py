"""Each failure class that facts can show: the broken fact makes the right check speak, the healthy one lets it pass."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from halfbyte.doctor import registry
from halfbyte.doctor.differential import Culprit
from halfbyte.doctor.facts.gpu import Gpu, Node, SmiGpu
from halfbyte.doctor.facts.loader import Environment, Override
from halfbyte.doctor.facts.packages import Module, Package, Packages
from halfbyte.doctor.facts.peer import Peer
from halfbyte.doctor.facts.proofs import Proofs, StepProof
from halfbyte.doctor.facts.toolchain import Folder, Ptxas
from halfbyte.doctor.facts.torch_build import TorchBuild
from halfbyte.doctor.facts.torch_import import Device, TorchImport
from halfbyte.doctor.facts.transformers import TransformersImport
from halfbyte.doctor.host import Host
from halfbyte.doctor.model import Measurement, Result, Status
from tests.support.doctor_facts import H100, healthy_facts, package_table, proof_of

FAIL, WARN, PASS = Status.FAIL, Status.WARN, Status.PASS
T4 = Device("cuda:0", "Tesla T4", (7, 5), 15 << 30, "emulated")
GTX1080 = SmiGpu("NVIDIA GeForce GTX 1080", 8192, 0, (6, 1))
GB10 = SmiGpu("NVIDIA GB10", 122880, 0, (12, 1))
PEER = Peer("0.50.2", "/site/bitsandbytes", ("11.8", "12.8", "13.0"), (), True, "libbitsandbytes_cuda130.so")
CONDA = Package("torch", "2.11.0", "/conda/site", installer="conda")


@dataclass(frozen=True)
class Case:
    """One way to break one thing.

    Attributes:
        name: Failure class, with a letter where there are several ways.
        code: The check that must speak.
        broken: Fact -> its changed attributes, or another fact.
        fix: Part of a command that must be offered.
        status: How serious it is.
        healthy: As ``broken``, where the healthy machine lacks what the check looks at.
    """

    name: str
    code: str
    broken: dict[str, Any]
    fix: str
    status: Status = FAIL
    healthy: dict[str, Any] = field(default_factory=dict)

    @property
    def failure_class(self) -> str:
        return self.name.split("-")[0]


def broken_import(error: str, **more: Any) -> dict[str, Any]:
    return {"torch_import": TorchImport(ok=False, error=error, ended="exit status 1", **more)}


def no_gpu_seen(error: str, **more: Any) -> dict[str, Any]:
    return {"torch_import": {"devices": (), "available": False, "cuda_error": error, **more}}


def step(name: str, text: str, state: str = "error") -> dict[str, Any]:
    return {"proofs": Proofs((proof_of(H100, **{name: StepProof(state, text)}),))}


def wrong_number(name: str) -> dict[str, Any]:
    bad = StepProof("done", measurements=(Measurement("cuda:0", name, 0.01, 1e-6),))
    return {"proofs": Proofs((proof_of(H100, **{name: bad}),))}


CPU_BUILD = {"torch_build": TorchBuild("2.13.0+cpu", file="/site/torch/__init__.py")}
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
    # C. Shared libraries and wheels
    Case("C1", "HF104", {"peer": replace(PEER, version="0.41.1")}, "--upgrade bitsandbytes", WARN),
    Case(
        "C2",
        "HF104",
        {"peer": replace(PEER, version="0.46.0", cuda=("12.6", "12.8"), pick="")},
        "bitsandbytes>=0.48.0",
        WARN,
    ),
    Case("C2-torch", "HF104", {"peer": replace(PEER, cuda=("12.6",), pick="")}, "whl/cu126", WARN),
    Case("C2-forced", "HF104", {"peer": replace(PEER, forced="999", pick="")}, "unset BNB_CUDA_VERSION", WARN),
    Case("C3", "HF104", {"peer": Peer("0.50.2", "/src/bitsandbytes", checkout=True)}, "cd ~", WARN),
    Case("C4", "HF104", {"peer": replace(PEER, cuda=(), pick="")}, "uninstall -y bitsandbytes", WARN),
    Case(
        "C5",
        "TORCH104",
        {"torch_build": {"missing": ("nvidia-cusparse-cu12==12.5.8.93",)}},
        "nvidia-cusparse-cu12==12.5.8.93",
        WARN,
    ),
    Case(
        "C5-import", "TORCH105", broken_import("libcusparse.so.12: cannot open shared object file"), "--force-reinstall"
    ),
    Case(
        "C6",
        "ENV102",
        {"loader": {"overrides": (Override("/usr/local/cuda/lib64", ("libnvJitLink.so.12",)),)}},
        "unset LD_LIB",
        WARN,
    ),
    Case(
        "C6-import",
        "TORCH105",
        broken_import(
            "undefined symbol: __nvJitLinkComplete_12_4", culprit=Culprit("LD_LIBRARY_PATH", "/cuda", "/cuda:/opt")
        ),
        "export LD_LIBRARY_PATH=/opt",
    ),
    Case(
        "C7",
        "TORCH111",
        {"torch_import": {"mapped": (("libcudart", ("/a/libcudart.so.12", "/b/libcudart.so.13")),)}},
        "unset",
        WARN,
    ),
    Case("C8", "PY106", {"loader": {"glibc": "2.17"}}, "docker run"),
    Case("C8-import", "TORCH105", broken_import("version `GLIBC_2.34' not found"), "--force-reinstall"),
    Case(
        "C9",
        "ENV102",
        {"loader": {"overrides": (Override("/conda/lib", ("libstdc++.so.6",)),)}},
        "unset LD_LIBRARY_PATH",
        WARN,
    ),
    Case("C9-import", "TORCH105", broken_import("version `GLIBCXX_3.4.32' not found"), "--force-reinstall"),
    Case("C10", "HF104", {"peer": Peer("0.42.0", "/site/bitsandbytes")}, "--upgrade bitsandbytes", WARN),
    Case("C11", "PY105", {"torch_build": {"version": "2.12.0"}}, '--force-reinstall "torch==2.13.0"'),
    Case("C11-ours", "PY107", {"packages": package_table(halfbyte="9.9.9")}, "--force-reinstall halfbyte", WARN),
    Case(
        "C11-import",
        "TORCH109",
        {"torch_import": {"halfbyte_error": "ImportError: no name"}},
        "--force-reinstall halfbyte",
    ),
    Case("C12-import", "TORCH105", broken_import("no attribute 'zeros'", culprit=Culprit("cwd")), "cd ~"),
    Case(
        "C13",
        "PY105",
        {"packages": Packages({**package_table().found, "torch": (*package_table().found["torch"], CONDA)})},
        "uninstall -y torch",
        WARN,
    ),
    # D. Tool chain
    Case("D1", "TRITON103", {"toolchain": {"compiler": ""}}, "apt-get install -y build-essential"),
    Case("D1-cc", "TRITON103", {"toolchain": {"compiler": "", "compiler_from": "CC"}}, "unset CC"),
    Case("D2", "TRITON104", {"toolchain": {"header": False}}, "apt-get install -y python3.11-dev"),
    Case(
        "D3",
        "TRITON105",
        {"toolchain": {"ptxas_new": Ptxas("/x/ptxas-blackwell", "12.8")}, "gpu": {"smi": (GB10,)}},
        "BLACKWELL_PATH=",
    ),
    Case(
        "D3-dead",
        "TRITON105",
        {"toolchain": {"ptxas_new": Ptxas("/x", "", "TRITON_PTXAS_BLACKWELL_PATH")}},
        "unset TRITON_PTXAS",
    ),
    Case(
        "D4",
        "TRITON106",
        {"loader": {"libcuda_listed": False, "libcuda": "/usr/lib64-nvidia/libcuda.so.1"}},
        "/usr/lib64-nvidia",
    ),
    Case("D5", "TRITON106", {"loader": {"libcuda_listed": False, "ldconfig": False}}, "TRITON_LIBCUDA_PATH="),
    Case("D6", "TRITON111", step("triton_kernel", "0 active drivers ([]). There should only be one."), "explain D6"),
    Case(
        "D7",
        "TRITON107",
        {"toolchain": {"triton_cache": Folder("/.triton", "/ cannot be written")}},
        "TRITON_CACHE_DIR=",
    ),
    Case("D8", "TRITON108", {"toolchain": {"triton_cache": Folder("/tmp/t", "", True)}}, "TRITON_CACHE_DIR="),
    Case("D9", "TRITON101", {"toolchain": {"triton": ""}}, "triton==3.7.0", WARN),
    Case(
        "D9-windows",
        "TRITON101",
        {"toolchain": {"triton": ""}, "host": Host(system="Windows")},
        '"triton-windows<3.8"',
        WARN,
    ),
    Case("D10", "HF104", {"peer": replace(PEER, version="0.44.1")}, "--upgrade bitsandbytes", WARN),
    Case("D11", "TRITON102", {"toolchain": {"triton": "3.4.0"}}, "triton==3.7.0", WARN),
    Case("D12", "TRITON109", {"toolchain": {"triton_source": False}}, "--collect-all halfbyte"),
    Case(
        "D13",
        "SPEED102",
        {
            "proofs": Proofs(
                (
                    proof_of(
                        H100, triton_kernel=StepProof("done", measurements=(Measurement("cuda:0", "first call", 90.0),))
                    ),
                )
            )
        },
        "halfbyte warmup",
        WARN,
    ),
    Case(
        "D14",
        "CPU103",
        {"toolchain": {"numba_cache": Folder("/.cache", "/ cannot be written")}},
        "NUMBA_CACHE_DIR=",
        WARN,
    ),
    Case("D15", "CPU102", {"cpu": {"numba": ""}}, "numba>=0.61", WARN),
    Case("D15-numpy", "CPU102", {"cpu": {"numpy": "2.9.0"}}, "--upgrade numba", WARN),
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
    Case(
        "G1",
        "SPEED104",
        {
            "proofs": Proofs(
                (
                    proof_of(
                        H100,
                        speed_4bit=StepProof(
                            "done", measurements=(Measurement("cuda:0", "speed", 0.4, 0.8, "x", True),)
                        ),
                    ),
                )
            )
        },
        "SPEED101",
        WARN,
        {
            "proofs": Proofs(
                (
                    proof_of(
                        H100,
                        speed_4bit=StepProof(
                            "done", measurements=(Measurement("cuda:0", "speed", 2.4, 0.8, "x", True),)
                        ),
                    ),
                )
            )
        },
    ),
    Case("G3", "MEM105", {"gpu": {"smi": (SmiGpu("NVIDIA H100", 81559, 70000, (9, 0)),)}}, "nvidia-smi", WARN),
    Case("G6", "TORCH110", {"torch_import": {"devices": (T4,)}}, "torch.float16", WARN),
)

WITHOUT_HEALTHY_PASS = {"GPU110"}
"""Checks that only ever skip on a machine that is not theirs."""


def facts_with(changes: dict[str, Any]) -> dict[str, Any]:
    facts = healthy_facts()
    for name, change in changes.items():
        facts[name] = replace(facts[name], **change) if isinstance(change, dict) else change
    return facts


def result_of(code: str, facts: dict[str, Any]) -> Result:
    check = next(each for each in registry.checks() if each.code == code)
    return check.function(**{name: facts[name] for name in check.wants})


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_broken_fact_is_named_with_its_fix(case: Case):
    result = result_of(case.code, facts_with(case.broken))
    assert result.status is case.status, result
    assert case.failure_class in result.classes
    assert any(case.fix in fix.command for fix in result.fixes), result.fixes
    assert result.summary
    assert not result.summary.endswith(".")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_healthy_fact_passes(case: Case):
    result = result_of(case.code, facts_with(case.healthy))
    expected = {Status.SKIP} if case.code in WITHOUT_HEALTHY_PASS else {PASS}
    assert result.status in expected, result
    assert not result.fixes


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_check_declares_the_class_it_finds(case: Case):
    check = next(each for each in registry.checks() if each.code == case.code)
    assert case.failure_class in check.classes


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_safe_fix_only_sets_a_variable_or_makes_a_folder(case: Case):
    for fix in result_of(case.code, facts_with(case.broken)).fixes:
        if fix.safe:
            assert all(part.startswith(("export ", "mkdir -p ")) for part in fix.command.split(" && "))


def test_at_least_45_classes_are_arranged():
    assert len({case.failure_class for case in CASES}) >= 45


def test_a_shadowing_file_is_found_in_the_folder_it_lies_in(tmp_path: Path):
    (tmp_path / "torch.py").write_text("")
    facts = healthy_facts()
    host = replace(facts["host"], cwd=tmp_path, search_path=(str(tmp_path), "/site"))
    module = Module("torch", str(tmp_path / "torch.py"), str(tmp_path))
    shadowed = replace(facts["packages"], modules={"torch": (module,)})
    result = result_of("ENV101", {"host": host, "packages": shadowed})
    assert result.status is FAIL
    assert result.classes == ("C12",)
    assert f"mv {tmp_path}/torch.py" in result.fixes[0].command


def test_a_shadowing_file_named_bitsandbytes_is_class_e4(tmp_path: Path):
    (tmp_path / "bitsandbytes.py").write_text("")
    facts = healthy_facts()
    host = replace(facts["host"], cwd=tmp_path, search_path=(str(tmp_path),))
    module = Module("bitsandbytes", str(tmp_path / "bitsandbytes.py"), str(tmp_path))
    result = result_of(
        "ENV101", {"host": host, "packages": replace(facts["packages"], modules={"bitsandbytes": (module,)})}
    )
    assert result.classes == ("E4",)


def test_every_class_that_a_check_declares_has_a_case():
    arranged = {case.failure_class for case in CASES} | {"C12", "E4"}
    declared = {name for check in registry.checks() for name in check.classes}
    assert declared <= arranged


def test_a_driver_that_does_not_answer_is_a_failure():
    facts = healthy_facts()
    gpu = replace(facts["gpu"], smi=(), smi_error="nvidia-smi: no answer in 8 s")
    result = result_of("GPU104", {"gpu": gpu})
    assert (result.status, result.fixes[0].command) == (FAIL, "sudo reboot")
