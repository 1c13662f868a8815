"""A rule bound to a backend's arithmetic sees ``xp`` alone, and what it calls works as anywhere."""

import sys
import time
from typing import Any

import pytest

from halfbyte.rules import bind
from halfbyte.rules.definition import xp


def year(x: Any) -> Any:
    return xp.strptime(x, "%Y").tm_year


def largest(x: Any) -> Any:
    return max(x)


def test_what_a_rule_calls_may_import(monkeypatch: pytest.MonkeyPatch) -> None:
    # time.strptime is C code that imports this module when it is called: so do some of torch's operators.
    monkeypatch.delitem(sys.modules, "_strptime", raising=False)
    assert bind(year, time)("2020") == 2020


def test_a_rule_sees_no_other_name() -> None:
    with pytest.raises(NameError):
        bind(largest, time)([1, 2])
