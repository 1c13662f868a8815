"""Each failure class that facts can show: the broken fact makes the right check speak, the healthy one lets it pass."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from halfbyte.doctor import registry
from halfbyte.doctor.facts.packages import Module
from halfbyte.doctor.model import Result, Status
from tests.doctor import cases_gpu, cases_libraries, cases_python
from tests.doctor.cases import FAIL, Case
from tests.support.doctor_facts import healthy_facts

CASES = (*cases_gpu.CASES, *cases_libraries.CASES, *cases_python.CASES)

WITHOUT_HEALTHY_PASS = {"GPU110"}
"""Checks that only ever skip on a machine that is not theirs."""


def facts_with(changes: dict[str, Any]) -> dict[str, Any]:
    facts = healthy_facts()
    for name, change in changes.items():
        facts[name] = replace(facts[name], **change) if isinstance(change, dict) else change
    return facts


def result_of(code: str, facts: dict[str, Any]) -> Result:
    check = next(each for each in registry.checks() if each.code == code)
    return check.function(**{name: facts[name] for name in check.wants})


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_broken_fact_is_named_with_its_fix(case: Case):
    result = result_of(case.code, facts_with(case.broken))
    assert result.status is case.status, result
    assert case.failure_class in result.classes
    assert any(case.fix in fix.command for fix in result.fixes), result.fixes
    assert result.summary
    assert not result.summary.endswith(".")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_healthy_fact_passes(case: Case):
    result = result_of(case.code, facts_with(case.healthy))
    expected = {Status.SKIP} if case.code in WITHOUT_HEALTHY_PASS else {Status.PASS}
    assert result.status in expected, result
    assert not result.fixes


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_check_declares_the_class_it_finds(case: Case):
    check = next(each for each in registry.checks() if each.code == case.code)
    assert case.failure_class in check.classes


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_safe_fix_only_sets_a_variable_or_makes_a_folder(case: Case):
    for fix in result_of(case.code, facts_with(case.broken)).fixes:
        if fix.safe:
            assert all(part.startswith(("export ", "mkdir -p ")) for part in fix.command.split(" && "))


def test_at_least_45_classes_are_arranged():
    assert len({case.failure_class for case in CASES}) >= 45


def test_a_shadowing_file_is_found_in_the_folder_it_lies_in(tmp_path: Path):
    (tmp_path / "torch.py").write_text("")
    facts = healthy_facts()
    host = replace(facts["host"], cwd=tmp_path, search_path=(str(tmp_path), "/site"))
    module = Module("torch", str(tmp_path / "torch.py"), str(tmp_path))
    shadowed = replace(facts["packages"], modules={"torch": (module,)})
    result = result_of("ENV101", {"host": host, "packages": shadowed})
    assert result.status is FAIL
    assert result.classes == ("C12",)
    assert f"mv {tmp_path}/torch.py" in result.fixes[0].command


def test_a_shadowing_file_named_bitsandbytes_is_class_e4(tmp_path: Path):
    (tmp_path / "bitsandbytes.py").write_text("")
    facts = healthy_facts()
    host = replace(facts["host"], cwd=tmp_path, search_path=(str(tmp_path),))
    module = Module("bitsandbytes", str(tmp_path / "bitsandbytes.py"), str(tmp_path))
    result = result_of(
        "ENV101", {"host": host, "packages": replace(facts["packages"], modules={"bitsandbytes": (module,)})}
    )
    assert result.classes == ("E4",)


def test_every_class_that_a_check_declares_has_a_case():
    arranged = {case.failure_class for case in CASES} | {"C12", "E4"}
    declared = {name for check in registry.checks() for name in check.classes}
    assert declared <= arranged


def test_a_driver_that_does_not_answer_is_a_failure():
    facts = healthy_facts()
    gpu = replace(facts["gpu"], smi=(), smi_error="nvidia-smi: no answer in 8 s")
    result = result_of("GPU104", {"gpu": gpu})
    assert (result.status, result.fixes[0].command) == (FAIL, "sudo reboot")
