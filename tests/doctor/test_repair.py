"""``--fix`` does what is reversible and the user's own, shows it first, and never touches packages or the system."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from halfbyte.doctor import registry, repair
from halfbyte.doctor.facts.toolchain import Folder, Toolchain
from halfbyte.doctor.model import Level
from halfbyte.doctor.run import Facts, Finding, run_checks
from tests.support.doctor_facts import healthy_facts
from tests.support.environments import make_environment


def findings(**changed: Any) -> list[Finding]:
    facts = {**healthy_facts(), **changed}
    selected, asked = registry.select(Level.QUICK)
    return run_checks(Facts(facts["host"], facts), selected, asked)


UNWRITABLE = Toolchain(triton="3.7.0", compiler="/usr/bin/gcc", triton_cache=Folder("/x", "/x cannot be written"))


def test_a_healthy_machine_has_nothing_to_fix(tmp_path: Path):
    assert not repair.plan(findings(), tmp_path)


def test_a_cache_is_moved_by_the_environment_file(tmp_path: Path):
    chosen = repair.plan(findings(toolchain=UNWRITABLE), tmp_path)
    assert chosen.exports == ("export TRITON_CACHE_DIR=/tmp/triton-$(id -u)",)
    repair.carry_out(chosen)
    assert repair.environment_file(tmp_path).read_text().splitlines()[1:] == list(chosen.exports)


def test_a_second_fix_keeps_the_first_and_replaces_its_own_line(tmp_path: Path):
    file = repair.environment_file(tmp_path)
    file.parent.mkdir(parents=True)
    file.write_text("export OTHER=1\nexport TRITON_CACHE_DIR=/old\n")
    repair.carry_out(repair.plan(findings(toolchain=UNWRITABLE), tmp_path))
    assert file.read_text().splitlines() == ["export OTHER=1", "export TRITON_CACHE_DIR=/tmp/triton-$(id -u)"]


def test_a_command_that_does_more_than_set_a_variable_is_left_out(tmp_path: Path):
    from dataclasses import replace

    from halfbyte.doctor.model import Fix

    made = findings(toolchain=UNWRITABLE)
    bad = Fix("x", "export A=1; rm -rf /", safe=True)
    planned = [replace(each, result=replace(each.result, fixes=(bad,))) for each in made if each.result.fixes]
    assert planned
    assert not repair.plan(planned, tmp_path)


def test_without_a_terminal_and_without_yes_nothing_is_done(tmp_path: Path):
    made = make_environment(tmp_path, torch="", version="__version__ = '2.13.0+cpu'\n")
    done = made.command("-m", "halfbyte", "--quick", "--fix", NUMBA_CACHE_DIR="/proc/numba")
    assert "write to ~/.config/halfbyte/environment.sh: export NUMBA_CACHE_DIR=" in done.stderr
    assert "Nothing was done" in done.stderr
    assert not (made.home / ".config").exists()


def test_with_yes_the_file_is_written_and_named(tmp_path: Path):
    made = make_environment(tmp_path, torch="", version="__version__ = '2.13.0+cpu'\n")
    done = made.command("-m", "halfbyte", "--quick", "--fix", "--yes", NUMBA_CACHE_DIR="/proc/numba")
    assert ". ~/.config/halfbyte/environment.sh" in done.stderr
    assert "export NUMBA_CACHE_DIR=/tmp/numba-" in repair.environment_file(made.home).read_text()
