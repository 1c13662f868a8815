"""Resumes, with bitsandbytes, the optimizers that halfbyte saved; run by test_optimizers.py.

python read_with_peer.py WRITTEN.pt RESULT.pt
"""

from __future__ import annotations

import sys

import bitsandbytes.optim as optim
import torch


def main(source: str, target: str) -> None:
    """One more step of every case."""
    found: dict[str, list[torch.Tensor]] = {}
    for name, case in torch.load(source).items():
        params = [torch.nn.Parameter(value) for value in case["before"]]
        optimizer = getattr(optim, case["class"])(params, **case["settings"], min_8bit_size=1000)
        optimizer.load_state_dict(case["state_dict"])
        for p, gradient in zip(params, case["gradients"], strict=True):
            p.grad = gradient
        optimizer.step()
        found[name] = [p.detach() for p in params]
    torch.save(found, target)


if __name__ == "__main__":
    main(*sys.argv[1:])
