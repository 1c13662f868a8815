"""The report in text, Markdown and JSON: the verdict last, quiet when healthy, 80 columns, no private text."""

from __future__ import annotations

import io
import json as plain_json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from halfbyte.cli import doctor as command
from halfbyte.doctor import registry
from halfbyte.doctor.facts.proofs import Proofs, StepProof
from halfbyte.doctor.facts.toolchain import Folder
from halfbyte.doctor.facts.torch_import import Device
from halfbyte.doctor.model import Layer, Level, Measurement
from halfbyte.doctor.report import Report, compose, json, markdown, text
from halfbyte.doctor.run import Facts, run_checks
from tests.support.doctor_facts import H100, healthy_facts, proof_of


def report_of(facts: dict[str, Any]) -> Report:
    selected, asked = registry.select(Level.DEFAULT)
    gathered = Facts(facts["host"], facts)
    return compose(gathered, run_checks(gathered, selected, asked), Level.DEFAULT, 1.0)


def broken() -> dict[str, Any]:
    facts = healthy_facts()
    facts["gpu"] = replace(facts["gpu"], driver="550.54.14", userspace="550.54.14")
    facts["torch_import"] = replace(facts["torch_import"], devices=(), cuda_error="the driver is too old (12040)")
    facts["proofs"] = Proofs((proof_of(Device("cpu")),))
    return facts


def shown(report: Report, *, verbose: bool = False) -> str:
    stream = io.StringIO()
    text.show(report, verbose=verbose, stream=stream)
    return stream.getvalue()


def test_a_healthy_machine_gets_one_line():
    assert shown(report_of(healthy_facts())).splitlines() == [report_of(healthy_facts()).verdict]


def test_verbose_shows_every_check_and_number():
    report = report_of(healthy_facts())
    lines = shown(report, verbose=True)
    assert all(finding.check.code in lines for finding in report.findings)
    assert "cuda:0: nf4 1e-07 <= 1e-06" in lines


def test_a_broken_machine_shows_the_cause_the_fix_and_the_verdict_last():
    lines = shown(report_of(broken())).splitlines()
    assert any("[FAIL]  TORCH102" in line for line in lines)
    assert any("whl/cu126" in line and line.startswith(" ") for line in lines)
    assert lines[-1].startswith("Broken at: driver 550.54.14 is too old")
    assert not any("[ok]" in line or "[wait]" in line for line in lines)


def test_no_line_but_commands_and_the_verdict_is_wider_than_80_columns():
    report = report_of(broken())
    commands = [
        line for finding in report.findings for fix in finding.result.fixes for line in fix.command.splitlines()
    ]
    for line in shown(report, verbose=True).splitlines()[:-1]:
        assert len(line) <= 80 or any(part in line for part in commands)


def test_a_number_beyond_its_limit_says_so():
    assert text.number(Measurement("cpu", "error", 0.5, 0.1)) == "cpu: error 0.5 NOT <= 0.1"
    assert text.number(Measurement("cpu", "speed", 2.0, 1.0, "x", True)) == "cpu: speed 2 x >= 1 x"
    assert text.number(Measurement("cpu", "bandwidth", 20.0, None, "GB/s")) == "cpu: bandwidth 20 GB/s"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_colour_only_on_a_terminal_and_not_under_no_color(monkeypatch: pytest.MonkeyPatch):
    report = report_of(broken())
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    coloured, plain = Terminal(), Terminal()
    text.show(report, stream=coloured)
    monkeypatch.setenv("NO_COLOR", "1")
    text.show(report, stream=plain)
    assert "\x1b[" in coloured.getvalue()
    assert plain.getvalue() == shown(report)


def test_colour_changes_no_text(monkeypatch: pytest.MonkeyPatch):
    import re

    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    stream = Terminal()
    text.show(report_of(broken()), stream=stream)
    assert re.sub(r"\x1b\[[0-9;]*m", "", stream.getvalue()) == shown(report_of(broken()))


