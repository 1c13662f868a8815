"""Mixture-of-experts layers whose stacked expert weights are kept in 4 bits."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from halfbyte.autograd.grouped_4bit import group_rows, grouped_matmul_4bit
from halfbyte.errors import QuantStateMissingError, UnsupportedError
from halfbyte.formats import blocks
from halfbyte.functional import dequantize_4bit
from halfbyte.nn.compute_dtype import compute_dtype_for
from halfbyte.nn.holds_4bit import HoldsParams4bit, loadable, pop_stats
from halfbyte.nn.params import Params4bit
from halfbyte.quant_state import QuantState

__all__ = ["Experts4bit", "LowRank", "why_not_experts"]

LowRank = Callable[[Tensor, Tensor, Tensor], Tensor]
"""What adds to a product: of the rows, ``order`` and ``ends`` to ``(products, N)``."""


def _names(module: torch.nn.Module) -> tuple[str, str]:
    return ("gate_up_proj" if getattr(module, "has_gate", True) else "up_proj"), "down_proj"


def why_not_experts(module: torch.nn.Module) -> str | None:
    """Why :class:`Experts4bit` cannot take ``module`` over; None where it can; "" for one that is no experts' layer.

    >>> why_not_experts(torch.nn.Linear(4, 4))
    ''
    """
    stacked = {name: p for name, p in module.named_parameters(recurse=False) if p.dim() == 3}
    if not stacked or not isinstance(getattr(module, "num_experts", None), int):
        return ""
    kind = type(module).__name__
    missing = [name for name in ("is_transposed", "has_bias", "_apply_gate") if not hasattr(module, name)]
    if missing:
        return f"experts of {kind}, which multiplies them in a way of its own"
    if set(stacked) != set(_names(module)):
        return f"experts of {kind}, whose weights are {', '.join(sorted(stacked))}"
    for name, parameter in stacked.items():
        if parameter[0].numel() % blocks.DEFAULT_BLOCKSIZE_4BIT:
            return (
                f"experts of shape {tuple(parameter.shape[1:])} ({name}): "
                f"each must be whole blocks of {blocks.DEFAULT_BLOCKSIZE_4BIT} values"
            )
    return None


class Experts4bit(HoldsParams4bit):
    """Mixed into the class of an experts' layer of transformers: its stacked weights are Params4bit.

    ``Experts4bit.take_over(module, ...)`` turns a layer into one in place. Each expert is quantized by itself, row by
    row as it is stored; the state of all of them is one, of shape ``(experts, rows, columns)``.

    Attributes:
        four_bit_names: Names of the 4-bit parameters.
        compute_dtype: dtype of the products; None takes a 16-bit input's own and, for fp32 inputs, what the device
            multiplies natively.
        low_rank: What adapters add, by parameter, while they are active.
    """

    four_bit_names: tuple[str, ...]
    compute_dtype: torch.dtype | None
    low_rank: dict[str, list[LowRank]]
    states: dict[str, QuantState]
    num_experts: int
    is_transposed: bool

    @staticmethod
    def take_over(
        module: torch.nn.Module,
        *,
        compute_dtype: torch.dtype | None = None,
        compress_statistics: bool = True,
        quant_type: str = "nf4",
        quant_storage: torch.dtype = torch.uint8,
    ) -> Experts4bit:
        """Turn ``module`` into a 4-bit one, in place; its weights become codes on their next move to a device.

        Raises:
            UnsupportedError: It is no experts' layer, or one of another kind.
        """
        reason = why_not_experts(module)
        if reason is not None:
            raise UnsupportedError(reason or f"{type(module).__name__} has no stacked experts")
        names = _names(module)
        for name in names:
            weight = Params4bit(
                module.get_parameter(name).data,
                compress_statistics=compress_statistics,
                quant_type=quant_type,
                quant_storage=quant_storage,
            )
            module.register_parameter(name, weight)
        module.__class__ = _four_bit(type(module))
        taken: Any = module
        taken.four_bit_names = names
        taken.compute_dtype = compute_dtype
        taken.low_rank = {}
        taken.states = {}
        return taken

    def give_back(self, dtype: torch.dtype | None = None) -> torch.nn.Module:
        """The layer with dequantized weights and its own class again, in place."""
        original = type(self).original  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType, reportUnknownVariableType]
        for name in self.four_bit_names:
            if self.is_quantized(name):
                values = dequantize_4bit(getattr(self, name).data, self.state_of(name))
                self.register_parameter(name, torch.nn.Parameter(values.to(dtype or values.dtype), False))
        for attribute in ("four_bit_names", "compute_dtype", "low_rank", "states"):
            del self.__dict__[attribute]
        self.__class__ = original
        return self

    def is_quantized(self, name: str) -> bool:
        """Whether that parameter holds codes."""
        return getattr(getattr(self, name), "quant_state", None) is not None or name in self.states

    def state_of(self, name: str) -> QuantState:
        """The state of that parameter: its own, or what is known of it where a sharding wrapper lost it.

        Raises:
            QuantStateMissingError: It was never quantized.
        """
        state = getattr(getattr(self, name), "quant_state", None)
        if state is None:
            state = self.states.get(name)
        if state is None:
            raise QuantStateMissingError(
                f"{type(self).__name__} was called before its {name} was quantized",
                expected="one move to a device, which quantizes",
                hint='call module.to("cuda") or module.to("cpu") first',
            )
        return state

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The weighted sum of every token's experts.

        Args:
            hidden_states: ``(tokens, hidden)``.
            top_k_index: ``(tokens, chosen)``: experts of each token.
            top_k_weights: ``(tokens, chosen)``: their weights.
        """
        this: Any = self
        up, down = self.four_bit_names
        if not self.is_quantized(up) and not self.is_quantized(down):  # its checkpoint held plain values
            return super().forward(hidden_states, top_k_index, top_k_weights)
        order, ends = group_rows(top_k_index, self.num_experts)
        inner = self._product(up, hidden_states, order, ends)
        inner = this._apply_gate(inner) if getattr(self, "has_gate", True) else this.act_fn(inner)
        outer = self._product(down, inner, order, ends)
        if getattr(self, "has_post_expert_norm", False):
            outer = this.post_expert_norm(outer)
        weighted = outer * top_k_weights.reshape(-1, 1)
        summed = weighted.view(top_k_index.shape[0], -1, weighted.shape[-1]).sum(1)
        return summed.to(hidden_states.dtype)

    def add_to(self, name: str, change: Tensor) -> None:
        """Add ``change`` to the values of that parameter and quantize them again, as merged adapters need.

        Raises:
            ArgumentError: The sum holds NaN or inf. The parameter stays as it was.
        """
        own, state = getattr(self, name), self.state_of(name)
        values = dequantize_4bit(own.data, state)
        settings: dict[str, Any] = {**vars(own), "bnb_quantized": False, "quant_state": None, "requires_grad": False}
        summed = (values.float() + change.to(values.device).float()).to(values.dtype)
        self._parameters[name] = Params4bit(summed, **settings).to(own.device)
        self._remember(name)

    def _product(self, name: str, x: Tensor, order: Tensor, ends: Tensor) -> Tensor:
        dtype = compute_dtype_for(x, self.compute_dtype)
        bias = getattr(self, f"{name}_bias") if getattr(self, "has_bias", False) else None
        product = grouped_matmul_4bit(
            x.to(dtype),
            getattr(self, name),
            self.state_of(name),
            order,
            ends,
            transposed=self.is_transposed,
            bias=bias,
        ).to(x.dtype)
        for extra in self.low_rank.get(name, ()):
            product = product + extra(x, order, ends)
        return product

    def held_names(self) -> tuple[str, ...]:
        return self.four_bit_names

    def _remember(self, name: str) -> None:
        state = getattr(self._parameters[name], "quant_state", None)
        if state is None:
            self.states.pop(name, None)
        else:
            self.states[name] = state

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in self.four_bit_names:
            if self.is_quantized(name):
                for key, value in self.state_of(name).as_dict(packed=True).items():
                    destination[f"{prefix}{name}.{key}"] = value if keep_vars else value.detach()

    def _loadable(self, name: str, state_dict: dict[str, Any], prefix: str, assign: bool) -> Params4bit | None:
        stats, weight = pop_stats(state_dict, f"{prefix}{name}")
        return None if weight is None else loadable(getattr(self, name), self.shape_of(name), weight, stats, assign)

    def shape_of(self, name: str) -> tuple[int, ...]:
        """Shape of that parameter before it was quantized: experts, rows, columns."""
        own: Any = getattr(self, name)
        if self.is_quantized(name):
            return tuple(self.state_of(name).shape or ())
        return tuple(own.shape)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The class is made on the spot: whoever reads this makes it again.
        return _rebuild, (type(self).original,), self.__dict__.copy()  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType]


@functools.cache
def _four_bit(original: type[torch.nn.Module]) -> type[Experts4bit]:
    members: Mapping[str, Any] = {"original": original, "__module__": __name__, "__doc__": Experts4bit.__doc__}
    return type(f"{original.__name__}4bit", (Experts4bit, original), dict(members))


def _rebuild(original: type[torch.nn.Module]) -> Experts4bit:
    kind = _four_bit(original)
    return kind.__new__(kind)
