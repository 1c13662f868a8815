"""The machine as facts see it: file tree, environment, interpreter and two ways to run things, all replaceable."""

from __future__ import annotations

import getpass
import os
import platform
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from halfbyte.doctor.children import Outcome, Request, run_probe

__all__ = ["Completed", "Host", "run_command"]


@dataclass(frozen=True)
class Completed:
    """What a command did: ``code`` is its exit status, None where it did not start or did not end in time."""

    code: int | None
    output: str


def run_command(words: Sequence[str], timeout: float = 10.0) -> Completed:
    """Run a program without a shell; its output and errors together."""
    try:
        done = subprocess.run(
            list(words), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=timeout, check=False
        )
    except subprocess.TimeoutExpired:
        return Completed(None, f"{words[0]}: no answer in {timeout:g} s")
    except OSError as error:
        return Completed(None, str(error))
    return Completed(done.returncode, done.stdout.decode(errors="replace"))


@dataclass(frozen=True)
class Host:
    """Everything that facts may look at.

    Attributes:
        root: Where the system's own files (/proc, /sys, /dev, /etc, /usr) are looked up.
        environ: Environment variables.
        system: ``"Linux"``, ``"Windows"``, ``"Darwin"``.
        machine: ``"x86_64"``, ``"aarch64"``, ...
        python: Version of the interpreter, three numbers.
        executable: The interpreter.
        prefix: Root of its environment; equal to ``base_prefix`` outside a virtual one.
        base_prefix: Root of the installation it was made from.
        include: Folder that should hold ``Python.h``.
        search_path: Folders that imports are looked up in, in order.
        cwd: Working directory.
        home: The user's own folder.
        names: User and host names, which no report may contain.
        timeout: Seconds that one child process may take; 0 leaves it to the probe.
        full: Whether timing is wanted too.
        steps: Steps of the proofs that some check looks at; None for all.
        run: Runs a program.
        probe: Runs one of :mod:`halfbyte.doctor.probes` in a child process.
    """

    root: Path = Path("/")
    environ: Mapping[str, str] = field(default_factory=dict[str, str])
    system: str = "Linux"
    machine: str = "x86_64"
    python: tuple[int, int, int] = (3, 11, 7)
    executable: str = "/usr/bin/python3"
    prefix: str = "/usr"
    base_prefix: str = "/usr"
    include: str = "/usr/include/python3.11"
    search_path: tuple[str, ...] = ()
    cwd: Path = Path("/")
    home: Path = Path("/home/someone")
    names: tuple[str, ...] = ()
    timeout: float = 0.0
    full: bool = False
    steps: frozenset[str] | None = None
    run: Callable[[Sequence[str], float], Completed] = run_command
    probe: Callable[[Host, Request], Outcome] = lambda host, request: run_probe(host, request)

    @classmethod
    def here(cls, **chosen: Any) -> Host:
        """This machine and process; ``chosen`` replaces attributes."""
        cwd = _cwd()
        found = cls(
            environ=dict(os.environ),
            system=platform.system(),
            machine=platform.machine(),
            python=(sys.version_info.major, sys.version_info.minor, sys.version_info.micro),
            executable=sys.executable or "",
            prefix=sys.prefix,
            base_prefix=sys.base_prefix,
            include=sysconfig.get_paths()["include"],
            search_path=tuple(entry or str(cwd) for entry in sys.path),
            cwd=cwd,
            home=Path(os.path.expanduser("~")),  # noqa: PTH111  Path.home() raises where there is none
            names=_names(),
        )
        return replace(found, **chosen)

    def path(self, absolute: str) -> Path:
        """A system file or folder, under ``root``."""
        return self.root / absolute.lstrip("/\\")

    def read(self, absolute: str) -> str:
        """Text of a system file; empty where it cannot be read."""
        try:
            return self.path(absolute).read_text(errors="replace")
        except OSError:
            return ""

    @property
    def windows(self) -> bool:
        """Whether paths, loaders and devices are those of Windows."""
        return self.system == "Windows"


def _cwd() -> Path:
    try:
        return Path.cwd()
    except OSError:  # the folder was deleted under us
        return Path(os.path.expanduser("~"))  # noqa: PTH111


def _names() -> tuple[str, ...]:
    found = [platform.node()]
    try:
        found.append(getpass.getuser())
    except (OSError, KeyError, ImportError):
        found.extend(os.environ.get(name, "") for name in ("USER", "LOGNAME", "USERNAME"))
    return tuple(dict.fromkeys(name for name in found if name))
