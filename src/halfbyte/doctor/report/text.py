"""The report for a terminal: 80 columns, readable without colour; through rich where that is installed."""

from __future__ import annotations

import importlib.util
import os
import sys
import textwrap
from collections.abc import Iterator
from typing import TextIO

from halfbyte.doctor.model import Layer, Measurement, Status
from halfbyte.doctor.report.contents import Report
from halfbyte.doctor.run import Finding

__all__ = ["MARKS", "lines", "number", "show"]

WIDTH = 80
INDENT = " " * 18
MARKS = {
    Status.PASS: "[ok]",
    Status.WARN: "[warn]",
    Status.FAIL: "[FAIL]",
    Status.SKIP: "[skip]",
    Status.BLOCKED: "[wait]",
    Status.CRASH: "[BUG]",
}
_STYLES = {Status.PASS: "green", Status.WARN: "yellow", Status.FAIL: "bold red", Status.CRASH: "bold magenta"}
_VERDICT_STYLES = ("bold green", "bold yellow", "bold red", "bold magenta")

Line = tuple[str, str]
"""Style and text."""


def lines(report: Report, verbose: bool) -> Iterator[Line]:
    """The report line by line; only the verdict where all is well, unless ``verbose``."""
    if verbose or report.exit_code:
        facts = " | ".join(text if name == "system" else f"{name} {text}" for name, text in report.machine[:6])
        for line in textwrap.wrap(facts, WIDTH, break_on_hyphens=False):
            yield "dim", line
        if verbose:
            yield from _details(report)
        for layer in Layer:
            yield from _section(report, layer, verbose)
        yield "", ""
    yield _VERDICT_STYLES[report.exit_code], report.verdict


def _details(report: Report) -> Iterator[Line]:
    rest = [*report.machine[6:], *report.environment]
    for name, text in rest:
        yield "dim", f"  {name:<16}  {text}"
    yield "dim", f"  {'took':<16}  {report.seconds:.1f} s, level {report.level.value}"


def _section(report: Report, layer: Layer, verbose: bool) -> Iterator[Line]:
    shown = [each for each in report.of(layer) if verbose or each.result.status not in {Status.PASS, Status.SKIP}]
    if not verbose:  # what was not reached follows from the first failure, which is shown
        shown = [each for each in shown if each.result.status is not Status.BLOCKED]
    if shown:
        yield "", ""
        yield "bold", layer.heading
        for finding in shown:
            yield from _finding(finding, verbose)


def _finding(finding: Finding, verbose: bool) -> Iterator[Line]:
    result = finding.result
    head = f"  {MARKS[result.status]:<6}  {finding.check.code:<9}"
    first, *rest = textwrap.wrap(
        result.summary, WIDTH - len(head) - 1, break_on_hyphens=False, break_long_words=False
    ) or [""]
    yield _STYLES.get(result.status, "dim"), f"{head} {first}"
    yield from (("", INDENT + " " + line) for line in rest)
    unwell = result.status not in {Status.PASS, Status.SKIP}
    if unwell or verbose:
        for line in result.evidence:
            yield from _wrapped(line, "dim")
        for measurement in result.measurements:
            yield from _wrapped(number(measurement), "dim" if measurement.ok else "red")
    for fix in result.fixes:
        yield from _wrapped(f"{fix.title}:", "")
        yield from (("bold", f"{INDENT}   {line}") for line in fix.command.splitlines())


def _wrapped(text: str, style: str) -> Iterator[Line]:
    for part in text.splitlines() or [""]:
        pieces = textwrap.wrap(
            part, WIDTH - len(INDENT) - 1, break_on_hyphens=False, break_long_words=False, subsequent_indent="  "
        )
        yield from ((style, f"{INDENT} {piece}") for piece in pieces)


def number(measurement: Measurement) -> str:
    """A number against its limit: ``"cpu: nf4 absmax 0 <= 1.2e-07"``."""
    unit = f" {measurement.unit}" if measurement.unit else ""
    text = f"{measurement.device}: {measurement.name} {_short(measurement.value)}{unit}"
    if measurement.limit is None:
        return text
    sign = ">=" if measurement.at_least else "<="
    if not measurement.ok:
        sign = "NOT " + sign
    return f"{text} {sign} {_short(measurement.limit)}{unit}"


def _short(value: float) -> str:
    return f"{value:.3g}"


def show(report: Report, *, verbose: bool = False, stream: TextIO | None = None) -> None:
    """Print the report to ``stream`` (standard output)."""
    output = stream or sys.stdout
    content = list(lines(report, verbose))
    colour = output.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    if colour and importlib.util.find_spec("rich") is not None:
        from rich.console import Console
        from rich.text import Text

        console = Console(file=output, highlight=False, soft_wrap=True)
        for style, line in content:
            console.print(Text(line, style=style))
        return
    for _, line in content:
        output.write(_encodable(line, output) + "\n")


def _encodable(line: str, stream: TextIO) -> str:
    encoding = stream.encoding or "utf-8"
    return line.encode(encoding, errors="replace").decode(encoding)
