"""The poison works: a kernel that leaves part of its output unwritten is seen."""

import torch


def test_unwritten_memory_is_nan_or_the_largest_integer() -> None:
    for made in (torch.empty(5), torch.empty_like(torch.zeros(5)), torch.zeros(1).new_empty(5)):
        assert made.isnan().all()
    assert torch.empty(3, dtype=torch.bfloat16).isnan().all()
    assert torch.empty(3, dtype=torch.uint8).tolist() == [255, 255, 255]
    assert torch.zeros(1, dtype=torch.int8).new_empty(2).tolist() == [127, 127]
