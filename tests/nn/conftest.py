"""Fixtures of the tests of layers that repeat their products."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from halfbyte.backends import registry
from tests.support.repeating import LAYERS, offer_gradients, repeating


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
def asked(monkeypatch: pytest.MonkeyPatch, repeats: list[torch.Size]) -> list[tuple[Any, ...]]:
    """Ops, and what they take, of which layers asked that backend what repeats them."""
    del repeats
    calls: list[tuple[Any, ...]] = []
    real: Callable[..., Any] = registry.prepare

    def listed(op: str, *args: Any) -> Any:
        calls.append((op, *args))
        return real(op, *args)

    monkeypatch.setattr(registry, "prepare", listed)
    return calls


@pytest.fixture
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(params=LAYERS)
def layer_of(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """Makes a layer, of other values with another seed."""
    return LAYERS[request.param]
