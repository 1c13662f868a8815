"""End to end: the doctor inside environments that are really broken says what is broken, and what to type."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from tests.support.environments import (
    CUDA_STUB_VERSION,
    SOURCE,
    Environment,
    add_distribution,
    make_environment,
    nvidia_tree,
)

CUDA_STUB = "from torch.version import __version__\n"


@pytest.fixture(scope="module")
def with_torch(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    return make_environment(tmp_path_factory.mktemp("real"), real_torch=True)


@pytest.fixture(scope="module")
def with_cuda_stub(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    made = make_environment(tmp_path_factory.mktemp("cuda"), torch=CUDA_STUB, version=CUDA_STUB_VERSION)
    add_distribution(made.site, "torch", "2.13.0+cu130", requires=('triton==3.7.0; platform_system == "Linux"',))
    add_distribution(made.site, "triton", "3.7.0")
    nvidia_tree(made.folder / "root")
    return made


def test_a_virtual_environment_without_torch(tmp_path: Path):
    run = make_environment(tmp_path).run()
    assert run.code == 2
    assert run.json["verdict"].startswith("Broken at: torch is not installed for this Python. Type: ")
    assert run.check("TORCH105")["status"] == "blocked"
    assert "install torch" in run.check("PY102")["fixes"][0]["command"]


def test_a_torch_that_raises(tmp_path: Path):
    run = make_environment(tmp_path, torch="raise RuntimeError('the moon is in the wrong phase')").run(
        "--only", "TORCH"
    )
    check = run.check("TORCH105")
    assert (run.code, check["status"]) == (2, "fail")
    assert "RuntimeError: the moon is in the wrong phase" in check["evidence"]


def test_a_torch_that_crashes_the_process(tmp_path: Path):
    stub = "import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)"
    run = make_environment(tmp_path, torch=stub).run("--only", ["TORCH", "NUM"][0])
    check = run.check("TORCH105")
    assert run.code == 2
    assert "killed by SIGSEGV" in check["summary"]
    assert any("torch/__init__.py" in line for line in check["evidence"])


def test_a_torch_that_hangs(tmp_path: Path):
    run = make_environment(tmp_path, torch="import time\ntime.sleep(3600)").run(
        "--only", "TORCH105", "--timeout", "1.5"
    )
    assert run.code == 2
    assert "no answer in 1.5 s" in run.check("TORCH105")["summary"]


@pytest.mark.skipif(torch.version.cuda is not None, reason="the installed torch is built for CUDA")
def test_a_cpu_only_torch_beside_a_gpu(with_torch: Environment):
    root = nvidia_tree(with_torch.folder / "tree", driver="550.54.14")
    run = with_torch.run("--root", str(root))
    check = run.check("TORCH101")
    assert run.code == 2
    assert check["classes"] == ["A1"]
    assert "whl/cu126" in check["fixes"][0]["command"]
    assert run.check("NUM105")["status"] == "pass"
    assert "(CPU verified)" in run.json["verdict"]


def test_a_working_cpu_machine_is_verified(with_torch: Environment):
    run = with_torch.run(*["--only", "PY", "--only", "TORCH", "--only", "NUM", "--only", "SPEED101"])
    assert run.code in {0, 1}
    assert "CPU verified" in run.json["verdict"]
    numbers = [each for check in run.json["checks"] for each in check["measurements"]]
    assert len(numbers) >= 20
    assert all(each["ok"] for each in numbers)


def test_a_triton_cache_that_cannot_be_written(with_cuda_stub: Environment):
    root = str(with_cuda_stub.folder / "root")
    run = with_cuda_stub.run("--quick", "--root", root, TRITON_CACHE_DIR="/proc/triton")
    check = run.check("TRITON107")
    assert (run.code, check["status"], check["classes"]) == (2, "fail", ["D7"])
    assert check["fixes"][0]["command"].startswith("export TRITON_CACHE_DIR=")
    assert run.check("TRITON108")["status"] == "blocked"


def test_no_c_compiler_on_path(with_cuda_stub: Environment, tmp_path: Path):
    (tmp_path / "bin").mkdir()
    run = with_cuda_stub.run("--quick", "--root", str(with_cuda_stub.folder / "root"), PATH=str(tmp_path / "bin"))
    check = run.check("TRITON103")
    assert (run.code, check["status"], check["classes"]) == (2, "fail", ["D1"])


def test_a_compiler_on_path_passes(with_cuda_stub: Environment, tmp_path: Path):
    program = tmp_path / "gcc"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    run = with_cuda_stub.run("--quick", "--root", str(with_cuda_stub.folder / "root"), PATH=str(tmp_path))
    assert run.check("TRITON103")["status"] == "pass"


def test_a_driver_too_old_for_torch(with_cuda_stub: Environment):
    root = nvidia_tree(with_cuda_stub.folder / "old", driver="550.54.14", smi="NVIDIA A10G, 550.54.14, 23028, 0, 8.6")
    run = with_cuda_stub.run("--quick", "--root", str(root))
    assert run.code == 2
    assert run.check("TORCH102")["classes"] == ["A2"]
    assert run.json["verdict"].startswith("Broken at: driver 550.54.14 is too old for torch 2.13.0+cu130")
    assert "whl/cu126" in run.json["verdict"]


def test_a_gpu_hidden_from_a_cuda_torch_is_never_exit_code_0(with_cuda_stub: Environment):
    root = str(with_cuda_stub.folder / "root")
    run = with_cuda_stub.run("--quick", "--root", root, CUDA_VISIBLE_DEVICES="-1")
    assert run.code >= 1
    assert run.check("ENV104")["fixes"][0]["command"] == "unset CUDA_VISIBLE_DEVICES"


def test_a_local_file_that_shadows_torch(with_torch: Environment):
    with_torch.work.mkdir(exist_ok=True)
    local = with_torch.work / "torch.py"
    local.write_text("message = 'my torch'\n")
    try:
        run = with_torch.run("--only", "TORCH105", "--only", "ENV101")
    finally:
        local.unlink()
    assert run.code == 2
    assert run.check("ENV101")["classes"] == ["C12"]
    check = run.check("TORCH105")
    assert "a file in this folder" in check["summary"]
    assert check["fixes"][0]["command"] == "cd ~"


def test_a_library_path_that_breaks_the_import_is_found_by_taking_it_away(with_torch: Environment, tmp_path: Path):
    folder = tmp_path / "old-libraries"
    folder.mkdir()
    # Any other shared library will do: the loader takes it, and the symbols that torch wants are not in it. torch's own
    # libraries would not do: some wheels name their folder in a way that comes before the path.
    (folder / "libstdc++.so.6").write_bytes(some_shared_library().read_bytes())
    run = with_torch.run("--only", "TORCH105", LD_LIBRARY_PATH=f"/opt:{folder}")
    check = run.check("TORCH105")
    assert (run.code, check["status"]) == (2, "fail")
    assert "LD_LIBRARY_PATH" in check["summary"]
    assert any(str(folder) in line for line in check["evidence"])
    assert check["fixes"][0]["command"] == "export LD_LIBRARY_PATH=/opt"


def some_shared_library() -> Path:
    return next((Path(json.__file__).parents[1] / "lib-dynload").glob("*.so"))


BINARIES = ("cpu", "cuda118", "cuda121", "cuda124", "cuda126", "cuda128", "cuda130", "cuda132", "rocm64", "rocm715")


def add_bitsandbytes(environment: Environment, version: str, binaries: tuple[str, ...]) -> None:
    """The files of a real wheel that the doctor reads: package, binaries, metadata."""
    package = environment.site / "bitsandbytes"
    package.mkdir()
    package.joinpath("__init__.py").write_text(f"__version__ = '{version}'\n")
    for name in binaries:
        package.joinpath(f"libbitsandbytes_{name}.so").write_bytes(b"\x7fELF")
    add_distribution(environment.site, "bitsandbytes", version, requires=("torch<3,>=2.4", "numpy>=1.17"))


def test_the_real_bitsandbytes_beside_us_and_the_binary_it_picks(tmp_path: Path):
    made = make_environment(tmp_path, torch=CUDA_STUB, version=CUDA_STUB_VERSION)
    add_bitsandbytes(made, "0.50.2", BINARIES)
    check = made.run("--quick", "--only", "HF104").check("HF104")
    assert check["status"] == "pass"
    assert "libbitsandbytes_cuda130.so" in " ".join(check["evidence"])
    assert "CUDA 11.8, 12.1, 12.4, 12.6, 12.8, 13.0, 13.2; ROCm 6.4, 7.15" in " ".join(check["evidence"])


def test_a_bitsandbytes_without_a_binary_for_this_torch_has_two_ways_out(tmp_path: Path):
    made = make_environment(tmp_path, torch=CUDA_STUB, version=CUDA_STUB_VERSION)
    add_bitsandbytes(made, "0.46.0", ("cpu", "cuda126", "cuda128"))
    run = made.run("--quick", "--only", "HF104")
    check = run.check("HF104")
    commands = [fix["command"] for fix in check["fixes"]]
    assert (run.code, check["classes"][0]) == (1, "C2")
    assert any("bitsandbytes>=0.48.0" in command for command in commands)
    assert any("torch==" in command and "whl/cu12" in command for command in commands)


def test_a_cpu_torch_takes_the_cpu_binary(tmp_path: Path):
    made = make_environment(tmp_path, torch="", version="__version__ = '2.13.0+cpu'\ncuda = None\n")
    add_bitsandbytes(made, "0.50.2", BINARIES)
    check = made.run("--quick", "--only", "HF104").check("HF104")
    assert "libbitsandbytes_cpu.so" in " ".join(check["evidence"])


def test_it_runs_without_numpy_rich_numba_and_packaging(tmp_path: Path):
    made = make_environment(tmp_path, torch="raise ImportError('libc10.so: cannot open shared object file')")
    for entry in made.site.iterdir():
        if entry.name.startswith(("numpy", "rich", "numba", "packaging", "psutil", "transformers")):
            entry.unlink()
    run = made.run()
    assert run.code == 2
    assert run.check("PY104")["status"] == "fail"
    assert run.check("TORCH105")["classes"] == ["C5"]
    assert not [each for each in run.json["checks"] if each["status"] == "crash"]
    text = made.command("-m", "halfbyte")
    assert text.stdout.rstrip().splitlines()[-1].startswith("Broken at: ")


def test_it_runs_with_a_home_that_cannot_be_written(tmp_path: Path):
    made = make_environment(tmp_path, torch="raise ImportError('x')")
    run = made.run("--quick", HOME="/proc/nowhere")
    assert run.check("CPU103")["classes"] == ["D14"]
    assert not [each for each in run.json["checks"] if each["status"] == "crash"]


@pytest.mark.peer
def test_the_real_bitsandbytes_itself(tmp_path: Path):
    peer = Environment(tmp_path, os.environ["HALFBYTE_PEER_PYTHON"], {"PYTHONPATH": str(SOURCE)})
    check = peer.run("--quick", "--only", "HF104").check("HF104")
    assert check["status"] == "pass"
    assert "libbitsandbytes_cpu.so" in " ".join(check["evidence"])
    assert "CUDA 11.8, 12.1, 12.4, 12.6, 12.8, 13.0, 13.2" in " ".join(check["evidence"])
