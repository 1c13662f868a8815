"""Optimizers as their papers and torch's documentation write them: numpy in float64, 8-bit states by brute force.

Written from the formulas, not from halfbyte's code. ``step`` takes what is stored (fp32 states, or codes with scales)
and returns the exact next parameter and states; the caller says what rounding it allows.

One line is not in the papers: where Adam's squares are zero there is no update. Exact squares are zero only if every
gradient was, but 8-bit ones that others stored may be zero while the mean is not, and the quotient would be the mean
over eps. And stored codes are the nearest with one exception: see :func:`excess`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

__all__ = ["OPTIMIZERS", "Settings", "Textbook", "excess"]

Array = npt.NDArray[np.float64]
States = tuple[Array, ...]


@dataclass(frozen=True)
class Settings:
    """Hyper-parameters, none at its default."""

    lr: float = 3e-3
    betas: tuple[float, float, float] = (0.83, 0.971, 0.9973)
    eps: float = 3e-7
    weight_decay: float = 0.07
    alpha: float = 3.5
    grad_scale: float = 0.7


def _adamw(p: Array, g: Array, s: States, o: Settings, t: int) -> tuple[Array, States]:
    """torch.optim.AdamW's documentation."""
    b1, b2, _ = o.betas
    p = p - o.lr * o.weight_decay * p
    m, v = b1 * s[0] + (1 - b1) * g, b2 * s[1] + (1 - b2) * g**2
    m_hat, v_hat = m / (1 - b1**t), v / (1 - b2**t)
    return p - np.where(v > 0, o.lr * m_hat / (np.sqrt(v_hat) + o.eps), 0), (m, v)


def _ademamix(p: Array, g: Array, s: States, o: Settings, t: int) -> tuple[Array, States]:
    """arXiv:2409.03137, algorithm 1."""
    b1, b2, b3 = o.betas
    m1, m2, v = b1 * s[0] + (1 - b1) * g, b3 * s[1] + (1 - b3) * g, b2 * s[2] + (1 - b2) * g**2
    m1_hat, v_hat = m1 / (1 - b1**t), v / (1 - b2**t)
    update = np.where(v > 0, (m1_hat + o.alpha * m2) / (np.sqrt(v_hat) + o.eps), 0)
    return p - o.lr * (update + o.weight_decay * p), (m1, m2, v)


def _lion(p: Array, g: Array, s: States, o: Settings, t: int) -> tuple[Array, States]:
    """arXiv:2302.06675, algorithm 2."""
    b1, b2, _ = o.betas
    update = np.sign(b1 * s[0] + (1 - b1) * g)
    return p - o.lr * (update + o.weight_decay * p), (b2 * s[0] + (1 - b2) * g,)


def _sgd(p: Array, g: Array, s: States, o: Settings, t: int) -> tuple[Array, States]:
    """torch.optim.SGD's documentation; the second beta is the dampening."""
    g = g + o.weight_decay * p
    b = g if t == 1 else o.betas[0] * s[0] + (1 - o.betas[1]) * g
    return p - o.lr * b, (b,)


def _nesterov(p: Array, g: Array, s: States, o: Settings, t: int) -> tuple[Array, States]:
    """The same with nesterov=True."""
    g = g + o.weight_decay * p
    b = g if t == 1 else o.betas[0] * s[0] + (1 - o.betas[1]) * g
    return p - o.lr * (g + o.betas[0] * b), (b,)


def _rmsprop(p: Array, g: Array, s: States, o: Settings, t: int) -> tuple[Array, States]:
    """torch.optim.RMSprop's documentation."""
    g = g + o.weight_decay * p
    v = o.betas[0] * s[0] + (1 - o.betas[0]) * g**2
    return p - o.lr * g / (np.sqrt(v) + o.eps), (v,)


def _adagrad(p: Array, g: Array, s: States, o: Settings, t: int) -> tuple[Array, States]:
    """torch.optim.Adagrad's documentation."""
    g = g + o.weight_decay * p
    total = s[0] + g**2
    return p - o.lr * g / (np.sqrt(total) + o.eps), (total,)


def _adopt(p: Array, g: Array, s: States, o: Settings, t: int) -> tuple[Array, States]:
    """arXiv:2411.02853, algorithm 2, with AdamW's decay; the paper's step 0 is step 1 here."""
    b1, b2, _ = o.betas
    p = p - o.lr * o.weight_decay * p
    if t == 1:
        return p, (s[0], g**2)
    bound = (t - 1) ** 0.25
    m = b1 * s[0] + (1 - b1) * np.clip(g / np.maximum(np.sqrt(s[1]), o.eps), -bound, bound)
    return p - o.lr * m, (m, b2 * s[1] + (1 - b2) * g**2)


Step = Callable[[Array, Array, States, Settings, int], tuple[Array, States]]

OPTIMIZERS: dict[str, tuple[Step, tuple[bool, ...]]] = {
    "adam": (_adamw, (True, False)),
    "ademamix": (_ademamix, (True, True, False)),
    "lion": (_lion, (True,)),
    "momentum": (_sgd, (True,)),
    "nesterov": (_nesterov, (True,)),
    "rmsprop": (_rmsprop, (True,)),
    "adagrad": (_adagrad, (True,)),
    "adopt": (_adopt, (True, False)),
}
"""Name -> one step, and which states use the signed map."""


@dataclass
class Textbook:
    """One parameter under one algorithm.

    Attributes:
        name: Key of :data:`OPTIMIZERS`.
        p: The parameter.
        states: Its states.
        settings: Hyper-parameters.
        steps: Steps taken.
    """

    name: str
    p: Array
    settings: Settings = field(default_factory=Settings)
    states: States = ()
    steps: int = 0

    def __post_init__(self) -> None:
        self.states = self.states or tuple(np.zeros_like(self.p) for _ in OPTIMIZERS[self.name][1])

    def step(self, g: Array) -> None:
        """One exact step."""
        self.steps += 1
        function, _ = OPTIMIZERS[self.name]
        self.p, self.states = function(self.p, g * self.settings.grad_scale, self.states, self.settings, self.steps)


def excess(codes: npt.NDArray[np.int64], state: Array, scale: Array, levels: Array) -> Array:
    """How much farther from each exact state its code is than the nearest one, as a share of the block's scale.

    The only exception to nearest: squares (levels that begin at zero) above zero may not become zero, so to them that
    code is infinitely far.
    """
    scaled = np.where(scale > 0, state / np.where(scale > 0, scale, 1), 0)
    distance = np.abs(scaled[:, None] - levels[None, :])
    if levels[0] == 0:
        distance[scaled > 0, 0] = np.inf
    return distance[np.arange(len(state)), codes] - distance.min(axis=1)
