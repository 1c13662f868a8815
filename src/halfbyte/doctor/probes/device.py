"""Computes on one device, step by step, and reports each before the next starts, so that a crash shows where it was."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

from halfbyte.doctor.probes.steps import STEPS, Skip, Step

__all__ = ["run"]


def run(arguments: dict[str, Any], emit: Callable[..., None]) -> None:
    """Emit ``step`` events: state ``start``, then ``done``, ``skip``, ``error`` or ``blocked``.

    ``arguments``: ``device``, ``steps`` (names, in order), ``thorough`` (more shapes, block sizes and dtypes).
    """
    device, thorough = str(arguments["device"]), bool(arguments.get("thorough"))
    blocked_by = ""
    for name in arguments["steps"]:
        step = STEPS[name]
        if blocked_by:
            emit("step", step=name, state="blocked", text=f"{blocked_by} failed before")
            continue
        emit("step", step=name, state="start")
        start = time.perf_counter()
        report = _attempt(step, device, thorough)
        emit("step", step=name, seconds=time.perf_counter() - start, **report)
        if step.basic and report["state"] != "done":
            blocked_by = name
        elif _poisoned(report):
            return
    if not blocked_by:
        emit("backends", verdicts=_backends(device))


def _poisoned(report: dict[str, Any]) -> bool:
    """Whether this process can compute no more on the GPU: after such an error every later call fails the same way.

    The parent runs what is left in a new child.
    """
    text = str(report.get("text", ""))
    return report["state"] == "error" and any(part in text for part in ("CUDA error", "HIP error", "CUDA driver error"))


def _attempt(step: Step, device: str, thorough: bool) -> dict[str, Any]:
    try:
        report = step.run(device, thorough)
    except Skip as reason:
        return {"state": "skip", "text": str(reason)}
    except Exception as error:
        return {"state": "error", "text": f"{type(error).__name__}: {error}"}
    return {"state": "done", "measurements": report.measurements, "notes": report.notes}


def _backends(device: str) -> list[list[str]]:
    """Name of every registered backend and why it does not serve this device; empty for one that does."""
    import torch

    from halfbyte.backends import explain

    os.environ.pop("HALFBYTE_BACKEND", None)
    verdicts = explain("quantize_4bit", torch.zeros(64, device=device), 64, "nf4", torch.uint8)
    return [[verdict.backend, verdict.reason or ""] for verdict in verdicts]
