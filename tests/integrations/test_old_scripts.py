"""Scripts written against bitsandbytes 0.43.3: they give the right result, or an error that says what to use."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support.python import python

SCRIPTS = sorted((Path(__file__).parent / "old_scripts").glob("*.py"))
ERRORS = {path: found.group(1) for path in SCRIPTS if (found := re.search(r"(?m)^# error: (.*)$", path.read_text()))}


def check(script: Path, code: int, out: str, errors: str) -> None:
    if script in ERRORS:
        assert code == 1
        assert ERRORS[script] in errors
    else:
        assert code == 0, errors
        assert out.splitlines()[-1] == "right"


def test_there_are_scripts_of_both_kinds() -> None:
    assert len(SCRIPTS) >= 10
    assert 0 < len(ERRORS) < len(SCRIPTS) / 2


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_under_halfbyte_run(script: Path) -> None:
    done = python(["-m", "halfbyte", "run", script])
    check(script, done.returncode, done.stdout, done.stderr)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_with_the_separate_distribution(script: Path, shim_site: Path) -> None:
    done = python([script], path=[shim_site])
    check(script, done.returncode, done.stdout, done.stderr)


def test_the_old_diagnosis_is_the_doctors() -> None:
    done = python(["-m", "halfbyte", "run", "-m", "bitsandbytes", "--quick"])
    assert "halfbyte" in done.stdout
    assert "Traceback" not in done.stderr
