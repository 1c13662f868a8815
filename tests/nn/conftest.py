"""Fixtures of the tests of layers that repeat their products."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.support.repeating import offer_gradients, repeating


@pytest.fixture
def repeats() -> Iterator[list[torch.Size]]:
    """A backend that offers to repeat products with the weight as it was when asked; lists the repeated shapes."""
    with repeating() as seen:
        yield seen


@pytest.fixture
def repeated_gradients(repeats: list[torch.Size]) -> list[torch.Size]:
    """The same backend offers to repeat gradients to the input as well; lists their shapes."""
    del repeats
    return offer_gradients()


@pytest.fixture
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield
