"""Cases of groups C and D: shared libraries and wheels, compilers and their caches."""

from __future__ import annotations

from dataclasses import replace

from halfbyte.doctor.differential import Culprit
from halfbyte.doctor.facts.loader import Override
from halfbyte.doctor.facts.packages import Package, Packages
from halfbyte.doctor.facts.peer import Peer
from halfbyte.doctor.facts.proofs import Proofs, StepProof
from halfbyte.doctor.facts.toolchain import Folder, Ptxas
from halfbyte.doctor.host import Host
from halfbyte.doctor.model import Measurement
from tests.doctor.cases import GB10, PEER, WARN, Case, broken_import, step
from tests.support.doctor_facts import H100, package_table, proof_of

CONDA = Package("torch", "2.11.0", "/conda/site", installer="conda")

CASES = (
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
)
