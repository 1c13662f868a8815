"""The public names, read from a committed list: adding one is a decision, losing one a break."""

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

LIST: dict[str, list[str]] = json.loads((Path(__file__).parent / "public_api.json").read_text())


@pytest.mark.parametrize("module", LIST)
def test_public_names_are_those_of_the_list(module: str) -> None:
    names = importlib.import_module(module).__all__
    assert sorted(names) == LIST[module]


@pytest.mark.parametrize("module", LIST)
def test_every_public_name_is_there_and_documented(module: str) -> None:
    found: Any = importlib.import_module(module)
    for name in found.__all__:
        value = getattr(found, name)
        if callable(value):
            assert value.__doc__, f"{module}.{name} has no docstring"


@pytest.mark.parametrize("module", LIST)
def test_no_public_name_stands_twice(module: str) -> None:
    names = importlib.import_module(module).__all__
    assert len(set(names)) == len(names)


def test_every_lazy_name_of_the_package_resolves() -> None:
    import halfbyte

    for name in halfbyte._HOME:
        assert getattr(halfbyte, name) is not None
    assert set(halfbyte.__all__) <= set(dir(halfbyte))


def test_an_unknown_name_of_the_package_is_an_attribute_error() -> None:
    import halfbyte

    with pytest.raises(AttributeError, match="module 'halfbyte' has no attribute 'colour'"):
        halfbyte.colour  # noqa: B018
