"""Everything here is about the reference backend, whatever else this machine has."""

from collections.abc import Callable

import pytest


@pytest.fixture(autouse=True)
def reference(only_backend: Callable[[str], None]) -> None:
    """The reference computes."""
    only_backend("reference")
