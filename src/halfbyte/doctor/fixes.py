"""Commands for the installer that manages this environment, and for the system's package manager.

Standard library only. What is looked at (variables, folders) comes in as arguments, so every case can be arranged.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, get_args

__all__ = [
    "TOOLS",
    "Tool",
    "after_install",
    "detect_distribution",
    "detect_tool",
    "install_command",
    "quoted",
    "system_command",
]

Tool = Literal["pip", "system-pip", "uv", "uv-project", "conda", "poetry", "notebook"]
"""Who installs packages here.

``system-pip`` is a Python that the operating system manages and that refuses pip (PEP 668); ``uv-project`` a folder
with a ``uv.lock``; ``conda`` an environment whose torch came from conda; ``notebook`` a cell of Colab, Kaggle, Jupyter.
"""

TOOLS: tuple[Tool, ...] = get_args(Tool)

_NOTEBOOK = ("COLAB_RELEASE_TAG", "COLAB_GPU", "KAGGLE_KERNEL_RUN_TYPE", "JPY_PARENT_PID")


def detect_tool(environ: Mapping[str, str], prefix: str | Path, folder: str | Path | None = None) -> Tool:
    """The installer that this environment was made with, and so the one to use on it.

    Args:
        environ: Environment variables.
        prefix: ``sys.prefix``.
        folder: Where the user works, for lock files; None looks at none.

    >>> detect_tool({"COLAB_RELEASE_TAG": "release"}, "/usr")
    'notebook'
    >>> detect_tool({"POETRY_ACTIVE": "1"}, "/home/me/.cache/pypoetry/virtualenvs/x")
    'poetry'
    """
    prefix = Path(prefix)
    if any(environ.get(name) for name in _NOTEBOOK):
        return "notebook"
    if environ.get("POETRY_ACTIVE") or "pypoetry" in prefix.parts:
        return "poetry"
    if _conda_torch(prefix):
        return "conda"
    if environ.get("UV") or re.search(r"(?m)^uv *=", _read(prefix / "pyvenv.cfg")):
        roots = [prefix.parent] if folder is None else [prefix.parent, Path(folder)]
        return "uv-project" if any((root / "uv.lock").is_file() for root in roots) else "uv"
    if not (prefix / "pyvenv.cfg").is_file() and _externally_managed(prefix):
        return "system-pip"
    return "pip"


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _conda_torch(prefix: Path) -> bool:
    records = (name.name for name in (prefix / "conda-meta").glob("*.json"))
    return any(re.match(r"(?:pytorch|libtorch|pytorch-gpu)-\d", record) for record in records)


def _externally_managed(prefix: Path) -> bool:
    return any((prefix / "lib").glob("python3*/EXTERNALLY-MANAGED"))


def quoted(requirement: str) -> str:
    """A requirement as one word of a shell; double quotes, since Windows' own shell knows no others.

    >>> quoted("torch"), quoted("numpy<2")
    ('torch', '"numpy<2"')
    """
    return requirement if re.fullmatch(r"[\w.\-+/]+", requirement) else f'"{requirement}"'


def install_command(
    tool: Tool, requirement: str, *, index_url: str | None = None, upgrade: bool = False, force: bool = False
) -> str:
    """What to type to install one requirement, on one line.

    Args:
        tool: Of :func:`detect_tool`.
        requirement: ``"torch==2.14.*"``.
        index_url: Where the package comes from; None is the tool's default. conda knows no such index, so pip is used.
        upgrade: Replace an older version.
        force: Install again even though the version is there (a broken copy, or another build of it).

    >>> install_command("pip", "torch==2.14.*", index_url="https://download.pytorch.org/whl/cu126", force=True)
    'python -m pip install --force-reinstall "torch==2.14.*" --index-url https://download.pytorch.org/whl/cu126'
    >>> install_command("uv-project", "bitsandbytes", upgrade=True)
    'uv add --upgrade-package bitsandbytes bitsandbytes'
    """
    word, name = quoted(requirement), _name(requirement)
    if tool == "conda" and index_url is None:
        flag = "--force-reinstall " if force else ""
        return f"conda {'update' if upgrade and word == name else 'install'} -c conda-forge {flag}{_conda_word(word)}"
    if tool == "uv-project":
        flags = f"--upgrade-package {name} " if upgrade else f"--reinstall-package {name} " if force else ""
        return f"uv add {flags}{word}" + (f" --index {_source(index_url)}={index_url}" if index_url else "")
    if tool == "poetry" and not force:
        return _poetry(word, name, index_url, upgrade)
    start = {
        "notebook": "%pip install",
        "uv": "uv pip install",
        "poetry": "poetry run python -m pip install",
        "system-pip": "python3 -m venv .venv && . .venv/bin/activate && python -m pip install",
    }.get(tool, "python -m pip install")
    flags = ("--upgrade " if upgrade else "") + (
        ("--reinstall " if tool == "uv" else "--force-reinstall ") if force else ""
    )
    return f"{start} {flags}{word}" + (f" --index-url {index_url}" if index_url else "")


def _name(requirement: str) -> str:
    return re.split(r"[^\w.\-]", requirement)[0]


def _source(index_url: str) -> str:
    """Name for an index in a project's file; with a name, the tool takes only that package from there."""
    return "pytorch-" + index_url.rstrip("/").rsplit("/", 1)[-1]


