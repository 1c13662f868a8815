"""Which backend computes: priority, declared reasons, the forced one, and the explanation."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from halfbyte import backends
from halfbyte.backends import Backend, registry
from halfbyte.errors import ArgumentError, UnsupportedError

ops = torch.ops.halfbyte
CALL = (torch.ones(64), 64, "nf4", torch.uint8)


@pytest.fixture
def added() -> Iterator[Callable[..., Backend]]:
    """Registers backends whose module is loaded already, and removes them after the test."""
    names: list[str] = []

    def add(name: str, priority: int, **named: Any) -> Backend:
        names.append(name)
        devices = named.pop("devices", frozenset({"cpu"}))
        return backends.register(Backend(name, devices, priority, "halfbyte.backends.reference", **named))

    yield add
    for name in names:
        backends.unregister(name)


def answer(value: float) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    return lambda *_: (
        torch.zeros(32, 1, dtype=torch.uint8),
        torch.tensor([value]),
    )


def test_the_highest_priority_computes(added: Callable[..., Backend]) -> None:
    for name, priority in (("low", 1000), ("high", 2000)):
        added(name, priority)
        backends.implements(name, "quantize_4bit")(answer(priority))
    assert float(ops.quantize_4bit(*CALL)[1]) == 2000


def test_a_backend_that_declines_leaves_the_call_to_the_next(added: Callable[..., Backend]) -> None:
    added("picky", 2000)
    backends.implements("picky", "quantize_4bit", declines=lambda A, *_: "too small" if A.numel() < 100 else None)(
        answer(5.0)
    )
    assert float(ops.quantize_4bit(*CALL)[1]) == 1.0
    assert float(ops.quantize_4bit(torch.ones(100), *CALL[1:])[1][0]) == 5.0


def test_the_explanation_names_every_backend_with_its_reason(added: Callable[..., Backend]) -> None:
    added("picky", 2002)
    backends.implements("picky", "quantize_4bit", declines=lambda *_: "too small")(answer(5.0))
    added("elsewhere", 2001, devices=frozenset({"cuda", "xpu"}))
    added("absent", 2000, why_not=lambda: "its package is not installed")
    added("idle", 1999)
    found = {verdict.backend: verdict.reason for verdict in backends.explain("quantize_4bit", *CALL)}
    assert found["picky"] == "too small"
    assert found["elsewhere"] == "serves cuda, xpu, not cpu"
    assert found["absent"] == "its package is not installed"
    assert found["idle"] == "does not implement quantize_4bit"
    assert found["reference"] is None
    assert next(iter(found)) == "picky"


def test_where_all_decline_the_error_lists_the_reasons(
    added: Callable[..., Backend], only_backend: Callable[[str], None]
) -> None:
    added("picky", 2000)
    backends.implements("picky", "quantize_4bit", declines=lambda *_: "too small")(answer(5.0))
    only_backend("picky")
    with pytest.raises(
        UnsupportedError, match=r"no backend computes quantize_4bit on cpu .*picky: too small"
    ) as caught:
        ops.quantize_4bit(*CALL)
    assert "reference: HALFBYTE_BACKEND=picky asks for another" in str(caught.value)
    assert isinstance(caught.value, NotImplementedError)


def test_an_unknown_forced_backend_is_an_error(only_backend: Callable[[str], None]) -> None:
    only_backend("turbo")
    with pytest.raises(ArgumentError, match=r"HALFBYTE_BACKEND='turbo'; expected one of .*reference"):
        ops.quantize_4bit(*CALL)


def test_an_op_that_is_not_defined_cannot_be_implemented() -> None:
    with pytest.raises(ArgumentError, match="op 'quantize_5bit' is not defined"):
        backends.implements("reference", "quantize_5bit")


def test_a_backend_that_is_not_registered_cannot_implement() -> None:
    with pytest.raises(ArgumentError, match="backend 'turbo' is not registered"):
        backends.implements("turbo", "quantize_4bit")


def test_a_name_is_registered_once(added: Callable[..., Backend]) -> None:
    added("twice", 1)
    with pytest.raises(ArgumentError, match="registered already"):
        backends.register(Backend("twice", frozenset(), 1, "halfbyte.backends.reference"))


def test_an_unregistered_backend_computes_no_more(added: Callable[..., Backend]) -> None:
    added("brief", 2000)
    backends.implements("brief", "quantize_4bit")(answer(5.0))
    assert float(ops.quantize_4bit(*CALL)[1]) == 5.0
    backends.unregister("brief")
    assert float(ops.quantize_4bit(*CALL)[1]) == 1.0


def test_the_reference_implements_every_op() -> None:
    backends.explain("quantize_4bit", *CALL)
    missing = [op for op in registry.defined_ops() if "reference" not in registry._implementations.get(op, {})]
    assert missing == []
