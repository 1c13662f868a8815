"""Every failure class is found by a check, by ``explain`` or ruled out by design, and the page of them is current."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from halfbyte.doctor import catalogue, registry
from halfbyte.doctor.catalogue import CLASSES, FailureClass
from halfbyte.doctor.explain import explain

import_module("halfbyte.doctor.checks")  # registers them

ROOT = Path(__file__).parents[2]
BY_DESIGN = {"G2", "G4", "G5"}
"""Silent failures of others that halfbyte cannot get into; they have a page, and no message or check."""

each_class = pytest.mark.parametrize("entry", CLASSES, ids=[entry.id for entry in CLASSES])
each_check = pytest.mark.parametrize("made", registry.checks(), ids=[made.code for made in registry.checks()])


def detecting(entry: FailureClass) -> list[str]:
    return [made.code for made in registry.checks() if entry.id in made.classes]


@each_class
def test_a_class_is_found_by_a_check_or_by_explain_or_ruled_out(entry: FailureClass):
    if entry.id in BY_DESIGN:
        assert entry.here
    else:
        assert detecting(entry) or not entry.silent


@each_check
def test_a_check_names_known_classes_only(made: registry.Check):
    assert [name for name in made.classes if catalogue.get(name) is None] == []


def test_the_page_of_failure_classes_is_current():
    done = subprocess.run(
        [sys.executable, "tools/make_docs.py", "--check"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_page_names_every_class_once():
    lines = (ROOT / "docs" / "failure-classes.md").read_text(encoding="utf-8").splitlines()
    rows = [line.split("|")[1].strip() for line in lines if line.startswith("| ") and not line.startswith("| id")]
    assert rows == [entry.id for entry in CLASSES]


def test_every_row_of_the_page_has_six_cells():
    lines = (ROOT / "docs" / "failure-classes.md").read_text(encoding="utf-8").splitlines()
    assert {line.replace("\\|", "").count("|") for line in lines if line.startswith("| ")} == {7}


@each_check
def test_codes_that_a_page_names_exist(made: registry.Check):
    codes = {each.code for each in registry.checks()}
    named = {word for text in made.sections.values() for word in re.findall(r"\b[A-Z]{2,6}\d{3}\b", text)}
    assert named <= codes


@each_check
def test_a_message_quoted_on_a_page_is_one_of_that_check(made: registry.Check):
    for text in re.findall(r'"([^"]{12,})"', " ".join(made.sections.values())):
        found = {match.entry.id for match in explain(text)}
        assert not found or found & set(made.classes), (text, found)
