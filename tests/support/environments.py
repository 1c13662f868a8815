"""Real Python environments that are broken in one chosen way, and the doctor run inside them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import venv
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
from jsonschema import Draft202012Validator

from halfbyte.doctor.report.json import schema

SOURCE = Path(__file__).parents[2] / "src"
REAL_PACKAGES = Path(numpy.__file__).parents[1]
SECRET = "s3cr3t-Value-42"
USER = "wilhelmina"
CUDA_STUB_VERSION = "__version__ = '2.13.0+cu130'\ncuda: str = '13.0'\nhip = None\n"
SMI_LINE = "NVIDIA H100 80GB HBM3, 580.95.05, 81559, 0, 9.0"


@dataclass(frozen=True)
class Run:
    """What the doctor said."""

    code: int
    output: str
    errors: str

    @property
    def json(self) -> dict[str, Any]:
        """The JSON report, checked against its schema."""
        report = json.loads(self.output)
        Draft202012Validator(schema()).validate(report)
        return report

    def check(self, code: str) -> dict[str, Any]:
        return next(each for each in self.json["checks"] if each["code"] == code)


@dataclass
class Environment:
    """A virtual environment with its own home folder.

    Attributes:
        folder: Everything of it lies below.
        python: Its interpreter.
        variables: Added to a small, clean environment.
    """

    folder: Path
    python: str
    variables: dict[str, str] = field(default_factory=dict)

    @property
    def home(self) -> Path:
        return self.folder / "home" / USER

    @property
    def work(self) -> Path:
        return self.folder / "work"

    @property
    def site(self) -> Path:
        return next((self.folder / "venv").glob("lib/python*/site-packages"))

    def run(self, *options: str, **variables: str) -> Run:
        """Run the doctor as JSON; no report may hold anything private."""
        done = self.command("-m", "halfbyte", "--json", *options, **variables)
        run = Run(done.returncode, done.stdout, done.stderr)
        assert not private(run.output, self), private(run.output, self)
        return run

    def command(self, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
        self.work.mkdir(exist_ok=True)
        self.home.mkdir(parents=True, exist_ok=True)
        environ = {
            "PATH": os.environ["PATH"],
            "HOME": str(self.home),
            "USER": USER,
            "LOGNAME": USER,
            "HF_TOKEN": SECRET,
            "SOME_API_KEY": SECRET + "2",
            "OMP_NUM_THREADS": "1",
            **self.variables,
            **variables,
        }
        return subprocess.run(
            [self.python, *words], cwd=self.work, env=environ, capture_output=True, text=True, timeout=240, check=False
        )


def private(text: str, environment: Environment) -> list[str]:
    """What a report must not hold and does."""
    uuids = re.findall(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}", text)
    found = [each for each in (SECRET, USER, str(environment.home)) if each in text]
    return found + uuids


def make_environment(
    folder: Path, *, torch: str | None = None, version: str = "", real_torch: bool = False
) -> Environment:
    """A virtual environment with halfbyte's source and the packages of this one, but for torch.

    Args:
        folder: Where to make it.
        torch: Source of a stub ``torch/__init__.py``; None for no torch.
        version: Source of its ``version.py``.
        real_torch: Take this interpreter's torch instead.
    """
    venv.create(folder / "venv", with_pip=False, symlinks=True)
    made = Environment(folder, str(folder / "venv" / "bin" / "python"))
    made.site.joinpath("halfbyte.pth").write_text(f"{SOURCE}\n")
    for entry in REAL_PACKAGES.iterdir():
        ours = re.match(r"(torch|triton|bitsandbytes|halfbyte|__pycache__|.*\.pth$)", entry.name)
        if not ours or (real_torch and re.match(r"torch(-|gen|$)", entry.name)):
            made.site.joinpath(entry.name).symlink_to(entry)
    if torch is not None:
        package = made.site / "torch"
        package.mkdir()
        package.joinpath("__init__.py").write_text(torch)
        package.joinpath("version.py").write_text(version)
    return made


def add_distribution(
    site: Path, name: str, version: str, *, requires: tuple[str, ...] = (), entry_points: str = ""
) -> None:
    """The metadata of a distribution, as an installer would leave it."""
    info = site / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    lines = [
        "Metadata-Version: 2.1",
        f"Name: {name}",
        f"Version: {version}",
        *(f"Requires-Dist: {each}" for each in requires),
    ]
    info.joinpath("METADATA").write_text("\n".join(lines) + "\n")
    info.joinpath("INSTALLER").write_text("pip\n")
    info.joinpath("RECORD").write_text("")
    if entry_points:
        info.joinpath("entry_points.txt").write_text(entry_points)


def nvidia_tree(root: Path, *, driver: str = "580.95.05", smi: str = SMI_LINE) -> Path:
    """A file tree as an NVIDIA driver shows itself in."""
    proc = root / "proc" / "driver" / "nvidia"
    proc.mkdir(parents=True)
    proc.joinpath("version").write_text(
        f"NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  {driver}  Release Build\nGCC version: gcc 13\n"
    )
    device = root / "dev"
    device.mkdir()
    for name in ("nvidia0", "nvidiactl", "nvidia-uvm"):
        device.joinpath(name).write_text("")
    programs = root / "usr" / "bin"
    programs.mkdir(parents=True)
    if smi:
        program = programs / "nvidia-smi"
        program.write_text(f"#!/bin/sh\necho '{smi}'\n")
        program.chmod(0o755)
    return root
