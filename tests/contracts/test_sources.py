"""Single sources: environment variables, tables, and what the tree may not contain."""

import re
from pathlib import Path

import pytest

from halfbyte import _env
from halfbyte.errors import ArgumentError
from halfbyte.formats import codebook

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "src").rglob("*.py"))
TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in FILES}
KNOWN = {variable.name for variable in _env.VARIABLES}


def test_every_environment_variable_in_the_source_is_declared() -> None:
    used = {name for text in TEXTS.values() for name in re.findall(r"\bHALFBYTE_[A-Z][A-Z0-9_]*[A-Z0-9]\b", text)}
    assert used - KNOWN == set()


def test_every_declared_variable_is_used_and_documented() -> None:
    for variable in _env.VARIABLES:
        readers = [name for name, text in TEXTS.items() if variable.name in text and not name.endswith("/_env.py")]
        assert readers, f"{variable.name} is read nowhere"
        assert variable.doc.endswith("."), f"{variable.name} has no sentence"


def test_the_documentation_lists_every_variable() -> None:
    table = (ROOT / "docs" / "environment.md").read_text(encoding="utf-8")
    assert {name for name in KNOWN if f"`{name}`" in table} == KNOWN


def test_only_env_reads_the_environment_for_halfbyte() -> None:
    readers = {
        name
        for name, text in TEXTS.items()
        if re.search(r"os\.(environ\.get\(|environ\[|getenv\()[^\n]*HALFBYTE_", text)
    }
    assert readers <= {"src/halfbyte/_env.py"}


@pytest.mark.parametrize("name", ["nf4", "fp4", "af4"])
def test_a_table_stands_in_one_file(name: str) -> None:
    # Any digits that are long enough to be that table's and no other's.
    levels = [f"{abs(level):.5f}"[1:] for level in codebook(name).levels if abs(level) not in (0.0, 1.0, 0.5, 0.25)]
    holders = {path for path, text in TEXTS.items() if sum(level[:5] in text for level in set(levels)) >= 3}
    assert len(holders) <= 1, holders


def test_variables_parse_by_their_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HALFBYTE_NUM_THREADS", "3")
    monkeypatch.setenv("HALFBYTE_QUIET", "yes")
    assert _env.get("HALFBYTE_NUM_THREADS") == 3
    assert _env.get("HALFBYTE_QUIET") is True
    monkeypatch.setenv("HALFBYTE_QUIET", "")
    assert _env.get("HALFBYTE_QUIET") is False


@pytest.mark.parametrize(("name", "value"), [("HALFBYTE_NUM_THREADS", "many"), ("HALFBYTE_QUIET", "maybe")])
def test_a_value_that_does_not_parse_names_its_variable(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ArgumentError, match=f"{name}='{value}'; expected .*\nhint: unset {name}"):
        _env.get(name)
