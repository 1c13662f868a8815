"""Facts are read from planted file trees and search paths: what each shows is found, what is absent is empty."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from halfbyte.doctor.facts.cpu import cpu
from halfbyte.doctor.facts.gpu import gpu
from halfbyte.doctor.facts.loader import environment, loader
from halfbyte.doctor.facts.memory import memory
from halfbyte.doctor.facts.packages import packages
from halfbyte.doctor.facts.peer import peer
from halfbyte.doctor.facts.toolchain import folder_state, toolchain
from halfbyte.doctor.facts.torch_build import TorchBuild, torch_build
from halfbyte.doctor.host import Completed, Host
from tests.support.environments import add_distribution, nvidia_tree


@pytest.fixture
def host(tmp_path: Path) -> Host:
    (tmp_path / "root").mkdir()
    (tmp_path / "site").mkdir()
    return Host(root=tmp_path / "root", search_path=(str(tmp_path / "site"),), home=tmp_path / "home", cwd=tmp_path)


def plant(host: Host, path: str, text: str = "") -> Path:
    target = host.path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text)
    return target


def site_of(host: Host) -> Path:
    return Path(host.search_path[0])


# GPU


def test_an_empty_tree_has_no_gpu(host: Host):
    found = gpu(host)
    assert not found.nvidia
    assert not found.reachable
    assert not found.amd


def test_driver_nodes_and_gpus_are_read(host: Host):
    nvidia_tree(host.root, driver="550.54.14", smi="Tesla T4, 550.54.14, 15360, 7, 7.5")
    found = gpu(host)
    assert (found.driver, found.reachable) == ("550.54.14", True)
    assert [node.path for node in found.nodes] == ["/dev/nvidia-uvm", "/dev/nvidia0", "/dev/nvidiactl"]
    assert [(each.name, each.memory, each.capability) for each in found.smi] == [("Tesla T4", 15360, (7, 5))]


def test_an_old_nvidia_smi_that_knows_no_capability_is_asked_again(host: Host):
    nvidia_tree(host.root, smi="")
    plant(host, "/usr/bin/nvidia-smi")

    def run(words: list[str], timeout: float) -> Completed:
        if "compute_cap" in words[1]:
            return Completed(2, 'Field "compute_cap" is not a valid field to query.')
        return Completed(0, "Tesla P100-PCIE-16GB, 460.32.03, 16280, 0\n")

    found = gpu(replace(host, run=run))
    assert [(each.name, each.capability) for each in found.smi] == [("Tesla P100-PCIE-16GB", (0, 0))]


def test_what_nvidia_smi_says_instead_is_kept(host: Host):
    nvidia_tree(host.root, smi="")
    plant(host, "/usr/bin/nvidia-smi")
    text = "Failed to initialize NVML: Driver/library version mismatch\nNVML library version: 580.105"
    found = gpu(replace(host, run=lambda *_: Completed(18, "Failed to initialize NVML: Unknown Error\n")))
    assert found.smi_error == "Failed to initialize NVML: Unknown Error"
    found = gpu(replace(host, run=lambda *_: Completed(18, text)))
    assert "version mismatch" in found.smi_error


def test_a_gpu_on_the_bus_without_a_driver_is_not_reachable(host: Host):
    plant(host, "/sys/bus/pci/devices/0000:01:00.0/class", "0x030000\n")
    plant(host, "/sys/bus/pci/devices/0000:01:00.0/vendor", "0x10de\n")
    plant(host, "/sys/bus/pci/devices/0000:02:00.0/class", "0x020000\n")
    plant(host, "/sys/bus/pci/devices/0000:02:00.0/vendor", "0x10de\n")
    plant(host, "/proc/modules", "nouveau 1 0 - Live 0x0\n")
    found = gpu(host)
    assert (found.bus, found.reachable, found.modules) == (("NVIDIA",), False, frozenset({"nouveau"}))


def test_a_container_without_device_files_is_not_reachable(host: Host):
    plant(host, "/proc/driver/nvidia/version", "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.14  x\n")
    plant(host, "/.dockerenv")
    found = gpu(host)
    assert (found.container, found.nvidia, found.reachable) == ("Docker", True, False)


def test_a_pod_is_known_by_its_variable(host: Host):
    assert gpu(replace(host, environ={"KUBERNETES_SERVICE_HOST": "10.0.0.1"})).container == "Kubernetes"


def test_the_library_version_is_that_of_the_link(host: Host):
    library = plant(host, "/usr/lib/x86_64-linux-gnu/libcuda.so.580.105.08")
    library.with_name("libcuda.so.1").symlink_to(library.name)
    assert gpu(host).userspace == "580.105.08"


def test_wsl_and_its_library_are_seen(host: Host):
    plant(host, "/proc/version", "Linux version 6.6 Microsoft standard WSL2")
    plant(host, "/usr/lib/wsl/lib/libcuda.so.1")
    found = gpu(host)
    assert (found.wsl, found.wsl_library, found.reachable) == (True, True, True)


def test_switches_and_their_service_are_seen(host: Host):
    plant(host, "/dev/nvidia-nvswitch0")
    plant(host, "/dev/nvidia-nvswitchctl")
    assert (gpu(host).nvswitches, gpu(host).fabric_manager) == (1, False)
    plant(host, "/proc/4711/comm", "nv-fabricmanage\n")
    assert gpu(host).fabric_manager is True


def test_amd_and_jetson_are_seen(host: Host):
    plant(host, "/dev/kfd")
    plant(host, "/etc/nv_tegra_release", "# R36 (release), REVISION: 4.3\nmore\n")
    found = gpu(host)
    assert (found.amd, found.kfd, found.jetson) == (True, "", "# R36 (release), REVISION: 4.3")


# Packages and torch


def test_distributions_are_read_with_their_requirements(host: Host):
    add_distribution(site_of(host), "torch", "2.13.0+cu130", requires=("triton==3.7.0; platform_system == 'Linux'",))
    add_distribution(site_of(host), "Some.Thing", "1.0", requires=("x",))
    found = packages(host)
    assert found.version("torch") == "2.13.0+cu130"
    assert found.get("torch").requires == ("triton==3.7.0; platform_system == 'Linux'",)
    assert found.version("some-thing") == "1.0"


def test_the_first_of_two_copies_counts_and_both_are_known(host: Host, tmp_path: Path):
    other = tmp_path / "other"
    add_distribution(site_of(host), "torch", "2.13.0")
    add_distribution(other, "torch", "2.11.0")
    found = packages(replace(host, search_path=(*host.search_path, str(other), str(other))))
    assert [each.version for each in found.found["torch"]] == ["2.13.0", "2.11.0"]


def test_a_distribution_without_metadata_is_incomplete(host: Host):
    (site_of(host) / "numpy-2.0.0.dist-info").mkdir()
    assert packages(host).get("numpy").complete is False


def test_a_package_before_a_bare_folder_as_imports_do(host: Host, tmp_path: Path):
    (tmp_path / "torch").mkdir()
    (site_of(host) / "torch").mkdir()
    (site_of(host) / "torch" / "__init__.py").write_text("")
    found = packages(replace(host, search_path=(str(tmp_path), *host.search_path)))
    assert found.module("torch").path == str(site_of(host) / "torch" / "__init__.py")


def plant_torch(host: Host, version: str, requires: tuple[str, ...] = ()) -> TorchBuild:
    folder = site_of(host) / "torch"
    folder.mkdir()
    (folder / "__init__.py").write_text("raise RuntimeError('never imported')")
    (folder / "version.py").write_text(version)
    add_distribution(site_of(host), "torch", "2.13.0", requires=requires)
    return torch_build(host, packages(host))


def test_the_build_is_read_without_importing(host: Host):
    text = "__version__ = '2.13.0+cu130'\ndebug = False\ncuda: Optional[str] = '13.0'\nhip: Optional[str] = None\n"
    found = plant_torch(host, text)
    assert (found.version, found.cuda, found.hip, found.kind) == ("2.13.0+cu130", "13.0", "", "CUDA 13.0")


def test_a_cpu_build_and_a_rocm_build_are_told_apart(host: Host):
    found = plant_torch(host, "__version__ = '2.9.0+rocm6.4'\ncuda = None\nhip = '6.4.43484'\n")
    assert (found.kind, found.accelerated) == ("ROCm 6.4.43484", True)
    assert TorchBuild("2.13.0+cpu").kind == "CPU only"


def test_missing_runtime_packages_are_listed(host: Host):
    add_distribution(site_of(host), "nvidia_nvjitlink_cu12", "12.4.127")
    add_distribution(site_of(host), "nvidia_cublas_cu12", "12.8.4.1")
    found = plant_torch(
        host,
        "__version__ = '2.8.0'\ncuda = '12.8'\n",
        (
            'nvidia-cublas-cu12==12.8.4.1; platform_system == "Linux" and platform_machine == "x86_64"',
            'nvidia-nvjitlink-cu12==12.8.93; platform_system == "Linux" and platform_machine == "x86_64"',
            'nvidia-cudnn-cu12==9.10.2.21; platform_machine == "aarch64"',
            'nvidia-nccl-cu12==2.27; extra == "nccl"',
            'triton==3.4.0; platform_system == "Linux"',
        ),
    )
    assert found.missing == ("nvidia-nvjitlink-cu12==12.8.93 (installed: 12.4.127)",)
    assert found.triton == "3.4.0"


# Loader, tool chain, CPU, memory, bitsandbytes


def test_only_listed_variables_are_kept(host: Host):
    found = environment(replace(host, environ={"LD_LIBRARY_PATH": "/x", "HF_TOKEN": "hf_1", "HOME": "/home/me"}))
    assert dict(found.shown) == {"LD_LIBRARY_PATH": "/x"}


def test_libraries_in_front_of_torchs_own_are_named(host: Host, tmp_path: Path):
    folder = tmp_path / "cuda" / "compat"
    folder.mkdir(parents=True)
    for name in ("libcuda.so.1", "libnvJitLink.so.12", "libharmless.so"):
        (folder / name).write_text("")
    found = loader(replace(host, environ={"LD_LIBRARY_PATH": f"{folder}:/nowhere"}))
    assert found.overrides[0].libraries == ("libcuda.so.1", "libnvJitLink.so.12")
    assert found.overrides[1].exists is False
    assert found.compat == str(folder)


def test_libcuda_is_found_by_ldconfig_or_in_the_usual_folders(host: Host):
    plant(host, "/usr/lib64-nvidia/libcuda.so.1")
    assert (loader(host).ldconfig, loader(host).libcuda) == (False, "/usr/lib64-nvidia/libcuda.so.1")
    plant(host, "/sbin/ldconfig")
    listing = Completed(0, "\tlibcuda.so.1 (libc6,x86-64) => /lib/x86_64-linux-gnu/libcuda.so.1\n")
    found = loader(replace(host, run=lambda *_: listing))
    assert (found.libcuda, found.libcuda_listed) == ("/lib/x86_64-linux-gnu/libcuda.so.1", True)


def test_the_compiler_is_looked_up_as_triton_does(host: Host, tmp_path: Path):
    for name in ("clang", "mycc"):
        program = tmp_path / name
        program.write_text("#!/bin/sh\n")
        program.chmod(0o755)
    path = {"PATH": str(tmp_path)}
    assert toolchain(replace(host, environ=path), packages(host)).compiler == str(tmp_path / "clang")
    named = toolchain(replace(host, environ={**path, "CC": "mycc"}), packages(host))
    assert (named.compiler, named.compiler_from) == (str(tmp_path / "mycc"), "CC")
    assert toolchain(replace(host, environ={**path, "CC": "gone"}), packages(host)).compiler == ""


def test_ptxas_is_asked_for_its_version(host: Host):
    program = site_of(host) / "triton" / "backends" / "nvidia" / "bin" / "ptxas"
    program.parent.mkdir(parents=True)
    (site_of(host) / "triton" / "__init__.py").write_text("")
    program.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 12.9, V12.9.86'\n")
    program.chmod(0o755)
    found = toolchain(host, packages(host))
    assert (found.ptxas.version, found.ptxas_new.path) == ("12.9", "")
    assert found.triton_source is False


def test_a_folder_that_could_be_made_is_fine_and_is_not_made(tmp_path: Path):
    wanted = tmp_path / "a" / "b"
    assert folder_state(wanted).problem == ""
    assert not wanted.parent.exists()


def test_a_folder_below_a_file_cannot_be_made(tmp_path: Path):
    (tmp_path / "file").write_text("")
    assert folder_state(tmp_path / "file" / "cache").problem == f"{tmp_path / 'file'} is not a folder"


def test_cpu_features_and_quota_are_read(host: Host):
    plant(host, "/proc/cpuinfo", "model name\t: Xeon\nflags\t\t: fpu avx2 avx512f avx512_bf16 sse\n")
    plant(host, "/sys/fs/cgroup/cpu.max", "150000 100000\n")
    found = cpu(host, packages(host))
    assert (found.name, found.features, found.quota) == ("Xeon", ("avx2", "avx512f", "avx512_bf16"), 1.5)


def test_the_containers_memory_limit_counts(host: Host):
    plant(host, "/proc/meminfo", "MemTotal:       65000000 kB\nMemAvailable:   60000000 kB\n")
    assert memory(host).usable == 60000000 * 1024
    plant(host, "/sys/fs/cgroup/memory.max", "4294967296\n")
    assert memory(host).usable == 4 << 30


def plant_peer(host: Host, version: str, *names: str) -> None:
    folder = site_of(host) / "bitsandbytes"
    folder.mkdir()
    for name in ("__init__.py", *(f"libbitsandbytes_{name}.so" for name in names)):
        (folder / name).write_text("")
    add_distribution(site_of(host), "bitsandbytes", version)


@pytest.mark.parametrize(
    ("cuda", "picked"),
    [
        ("12.8", "libbitsandbytes_cuda128.so"),
        ("12.9", "libbitsandbytes_cuda128.so"),
        ("12.0", "libbitsandbytes_cuda121.so"),
        ("14.0", ""),
    ],
)
def test_the_binary_that_bitsandbytes_would_load(host: Host, cuda: str, picked: str):
    plant_peer(host, "0.50.2", "cpu", "cuda118", "cuda121", "cuda128")
    assert peer(host, packages(host), TorchBuild("2.9.0", cuda=cuda, file="x")).pick == picked


def test_its_override_is_followed(host: Host):
    plant_peer(host, "0.50.2", "cpu", "cuda118", "cuda128")
    torch = TorchBuild("2.9.0", cuda="12.8", file="x")
    assert peer(replace(host, environ={"BNB_CUDA_VERSION": "118"}), packages(host), torch).pick.endswith("cuda118.so")
    assert peer(replace(host, environ={"BNB_CUDA_VERSION": "999"}), packages(host), torch).pick == ""


def test_halfbytes_stand_in_is_not_taken_for_the_real_one(host: Host):
    add_distribution(site_of(host), "bitsandbytes", "0.50.2", requires=("halfbyte==0.1.0",))
    found = peer(host, packages(host), TorchBuild())
    assert (found.stand_in, found.version) == (True, "")


def test_the_stand_in_is_known_in_a_source_folder_too(host: Host):
    folder = site_of(host) / "bitsandbytes"
    folder.mkdir()
    (folder / "__init__.py").write_text('"""Stand-in."""\n\nfrom halfbyte.integrations import bitsandbytes\n')
    assert peer(host, packages(host), TorchBuild()).stand_in is True
    (folder / "__init__.py").write_text("import torch\n")
    assert peer(host, packages(host), TorchBuild()).stand_in is False


def test_the_group_of_a_device_file_is_named(host: Host):
    node = plant(host, "/dev/nvidia0")
    plant(host, "/etc/group", f"root:x:99999:\nrender:x:{node.stat().st_gid}:\n")
    assert gpu(host).nodes[0].group == "render"


def test_an_nvidia_smi_that_hangs_is_not_asked_again(host: Host):
    nvidia_tree(host.root, smi="")
    plant(host, "/usr/bin/nvidia-smi")
    asked: list[list[str]] = []

    def run(words: list[str], timeout: float) -> Completed:
        asked.append(words)
        return Completed(None, "nvidia-smi: no answer in 8 s")

    assert gpu(replace(host, run=run)).smi_error == "nvidia-smi: no answer in 8 s"
    assert len(asked) == 1
