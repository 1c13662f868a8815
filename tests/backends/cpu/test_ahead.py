"""What is compiled ahead is what forward and backward passes then ask for."""

import dataclasses
from typing import Any

import pytest
import torch

from halfbyte.backends.cpu import ahead, four_bit, fused, host, tiled
from halfbyte.backends.cpu import matmul as cpu
from halfbyte.backends.cpu.kernels.levels import LEVELS
from tests.backends.cpu.nesting import nest

BATCHES = (1, 2, 3, 4, 5, 8, 9, 16, 17, 33, 100)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", [level.name for level in LEVELS])
def test_every_kernel_of_a_pass_is_compiled_ahead(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, dict[str, Any]]] = []

    def kernel(name: str, **variant: Any) -> Any:
        asked.append((name, variant))
        return lambda *_arguments: None

    packed, absmax = four_bit.quantize_4bit(torch.randn(64, 256), 64, "nf4", torch.uint8)
    level = dataclasses.replace(host.level_named(name))  # an object of its own: kernels are kept by it
    monkeypatch.setattr(host, "level", lambda: level)
    for module in (four_bit, fused, tiled):
        monkeypatch.setattr(module, "kernel", kernel)
    for scales in ((absmax,), nest(absmax)):
        for batch in BATCHES:
            x, more = torch.randn(batch, 256).to(dtype), (None, *scales[1:])
            cpu.gemm_4bit(x, packed, (64, 256), scales[0], 64, "nf4", *more)
            cpu.gemm_4bit_dgrad(x[:, :64], packed, (64, 256), scales[0], 64, "nf4", *scales[1:])
    planned = ahead.plan((dtype,), (64,), (False, True))
    assert len(asked) > 8
    assert [one for one in asked if one not in planned] == []
