"""What is paged; that paged states step as others do, tests/gpu shows."""

from __future__ import annotations

import torch

from halfbyte.optim.paging import pageable


def test_a_cpu_parameter_is_not_paged() -> None:
    assert not pageable(torch.zeros(1 << 20))
