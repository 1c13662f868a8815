"""Tensors that kernels fill are laid out as torch's own."""

import pytest
import torch

from halfbyte.backends.cpu import memory


@pytest.mark.parametrize("shape", [(), (0,), (7,), (2, 3, 5), (3, 0), (2, 0, 4), (memory.LARGE, 1)])
def test_strides_are_torchs_own(shape: tuple[int, ...]) -> None:
    made = memory.empty(shape, torch.float32)
    assert made.dtype == torch.float32
    assert made.shape == shape
    assert made.stride() == torch.empty(shape).stride()
