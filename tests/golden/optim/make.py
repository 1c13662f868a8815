"""Writes the golden files of this folder with bitsandbytes 0.50.2 on a CPU: state dicts, next steps, signatures.

    python tests/golden/optim/make.py

``states.pt``: for each case the state dict after three steps, the parameters then, and those after a fourth step.
``signatures.json``: every optimizer class with the names and defaults of its arguments.
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import bitsandbytes.optim as optim
import torch

HERE = Path(__file__).parent
SHAPES = ((13, 100), (7,))
ADAM = {"lr": 2e-2, "betas": (0.85, 0.95), "eps": 1e-7, "weight_decay": 0.1}
MIX = {**ADAM, "betas": (0.85, 0.95, 0.99), "alpha": 3.0}
SGD = {"lr": 2e-2, "momentum": 0.8, "weight_decay": 0.1}
ROOT = {"lr": 2e-2, "eps": 1e-7, "weight_decay": 0.1}

CASES: dict[str, tuple[str, dict[str, Any], torch.dtype]] = {
    "adam8": ("Adam8bit", ADAM, torch.float32),
    "adamw8": ("AdamW8bit", ADAM, torch.bfloat16),
    "adamw32": ("AdamW", ADAM, torch.float32),
    "lion8": ("Lion8bit", {"lr": 2e-2, "betas": (0.85, 0.95), "weight_decay": 0.1}, torch.float32),
    "lion32": ("Lion32bit", {"lr": 2e-2, "betas": (0.85, 0.95), "weight_decay": 0.1}, torch.bfloat16),
    "ademamix8": ("AdEMAMix8bit", MIX, torch.float32),
    "ademamix8scheduled": ("AdEMAMix8bit", {**MIX, "t_alpha": 10, "t_beta3": 10}, torch.float32),
    "ademamix32": ("AdEMAMix", MIX, torch.float32),
    "sgd8": ("SGD8bit", SGD, torch.float32),
    "rmsprop8": ("RMSprop8bit", {**ROOT, "alpha": 0.9}, torch.float32),
    "adagrad8": ("Adagrad8bit", ROOT, torch.float32),
    "lamb32": ("LAMB32bit", {**ADAM, "max_unorm": 1e6}, torch.float32),
    "lars32": ("LARS32bit", {**SGD, "max_unorm": 0.02}, torch.float32),
    "lars32loose": ("LARS32bit", {**SGD, "max_unorm": 1e6}, torch.float32),
}


def draw(step: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Gradients of a step, or for step 0 the parameters; the test draws the same."""
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]


def run(name: str, settings: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Three steps, what is saved then, and one more."""
    params = [torch.nn.Parameter(value) for value in draw(0, dtype)]
    optimizer = getattr(optim, name)(params, **settings, min_8bit_size=1000)
    for step in (1, 2, 3, 4):
        if step == 4:
            saved = dict(optimizer.state_dict().items())
            saved = torch.load(_through_a_file(saved))
            before = [p.detach().clone() for p in params]
        for p, gradient in zip(params, draw(step, dtype), strict=True):
            p.grad = gradient
        optimizer.step()
    return {"class": name, "settings": settings, "dtype": dtype, "state_dict": saved, "before": before,
            "after": [p.detach().clone() for p in params]}  # fmt: skip


def _through_a_file(value: Any) -> Path:
    path = HERE / "scratch.pt"
    torch.save(value, path)
    return path


def signatures() -> dict[str, list[list[Any]]]:
    """Argument names and the text of their defaults (None for those without)."""
    found: dict[str, list[list[Any]]] = {}
    for name in dir(optim):
        cls = getattr(optim, name)
        if inspect.isclass(cls) and issubclass(cls, torch.optim.Optimizer):
            arguments = list(inspect.signature(cls.__init__).parameters.values())[1:]
            found[name] = [[a.name, None if a.default is a.empty else repr(a.default)] for a in arguments]
    return found


def main() -> None:
    """Write both files."""
    torch.save({key: run(*case) for key, case in CASES.items()}, HERE / "states.pt")
    (HERE / "scratch.pt").unlink()
    (HERE / "signatures.json").write_text(json.dumps(signatures(), indent=1) + "\n")
    print((HERE / "states.pt").stat().st_size, "bytes")


if __name__ == "__main__":
    main()
