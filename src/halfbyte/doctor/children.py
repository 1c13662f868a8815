"""Child processes that compute what the parent must not: a crash or a hang there is a finding, not our end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from halfbyte.doctor.host import Host

__all__ = ["MARK", "Outcome", "Request", "run_probe"]

MARK = "@halfbyte-probe:"
"""Starts each line of a child's output that is meant for the parent; libraries may print what they like around it."""

LAUNCHER = Path(__file__).parent / "probes" / "launcher.py"
SOURCE = Path(__file__).parents[2]
_TAIL = 4000


@dataclass(frozen=True)
class Request:
    """What to run.

    Attributes:
        program: Module of :mod:`halfbyte.doctor.probes`.
        arguments: Passed to its ``run``; JSON values.
        timeout: Seconds until the child is ended.
        without: Suspects taken away: names of variables, ``"cwd"``, ``"user site-packages"``.
        changed: Variables with another value.
    """

    program: str
    arguments: dict[str, Any] = field(default_factory=dict[str, Any])
    timeout: float = 60.0
    without: tuple[str, ...] = ()
    changed: dict[str, str] = field(default_factory=dict[str, str])


@dataclass(frozen=True)
class Outcome:
    """What came of it.

    Attributes:
        events: What the program emitted, in order.
        ended: How it ended, in words; empty for a clean end.
        errors: End of its error stream.
        seconds: Wall-clock time.
    """

    events: tuple[dict[str, Any], ...] = ()
    ended: str = ""
    errors: str = ""
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        """Whether it ended cleanly."""
        return not self.ended

    def event(self, name: str) -> dict[str, Any]:
        """The last event of that name; empty where there is none."""
        return next((event for event in reversed(self.events) if event.get("event") == name), {})

    @property
    def telling_lines(self) -> tuple[str, ...]:
        """A few lines of the error stream: where it crashed, else its end."""
        lines = [line.strip() for line in self.errors.splitlines() if line.strip()]
        fatal = next((at for at, line in enumerate(lines) if line.startswith("Fatal Python error")), None)
        return tuple(lines[-4:] if fatal is None else lines[fatal : fatal + 4])

    @property
    def error_text(self) -> str:
        """The line that says most: the exception's message, else how the child ended."""
        lines = [line for line in self.errors.splitlines() if line.strip()]
        failed = self.event("error").get("text")
        if failed:
            return str(failed)
        fatal = [line for line in lines if line.startswith("Fatal Python error") or "terminate called" in line]
        return (fatal or [self.ended])[-1] if self.ended else ""


def run_probe(host: Host, request: Request) -> Outcome:
    """Start the program in a child with the parent's interpreter and search path, and wait for it."""
    if not host.executable:
        return Outcome(ended="did not start: this Python does not know its own executable")
    payload = json.dumps(
        {
            "program": request.program,
            "arguments": request.arguments,
            "path": _search_path(host, request.without),
            "mark": MARK,
        }
    )
    words = [host.executable, "-X", "faulthandler", "-X", "utf8", str(LAUNCHER), payload]
    start = time.monotonic()
    try:
        child = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=_environment(host, request),
            cwd=Path(host.cwd.anchor) if "cwd" in request.without else host.cwd,
            start_new_session=os.name == "posix",
        )
    except OSError as error:
        return Outcome(ended=f"did not start: {error}")
    output, errors, ended = _finish(child, host.timeout or request.timeout)
    return Outcome(_events(output), ended, errors[-_TAIL:], seconds=time.monotonic() - start)


def _finish(child: subprocess.Popen[bytes], timeout: float) -> tuple[str, str, str]:
    """Output, errors and how the child ended."""
    ended = ""
    try:
        output, errors = child.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        ended = f"no answer in {timeout:g} s"
        _end(child)
        try:
            output, errors = child.communicate(timeout=5)
        except subprocess.TimeoutExpired as error:  # something it started has left its group and holds the pipe
            output, errors = error.stdout or b"", error.stderr or b""
    return output.decode(errors="replace"), errors.decode(errors="replace"), ended or _ending(child.returncode)


def _ending(code: int) -> str:
    if code == 0:
        return ""
    if code < 0:
        return f"killed by {_signal_name(-code)}"
    if code in _WINDOWS_CODES:
        return f"ended by Windows with {_WINDOWS_CODES[code]}"
    return f"exit status {code}"


_WINDOWS_CODES = {
    0xC0000005: "an access violation",
    0xC0000409: "a stack overrun",
    0xC000001D: "an illegal instruction",
}


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _end(child: subprocess.Popen[bytes]) -> None:
    """End the child and what it started (a compiler, say)."""
    if sys.platform == "win32":
        child.kill()
    else:
        try:
            os.killpg(child.pid, signal.SIGKILL)
        except ProcessLookupError:
            child.kill()


def _events(output: str) -> tuple[dict[str, Any], ...]:
    found: list[dict[str, Any]] = []
    for line in output.splitlines():
        if line.startswith(MARK):
            try:
                found.append(json.loads(line[len(MARK) :]))
            except json.JSONDecodeError:  # the child was ended in the middle of a line
                continue
    return tuple(found)


def _environment(host: Host, request: Request) -> dict[str, str]:
    kept = {name: value for name, value in host.environ.items() if name not in request.without}
    if "user site-packages" in request.without:
        kept["PYTHONNOUSERSITE"] = "1"
    return {**kept, **request.changed}


def _search_path(host: Host, without: tuple[str, ...]) -> list[str]:
    dropped: set[str] = set()
    if "PYTHONPATH" in without:
        entries = [part for part in host.environ.get("PYTHONPATH", "").split(os.pathsep) if part]
        dropped |= {os.path.realpath(host.cwd / part) for part in entries}
    if "cwd" in without:
        dropped.add(os.path.realpath(host.cwd))
    kept = [entry for entry in host.search_path if os.path.realpath(entry) not in dropped]
    if "user site-packages" in without:
        local = os.path.realpath(host.home / ".local")
        kept = [entry for entry in kept if not os.path.realpath(entry).startswith(local + os.sep)]
    return kept if str(SOURCE) in kept else [*kept, str(SOURCE)]
