"""The report for programs: a dictionary that keeps to ``schema.json``, which is versioned."""

from __future__ import annotations

import json
import math
from importlib.resources import files
from typing import Any

from halfbyte.doctor.model import Measurement
from halfbyte.doctor.report.contents import Report
from halfbyte.doctor.run import Finding

__all__ = ["SCHEMA_VERSION", "render", "schema", "to_dict"]

SCHEMA_VERSION = 1
"""Raised when a field changes its meaning or goes away; new fields do not raise it."""


def schema() -> dict[str, Any]:
    """The JSON schema of the report."""
    return json.loads(files("halfbyte.doctor.report").joinpath("schema.json").read_text(encoding="utf-8"))


def to_dict(report: Report) -> dict[str, Any]:
    """The report as plain values."""
    return {
        "schema_version": SCHEMA_VERSION,
        "level": report.level.value,
        "verdict": report.verdict,
        "exit_code": report.exit_code,
        "seconds": round(report.seconds, 3),
        "machine": dict(report.machine),
        "environment": dict(report.environment),
        "checks": [_check(finding) for finding in report.findings],
    }


def render(report: Report) -> str:
    """The report as JSON text."""
    return json.dumps(to_dict(report), indent=2, ensure_ascii=True)


def _check(finding: Finding) -> dict[str, Any]:
    result = finding.result
    return {
        "code": finding.check.code,
        "layer": finding.check.layer.value,
        "title": finding.check.title,
        "status": result.status.value,
        "summary": result.summary,
        "evidence": list(result.evidence),
        "fixes": [{"title": fix.title, "command": fix.command, "safe": fix.safe} for fix in result.fixes],
        "measurements": [_measurement(each) for each in result.measurements],
        "classes": list(result.classes),
    }


def _measurement(measured: Measurement) -> dict[str, Any]:
    finite = math.isfinite(measured.value)  # JSON knows no NaN
    return {
        "device": measured.device,
        "name": measured.name,
        "value": measured.value if finite else None,
        "limit": measured.limit,
        "unit": measured.unit,
        "comparison": "at_least" if measured.at_least else "at_most",
        "ok": measured.ok,
    }