def _conda_word(word: str) -> str:
    # On conda-forge the package is called pytorch; pytorch-gpu asks for a build with CUDA.
    return re.sub(r'^("?)torch\b', r"\1pytorch-gpu", word)


def _poetry(word: str, name: str, index_url: str | None, upgrade: bool) -> str:
    if index_url is None:
        return f"poetry add {name}@latest" if upgrade and word == name else f"poetry add {word}"
    source = _source(index_url)
    return f"poetry source add --priority explicit {source} {index_url} && poetry add --source {source} {word}"


def after_install(tool: Tool) -> str:
    """What has to follow an installation for it to count; empty where nothing has to.

    >>> after_install("pip")
    ''
    """
    return "Restart the runtime (kernel) and run the cells again." if tool == "notebook" else ""


_SYSTEM: dict[str, tuple[str, dict[str, str]]] = {
    "debian": ("sudo apt-get install -y", {"compiler": "build-essential", "headers": "python{python}-dev"}),
    "fedora": ("sudo dnf install -y", {"compiler": "gcc", "headers": "python3-devel"}),
    "suse": ("sudo zypper install -y", {"compiler": "gcc", "headers": "python3-devel"}),
    "arch": ("sudo pacman -S --needed", {"compiler": "gcc", "headers": "python"}),
    "alpine": ("sudo apk add", {"compiler": "build-base", "headers": "python3-dev"}),
}


def detect_distribution(os_release: str) -> str:
    """Family of a Linux distribution from the text of ``/etc/os-release``; empty for an unknown one.

    >>> detect_distribution('ID=linuxmint\\nID_LIKE="ubuntu debian"'), detect_distribution("ID=nixos")
    ('debian', '')
    """
    words = " ".join(re.findall(r'(?m)^ID(?:_LIKE)?="?([^"\n]*)', os_release)).split()
    families = {"ubuntu": "debian", "rhel": "fedora", "centos": "fedora", "opensuse": "suse", "sles": "suse"}
    return next((f for f in (families.get(word, word) for word in words) if f in _SYSTEM), "")


def system_command(what: Literal["compiler", "headers"], distribution: str, python: str = "3") -> str | None:
    """What an administrator types for a C compiler or Python's headers; None for an unknown distribution.

    Args:
        what: ``compiler`` or ``headers``.
        distribution: Of :func:`detect_distribution`.
        python: Version of the Python whose headers are needed, ``"3.12"``.

    >>> system_command("headers", "debian", "3.12")
    'sudo apt-get install -y python3.12-dev'
    """
    if distribution not in _SYSTEM:
        return None
    start, packages = _SYSTEM[distribution]
    return f"{start} {packages[what].format(python=python)}"
