"""The installer is recognised from variables and folders, and every command is in its words."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from halfbyte.doctor.fixes import (
    TOOLS,
    after_install,
    detect_distribution,
    detect_tool,
    install_command,
    quoted,
    system_command,
)

INDEX = "https://download.pytorch.org/whl/cu126"


def venv(folder: Path, text: str = "home = /usr/bin\n") -> Path:
    prefix = folder / ".venv"
    prefix.mkdir()
    (prefix / "pyvenv.cfg").write_text(text, encoding="utf-8")
    return prefix


@pytest.mark.parametrize("name", ["COLAB_RELEASE_TAG", "COLAB_GPU", "KAGGLE_KERNEL_RUN_TYPE", "JPY_PARENT_PID"])
def test_a_notebook_is_known_by_its_variable(tmp_path: Path, name: str):
    assert detect_tool({name: "1"}, venv(tmp_path)) == "notebook"


def test_a_plain_virtual_environment_is_pips(tmp_path: Path):
    assert detect_tool({}, venv(tmp_path)) == "pip"


def test_a_virtual_environment_of_uv_is_uvs(tmp_path: Path):
    assert detect_tool({}, venv(tmp_path, "home = /usr/bin\nuv = 0.8.3\n")) == "uv"


def test_uv_run_is_known_by_its_variable(tmp_path: Path):
    assert detect_tool({"UV": "/usr/bin/uv"}, venv(tmp_path)) == "uv"


@pytest.mark.parametrize("place", ["beside", "folder"])
def test_a_lock_file_makes_it_a_project_of_uv(tmp_path: Path, place: str):
    prefix = venv(tmp_path, "uv = 0.8.3\n")
    work = tmp_path / "work"
    work.mkdir()
    (tmp_path if place == "beside" else work).joinpath("uv.lock").touch()
    assert detect_tool({}, prefix, work) == "uv-project"


def test_poetry_is_known_by_its_variable_or_folder(tmp_path: Path):
    assert detect_tool({"POETRY_ACTIVE": "1"}, venv(tmp_path)) == "poetry"
    assert detect_tool({}, tmp_path / "pypoetry" / "virtualenvs" / "x-py3.12") == "poetry"


@pytest.mark.parametrize("name", ["pytorch", "libtorch", "pytorch-gpu"])
def test_conda_manages_an_environment_whose_torch_it_installed(tmp_path: Path, name: str):
    (tmp_path / "conda-meta").mkdir()
    (tmp_path / "conda-meta" / f"{name}-2.11.0-cuda130_0.json").touch()
    assert detect_tool({}, tmp_path) == "conda"


def test_a_conda_environment_with_torch_from_pip_is_pips(tmp_path: Path):
    (tmp_path / "conda-meta").mkdir()
    (tmp_path / "conda-meta" / "pytorch-lightning-2.4.0-py_0.json").touch()
    assert detect_tool({}, tmp_path) == "pip"


def test_a_python_of_the_system_refuses_pip(tmp_path: Path):
    library = tmp_path / "lib" / "python3.12"
    library.mkdir(parents=True)
    (library / "EXTERNALLY-MANAGED").touch()
    assert detect_tool({}, tmp_path) == "system-pip"


def test_a_missing_folder_is_pips(tmp_path: Path):
    assert detect_tool({}, tmp_path / "nowhere") == "pip"


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("index", [None, INDEX])
@pytest.mark.parametrize("upgrade", [False, True])
@pytest.mark.parametrize("force", [False, True])
def test_a_command_is_one_line_that_a_shell_can_split(tool, index: str | None, upgrade: bool, force: bool):
    command = install_command(tool, "torch==2.14.*", index_url=index, upgrade=upgrade, force=force)
    words = shlex.split(command)
    assert "\n" not in command
    assert any("==2.14.*" in word for word in words)
    assert index is None or any(word.endswith(index) for word in words)


@pytest.mark.parametrize(
    ("tool", "command"),
    [
        ("pip", f'python -m pip install --force-reinstall "torch==2.14.*" --index-url {INDEX}'),
        ("uv", f'uv pip install --reinstall "torch==2.14.*" --index-url {INDEX}'),
        ("uv-project", f'uv add --reinstall-package torch "torch==2.14.*" --index pytorch-cu126={INDEX}'),
        ("conda", f'python -m pip install --force-reinstall "torch==2.14.*" --index-url {INDEX}'),
        ("poetry", f'poetry run python -m pip install --force-reinstall "torch==2.14.*" --index-url {INDEX}'),
        ("notebook", f'%pip install --force-reinstall "torch==2.14.*" --index-url {INDEX}'),
        (
            "system-pip",
            "python3 -m venv .venv && . .venv/bin/activate && "
            f'python -m pip install --force-reinstall "torch==2.14.*" --index-url {INDEX}',
        ),
    ],
)
def test_a_build_of_torch_in_every_installers_words(tool, command: str):
    assert install_command(tool, "torch==2.14.*", index_url=INDEX, force=True) == command


@pytest.mark.parametrize(
    ("tool", "command"),
    [
        ("pip", "python -m pip install --upgrade bitsandbytes"),
        ("uv", "uv pip install --upgrade bitsandbytes"),
        ("uv-project", "uv add --upgrade-package bitsandbytes bitsandbytes"),
        ("conda", "conda update -c conda-forge bitsandbytes"),
        ("poetry", "poetry add bitsandbytes@latest"),
        ("notebook", "%pip install --upgrade bitsandbytes"),
    ],
)
def test_an_upgrade_in_every_installers_words(tool, command: str):
    assert install_command(tool, "bitsandbytes", upgrade=True) == command


def test_conda_calls_torch_by_its_own_name():
    assert install_command("conda", "torch") == "conda install -c conda-forge pytorch-gpu"
    assert install_command("conda", "torchao") == "conda install -c conda-forge torchao"


def test_poetry_gets_a_source_for_an_index():
    assert install_command("poetry", "torch", index_url=INDEX) == (
        f"poetry source add --priority explicit pytorch-cu126 {INDEX} && poetry add --source pytorch-cu126 torch"
    )


def test_only_notebooks_need_a_restart():
    assert [tool for tool in TOOLS if after_install(tool)] == ["notebook"]


@pytest.mark.parametrize("text", ["numpy<2", "torch==2.14.*", "peft>=0.14", "uvicorn[standard]"])
def test_what_a_shell_would_read_otherwise_is_quoted(text: str):
    assert quoted(text) == f'"{text}"'


@pytest.mark.parametrize(
    ("text", "family"),
    [
        ("ID=debian\n", "debian"),
        ('NAME="Ubuntu"\nID=ubuntu\nID_LIKE=debian\n', "debian"),
        ('ID="rocky"\nID_LIKE="rhel centos fedora"\n', "fedora"),
        ('ID="opensuse-tumbleweed"\nID_LIKE="opensuse suse"\n', "suse"),
        ("ID=alpine\n", "alpine"),
        ("ID=arch\n", "arch"),
        ("ID=nixos\n", ""),
        ("", ""),
    ],
)
def test_a_distribution_is_known_by_its_release_file(text: str, family: str):
    assert detect_distribution(text) == family


@pytest.mark.parametrize("family", ["debian", "fedora", "suse", "arch", "alpine"])
@pytest.mark.parametrize("what", ["compiler", "headers"])
def test_every_family_has_a_compiler_and_headers(family: str, what):
    assert system_command(what, family, "3.12").startswith("sudo ")


def test_an_unknown_distribution_gets_no_command():
    assert system_command("compiler", "") is None
