"""The catalogue of failure classes: complete, consistent, and usable where nothing else imports."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from halfbyte.doctor import catalogue
from halfbyte.doctor.catalogue import CLASSES, FailureClass
from halfbyte.doctor.catalogue.entry import compiled
from halfbyte.doctor.fixes import TOOLS

TEXTS = Path(__file__).parent / "texts"
EXACT: dict[str, list[str]] = json.loads((TEXTS / "exact.json").read_text(encoding="utf-8"))
COUNTS = {"A": 13, "B": 9, "C": 13, "D": 15, "E": 11, "F": 4, "G": 6}

each_class = pytest.mark.parametrize("entry", CLASSES, ids=[entry.id for entry in CLASSES])


def test_ids_are_complete_and_in_order():
    assert [entry.id for entry in CLASSES] == [
        f"{letter}{n}" for letter, last in COUNTS.items() for n in range(1, last + 1)
    ]


def test_every_group_has_a_heading():
    assert list(catalogue.GROUPS) == list(COUNTS)


def test_every_class_has_its_list_of_texts():
    assert list(EXACT) == [entry.id for entry in CLASSES]


@each_class
def test_a_class_says_cause_and_way_out_in_sentences(entry: FailureClass):
    assert entry.cause.endswith(".")
    assert not entry.title.endswith(".")
    assert entry.remedies
    assert all(remedy.title for remedy in entry.remedies)
    assert any(remedy.command or remedy.install for remedy in entry.remedies)


@each_class
@pytest.mark.parametrize("tool", TOOLS)
def test_every_remedy_can_be_phrased_for_every_installer(entry: FailureClass, tool):
    for remedy in entry.remedies:
        fix = remedy.fix(tool)
        assert fix.title == remedy.title
        if remedy.install:
            assert re.split(r"[<>=\[]", remedy.install)[0] in fix.command.replace("pytorch-gpu", "torch")


@each_class
def test_only_reversible_remedies_of_the_user_are_called_safe(entry: FailureClass):
    for remedy in entry.remedies:
        if remedy.safe:
            assert not remedy.install
            assert remedy.command.startswith(("export ", "unset "))


@each_class
def test_what_a_class_follows_from_exists_and_is_no_notice(entry: FailureClass):
    for name in entry.follows:
        cause = catalogue.get(name)
        assert cause is not None
        assert cause.kind != "notice"


def test_no_class_follows_from_itself_over_others():
    def causes(name: str, seen: tuple[str, ...] = ()) -> None:
        assert name not in seen, f"circle: {seen}"
        for other in catalogue.get(name).follows:
            causes(other, (*seen, name))

    for entry in CLASSES:
        causes(entry.id)


@each_class
def test_a_symptom_names_its_possible_causes(entry: FailureClass):
    assert entry.kind != "symptom" or entry.follows


@each_class
def test_no_pattern_quantifies_a_gap(entry: FailureClass):
    # A space stands for any gap, so "? " and " *" would not mean what they look like.
    assert not [text for text in entry.texts if re.search(r" [?*+{]", text)]


@each_class
def test_every_pattern_is_needed_by_a_stored_text(entry: FailureClass):
    stored = "\n\n".join(EXACT[entry.id])
    whole = "\n\n".join(path.read_text(encoding="utf-8") for path in sorted((TEXTS / "whole").glob("*.txt")))
    unused = [text for text in entry.texts if not compiled(text).search(stored) and not compiled(text).search(whole)]
    assert not unused


@each_class
def test_a_class_is_silent_exactly_where_no_text_is_known(entry: FailureClass):
    assert entry.silent == (not EXACT[entry.id])


@each_class
def test_sources_are_addresses(entry: FailureClass):
    assert all(re.fullmatch(r"https://[\w./#+-]+", source) for source in entry.sources)


@pytest.mark.parametrize("quote", ["'", '"', "`", "\u2018"])
def test_a_pattern_takes_any_quotation_mark(quote: str):
    assert compiled(r"No module named 'triton'").search(f"No module named {quote}triton{quote}")


def test_a_pattern_with_a_class_of_quotes_still_excludes_them():
    assert not compiled(r"'[^'\n]+' not found").fullmatch("'one' and 'two' not found")


def test_a_pattern_matches_over_a_broken_line():
    assert compiled("no kernel image is available").search("no kernel\n  \u2502 image is\n\u2502available")


def test_the_knowledge_loads_neither_torch_nor_rich_nor_numpy():
    code = (
        "import sys\n"
        "import halfbyte.doctor.catalogue, halfbyte.doctor.explain, halfbyte.doctor.fixes, halfbyte.doctor.versions\n"
        "print(sorted({name.split('.')[0] for name in sys.modules} & {'torch', 'rich', 'numpy', 'numba', 'triton'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
