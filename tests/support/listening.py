"""A mode that hears every op: while it is on, nothing goes around torch's dispatcher."""

from __future__ import annotations

from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["Listener"]


class Listener(TorchDispatchMode):
    """Notes the ops that pass."""

    def __init__(self) -> None:
        super().__init__()
        self.heard: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.heard.append(str(func))
        return func(*args, **(kwargs or {}))
