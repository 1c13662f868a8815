"""What every form of the report is made from: findings with private text taken out, the verdict and the exit code."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from halfbyte._version import __version__
from halfbyte.doctor.facts.cpu import Cpu
from halfbyte.doctor.facts.gpu import Gpu
from halfbyte.doctor.facts.loader import Environment
from halfbyte.doctor.facts.packages import Packages
from halfbyte.doctor.facts.torch_build import TorchBuild
from halfbyte.doctor.host import Host
from halfbyte.doctor.model import Layer, Level, Result, Status
from halfbyte.doctor.privacy import Redactor
from halfbyte.doctor.run import Facts, Finding

__all__ = ["BROKEN", "DOCTOR_FAILED", "WORKS", "WORKS_WITH_LIMITS", "Report", "compose"]

WORKS, WORKS_WITH_LIMITS, BROKEN, DOCTOR_FAILED = 0, 1, 2, 3
"""Exit codes."""

T = TypeVar("T")

LISTED = (
    "torch", "triton", "triton-windows", "numba", "numpy", "safetensors", "transformers", "accelerate", "peft",
    "diffusers", "bitsandbytes",
)  # fmt: skip


@dataclass(frozen=True)
class Report:
    """A finished report.

    Attributes:
        level: How deep it went.
        findings: In the order of the layers.
        machine: Name and text of what was looked at.
        environment: Allow-listed variables.
        verdict: One line.
        exit_code: 0 works, 1 works with limits, 2 broken, 3 the doctor itself failed.
        seconds: Time it took.
    """

    level: Level
    findings: tuple[Finding, ...]
    machine: tuple[tuple[str, str], ...]
    environment: tuple[tuple[str, str], ...]
    verdict: str
    exit_code: int
    seconds: float

    def of(self, layer: Layer) -> tuple[Finding, ...]:
        """Findings of one layer."""
        return tuple(finding for finding in self.findings if finding.check.layer is layer)


def compose(facts: Facts, findings: Sequence[Finding], level: Level, seconds: float) -> Report:
    """A report from what was found; nothing private passes."""
    redactor = Redactor.of(facts.host)
    shown = tuple(
        replace(finding, result=redactor.result(_spoken_here(finding.result, facts.host)))
        for finding in findings
        if finding.asked or finding.result.status in {Status.FAIL, Status.CRASH}
    )
    verdict, code = _verdict(shown, level)
    variables: Environment = _or(lambda: facts["environment"], Environment())
    return Report(
        level,
        shown,
        tuple((name, redactor.text(text)) for name, text in _machine(facts)),
        tuple((name, redactor.text(value)) for name, value in variables.shown.items()),
        verdict,
        code,
        seconds,
    )


def _spoken_here(result: Result, host: Host) -> Result:
    """A result whose commands are in the words of the system's own shell."""
    if not host.windows:
        return result
    fixes = tuple(
        replace(fix, command=re.sub(r"^unset (\w+)", r"set \1=", re.sub(r"^export ", "set ", fix.command)))
        for fix in result.fixes
    )
    return replace(result, fixes=fixes)


def _or(call: Callable[[], Any], default: T) -> T:
    """A fact, or a stand-in where gathering it failed: the check that wants it has reported the crash."""
    try:
        return call()
    except Exception:
        return default


def _machine(facts: Facts) -> list[tuple[str, str]]:
    host = facts.host
    gpu: Gpu = _or(lambda: facts["gpu"], Gpu())
    torch: TorchBuild = _or(lambda: facts["torch_build"], TorchBuild())
    packages: Packages = _or(lambda: facts["packages"], Packages())
    cpu: Cpu = _or(lambda: facts["cpu"], Cpu())
    rows = [
        ("halfbyte", __version__),
        (
            "system",
            f"{host.system} {host.machine}"
            + (f", {gpu.container}" if gpu.container else "")
            + (", WSL" if gpu.wsl else ""),
        ),
        ("python", ".".join(map(str, host.python))),
        ("torch", f"{torch.version} ({torch.kind})" if torch.file else "not installed"),
        ("cpu", f"{cpu.name or host.machine}, {cpu.usable} cores"),
        ("gpu", gpu.names if gpu.nvidia or gpu.amd else "none"),
    ]
    if gpu.driver:
        rows.append(("driver", gpu.driver))
    return rows + [(name, version) for name in LISTED if name != "torch" and (version := packages.version(name))]


def _verdict(findings: Sequence[Finding], level: Level) -> tuple[str, int]:
    by_status = {status: [each for each in findings if each.result.status is status] for status in Status}
    verified = _verified(findings)
    if by_status[Status.FAIL]:
        first = by_status[Status.FAIL][0].result
        aside = f" ({verified})" if verified else ""
        return f"Broken at: {first.summary}{aside}.{_command(by_status[Status.FAIL][0])}", BROKEN
    if by_status[Status.CRASH]:
        first = by_status[Status.CRASH][0]
        return (
            f"The doctor itself failed in {first.check.code}: {first.result.summary}. Please report it.",
            DOCTOR_FAILED,
        )
    if by_status[Status.WARN]:
        first, count = by_status[Status.WARN][0], len(by_status[Status.WARN])
        works = f"halfbyte works here ({verified})" if verified else "Nothing is broken"
        limits = f"with {count} limits; the first" if count > 1 else "with one limit"
        return f"{works}, {limits}: {first.result.summary}.{_command(first)}", WORKS_WITH_LIMITS
    passed = _count(len(by_status[Status.PASS]), "check")
    limits = sum(each.limit is not None for finding in findings for each in finding.result.measurements)
    if verified:
        return f"halfbyte works here: {verified} ({passed}, {_count(limits, 'number')} within tolerance)", WORKS
    if level is Level.QUICK:
        return f"Nothing wrong found in {passed}, read from files. For proof, type: halfbyte doctor", WORKS
    return f"Nothing wrong found in {passed}", WORKS


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _command(finding: Finding) -> str:
    return f" Type: {finding.result.fixes[0].command.splitlines()[0]}" if finding.result.fixes else ""


def _verified(findings: Sequence[Finding]) -> str:
    """Devices on which everything that was computed is right: ``"2 GPUs verified, CPU verified"``."""
    proofs = [each.result for each in findings if each.check.layer is Layer.NUM]
    good = {each.device for result in proofs if result.status is Status.PASS for each in result.measurements}
    bad = {each.device for result in proofs if result.status is Status.FAIL for each in result.measurements}
    lines = [line for result in proofs if result.status is Status.FAIL for line in result.evidence]
    lines += [line for result in proofs for line in result.evidence if ": not reached" in line]
    bad |= {match[1] for line in lines if (match := re.match(r"([\w:]+(?: \(\w+\))?): ", line))}
    devices = {name.split(" ")[0] for name in good} - {name.split(" ")[0] for name in bad}
    gpus = len(devices - {"cpu"})
    parts = [f"{gpus} GPU{'s' if gpus > 1 else ''} verified"] if gpus else []
    return ", ".join(parts + (["CPU verified"] if "cpu" in devices else []))