def test_without_rich_the_text_is_the_same(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setitem(sys.modules, "rich", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    stream = Terminal()
    text.show(report_of(broken()), stream=stream)
    assert stream.getvalue() == shown(report_of(broken()))


def test_a_stream_that_knows_no_unicode_is_written_to():
    facts = broken()
    facts["cpu"] = replace(facts["cpu"], name="Prozessor\N{TRADE MARK SIGN}")
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    text.show(report_of(facts), verbose=True, stream=stream)
    stream.flush()
    assert b"Prozessor?" in stream.buffer.getvalue()


@pytest.mark.parametrize("facts", [healthy_facts(), broken()], ids=["healthy", "broken"])
def test_json_keeps_to_its_schema(facts: dict[str, Any]):
    validator = Draft202012Validator(json.schema())
    Draft202012Validator.check_schema(json.schema())
    validator.validate(plain_json.loads(json.render(report_of(facts))))


def test_the_schema_refuses_what_is_not_a_report():
    report = json.to_dict(report_of(healthy_facts()))
    report["checks"][0]["status"] = "fine"
    assert not Draft202012Validator(json.schema()).is_valid(report)


def test_a_number_that_is_none_becomes_null():
    facts = healthy_facts()
    bad = StepProof("done", measurements=(Measurement("cuda:0", "nf4", float("nan"), 1e-6),))
    facts["proofs"] = Proofs((proof_of(H100, nf4=bad),))
    checks = plain_json.loads(json.render(report_of(facts)))["checks"]
    measured = next(each for each in checks if each["code"] == "NUM103")["measurements"][0]
    assert (measured["value"], measured["ok"]) == (None, False)


def test_markdown_is_folded_and_starts_with_the_verdict():
    lines = markdown.render(report_of(broken())).splitlines()
    assert lines[0].startswith("**Broken at: ")
    assert lines[2].startswith("<details>")
    assert lines[-1] == "</details>"
    assert f"### {Layer.TORCH.heading}" in lines


def test_the_verdict_counts_only_devices_on_which_nothing_is_wrong():
    facts = healthy_facts()
    bad = StepProof("done", measurements=(Measurement("cuda:0", "nf4", 0.1, 1e-6),))
    facts["proofs"] = Proofs((proof_of(H100, nf4=bad), proof_of(Device("cpu"))))
    assert "wrong numbers on cuda:0 (CPU verified)" in report_of(facts).verdict


def test_two_gpus_are_counted():
    facts = healthy_facts()
    second = replace(H100, name="cuda:1")
    facts["torch_import"] = replace(facts["torch_import"], devices=(H100, second))
    facts["proofs"] = Proofs((proof_of(H100), proof_of(second), proof_of(Device("cpu"))))
    assert "2 GPUs verified, CPU verified" in report_of(facts).verdict


def test_list_names_every_check(capsys: pytest.CaptureFixture[str]):
    assert command.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [check.code for check in registry.checks()]


def test_the_documentation_page_has_every_check(capsys: pytest.CaptureFixture[str]):
    command.main(["--list", "--markdown"])
    page = capsys.readouterr().out
    assert all(f"### {check.code}: {check.title}" in page for check in registry.checks())


def test_the_parent_never_imports_torch(tmp_path: Path):
    import subprocess

    script = (
        "import sys\nfrom halfbyte.cli.doctor import main\ncode = main(['--quick'])\n"
        "assert not {'torch', 'triton', 'numba', 'numpy'} & set(sys.modules)\nsys.exit(code)"
    )
    source = str(Path(command.__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", script], env={"PYTHONPATH": source, "HOME": str(tmp_path)}, check=False
    )
    assert done.returncode in {0, 1, 2}


def test_commands_are_in_the_words_of_windows_there():
    facts = healthy_facts()
    facts["host"] = replace(facts["host"], system="Windows", environ={"HALFBYTE_BACKEND": "reference"})
    facts["toolchain"] = replace(facts["toolchain"], numba_cache=Folder("C:/x", "C:/x cannot be written"))
    commands = [fix.command for finding in report_of(facts).findings for fix in finding.result.fixes]
    assert "set HALFBYTE_BACKEND=" in commands
    assert any(command.startswith("set NUMBA_CACHE_DIR=%TEMP%") for command in commands)
    assert not [command for command in commands if command.startswith(("export", "unset"))]


def test_a_failure_of_the_doctor_is_exit_code_3_without_private_text(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def fail(*_: object) -> None:
        raise RuntimeError(f"cannot read {Path.home()}/secret")

    monkeypatch.setattr(command, "run_checks", fail)
    assert command.main(["--quick"]) == 3
    assert "RuntimeError: cannot read ~/secret" in capsys.readouterr().err
