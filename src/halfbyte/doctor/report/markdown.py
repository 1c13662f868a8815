"""The report for a bug report: folded, with everything that the text shows under -v."""

from __future__ import annotations

from collections.abc import Iterator

from halfbyte.doctor.model import Layer
from halfbyte.doctor.report.contents import Report
from halfbyte.doctor.report.text import MARKS, number
from halfbyte.doctor.run import Finding

__all__ = ["render"]


def render(report: Report) -> str:
    """GitHub Markdown; private text was taken out before."""
    return "\n".join(_lines(report)) + "\n"


def _lines(report: Report) -> Iterator[str]:
    yield f"**{report.verdict}**"
    yield ""
    yield f"<details><summary>halfbyte doctor, level {report.level.value}, exit code {report.exit_code}</summary>"
    yield ""
    yield "| | |"
    yield "|--|--|"
    yield from (f"| {name} | {_cell(text)} |" for name, text in (*report.machine, *report.environment))
    for layer in Layer:
        findings = report.of(layer)
        if findings:
            yield ""
            yield f"### {layer.heading}"
            yield ""
            yield "```text"
            for finding in findings:
                yield from _finding(finding)
            yield "```"
    yield ""
    yield "</details>"


def _finding(finding: Finding) -> Iterator[str]:
    result = finding.result
    yield f"{MARKS[result.status]:<6} {finding.check.code:<9} {result.summary}"
    yield from (f"       {line}" for text in result.evidence for line in text.splitlines())
    yield from (f"       {number(measurement)}" for measurement in result.measurements)
    yield from (f"       {fix.title}: {fix.command}" for fix in result.fixes)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
