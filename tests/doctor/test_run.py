"""Checks run in order: the first broken layer is the cause, later ones are not reached, a raising check is a crash."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from halfbyte.doctor import registry
from halfbyte.doctor.facts.torch_build import TorchBuild
from halfbyte.doctor.facts.torch_import import TorchImport
from halfbyte.doctor.model import Level, Status
from halfbyte.doctor.probes.steps import STEPS
from halfbyte.doctor.registry import Check
from halfbyte.doctor.report import Report, compose
from halfbyte.doctor.run import Facts, run_checks
from halfbyte.errors import ArgumentError
from tests.support.doctor_facts import healthy_facts


def report_of(facts: dict[str, Any], level: Level = Level.DEFAULT, only: tuple[str, ...] = ()) -> Report:
    selected, asked = registry.select(level, only)
    gathered = Facts(facts["host"], facts)
    return compose(gathered, run_checks(gathered, selected, asked), level, 1.0)


def statuses(report: Report) -> dict[str, Status]:
    return {finding.check.code: finding.result.status for finding in report.findings}


def test_a_healthy_gpu_machine_works():
    report = report_of(healthy_facts())
    assert report.exit_code == 0, report.verdict
    assert report.verdict.startswith("halfbyte works here: 1 GPU verified, CPU verified (")
    assert not [code for code, status in statuses(report).items() if status not in {Status.PASS, Status.SKIP}]


def test_what_depends_on_a_failure_is_not_reached():
    facts = healthy_facts()
    facts["torch_import"] = TorchImport(ok=False, error="ImportError: no")
    report = report_of(facts)
    found = statuses(report)
    assert found["TORCH105"] is Status.FAIL
    assert {found[code] for code in ("TORCH106", "TORCH110", "TRITON111", "NUM101", "NUM105", "SPEED101")} == {
        Status.BLOCKED
    }
    assert report.exit_code == 2


def test_the_verdict_names_the_lowest_broken_layer():
    facts = healthy_facts()
    facts["torch_build"] = TorchBuild()
    facts["torch_import"] = TorchImport(ok=False)
    assert report_of(facts).verdict.startswith("Broken at: torch 2.13.0 is registered but its files are gone. Type: ")


def test_what_depends_on_something_absent_is_skipped():
    facts = healthy_facts()
    facts["gpu"] = type(facts["gpu"])()
    found = statuses(report_of(facts))
    assert {found[code] for code in ("GPU101", "GPU105", "TRITON101", "TRITON103")} == {Status.SKIP}


def test_a_missing_triton_leaves_its_tool_chain_unreached():
    facts = healthy_facts()
    facts["toolchain"] = type(facts["toolchain"])(triton="", compiler="")
    found = statuses(report_of(facts))
    assert (found["TRITON101"], found["TRITON103"]) == (Status.WARN, Status.BLOCKED)


def test_a_warning_is_exit_code_1():
    facts = healthy_facts()
    facts["host"] = type(facts["host"])(environ={"HALFBYTE_BACKEND": "reference"})
    report = report_of(facts)
    assert report.exit_code == 1
    assert report.verdict.startswith("halfbyte works here (1 GPU verified, CPU verified), with one limit: ")


class Unreadable:
    """A fact of which nothing can be read."""

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(f"no {name} for you")


def test_a_check_that_raises_is_a_crash_and_the_others_go_on():
    facts = healthy_facts()
    facts["memory"] = Unreadable()
    report = report_of(facts)
    found = statuses(report)
    assert found["MEM101"] is Status.CRASH
    assert found["NUM105"] is Status.PASS
    assert report.exit_code == 3
    assert "The doctor itself failed in MEM101" in report.verdict


def test_a_fact_that_cannot_be_gathered_is_a_crash_of_each_check_that_wants_it():
    facts = healthy_facts()
    del facts["memory"]
    facts["host"] = Unreadable()
    selected, asked = registry.select(Level.QUICK, ("MEM101", "MEM103"))
    results = run_checks(Facts(facts["host"], facts), selected, asked)
    assert {finding.result.status for finding in results} == {Status.CRASH}


def test_a_failure_outranks_a_crash_in_the_exit_code():
    facts = healthy_facts()
    facts["memory"] = Unreadable()
    facts["torch_build"] = TorchBuild()
    assert report_of(facts).exit_code == 2


def test_only_reports_what_was_asked_for():
    report = report_of(healthy_facts(), only=("NUM105",))
    assert list(statuses(report)) == ["NUM105"]


def test_only_reports_the_cause_too_where_something_required_fails():
    facts = healthy_facts()
    facts["torch_import"] = TorchImport(ok=False, error="ImportError: no")
    assert statuses(report_of(facts, only=("NUM105",))) == {"TORCH105": Status.FAIL, "NUM105": Status.BLOCKED}


def test_an_unknown_code_is_refused():
    with pytest.raises(ArgumentError, match="no check is called 'QUX'"):
        registry.select(Level.QUICK, ("qux",))


def test_quick_gathers_no_slow_fact():
    selected, _ = registry.select(Level.QUICK)
    slow = {name for name, rule in registry.facts().items() if rule.slow}
    assert not registry.closure(name for check in selected for name in check.wants) & slow


def test_levels_hold_each_other():
    codes = [{check.code for check in registry.select(level)[0]} for level in Level]
    assert codes[0] < codes[1] < codes[2]


@pytest.mark.parametrize("check", registry.checks(), ids=lambda check: check.code)
def test_every_check_requires_checks_that_exist_at_its_level(check: Check):
    known = {each.code: each for each in registry.checks()}
    assert all(code in known and check.level.includes(known[code].level) for code in check.requires)


@pytest.mark.parametrize("check", registry.checks(), ids=lambda check: check.code)
def test_every_check_is_documented_and_wants_facts_that_exist(check: Check):
    assert all(len(text) > 10 for text in check.sections.values())
    assert 10 < len(check.title) < 100
    assert set(check.wants) <= {"host", *registry.facts()}


def test_a_code_cannot_be_taken_twice():
    with pytest.raises(ArgumentError, match="PY101"):
        registry.check("PY101")(lambda: None)


def test_a_check_without_documentation_is_refused():
    with pytest.raises(ArgumentError, match="docstring of check PY999"):
        registry.check("PY999")(lambda: None)
    assert "PY999" not in {check.code for check in registry.checks()}


def old_driver() -> dict[str, Any]:
    facts = healthy_facts()
    facts["gpu"] = replace(facts["gpu"], driver="550.54.14", userspace="550.54.14")
    return facts


def test_what_was_tried_and_works_makes_a_failure_that_was_only_read_a_warning():
    report = report_of(old_driver())
    found = statuses(report)
    assert (found["TORCH102"], found["TORCH106"], report.exit_code) == (Status.WARN, Status.PASS, 1)


def test_what_was_tried_and_fails_too_is_not_reached_and_its_words_are_kept():
    facts = old_driver()
    facts["torch_import"] = replace(facts["torch_import"], devices=(), cuda_error="the driver is too old (12040)")
    report = report_of(facts)
    found = {finding.check.code: finding.result for finding in report.findings}
    assert (found["TORCH102"].status, found["TORCH106"].status) == (Status.FAIL, Status.BLOCKED)
    assert "the driver is too old (12040)" in found["TORCH102"].evidence
    assert report.exit_code == 2


def test_what_was_not_tried_stays_a_failure():
    assert statuses(report_of(old_driver(), Level.QUICK))["TORCH102"] is Status.FAIL


@pytest.mark.parametrize("check", [each for each in registry.checks() if each.proof], ids=lambda check: check.code)
def test_a_proof_is_a_check_that_computes(check: Check):
    proof = next(each for each in registry.checks() if each.code == check.proof)
    assert proof.level is Level.DEFAULT
    assert check.code not in proof.requires


def test_each_step_of_the_proofs_is_looked_at_by_a_check():
    assert {step for check in registry.checks() for step in check.steps} == set(STEPS)
