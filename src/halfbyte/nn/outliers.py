"""Finding the outlier dimensions of a model's linear layers, as the emergent-outlier experiments did."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from halfbyte.errors import ArgumentError, UnsupportedError

__all__ = ["OutlierAwareLinear", "OutlierTracer", "find_outlier_dims", "outlier_hook"]

logger = logging.getLogger(__name__)


def find_outlier_dims(
    weight: Tensor, reduction_dim: int = 0, zscore: float = 4.0, topk: int | None = None, rdm: bool = False
) -> Tensor:
    """Indices whose standard deviation along ``reduction_dim`` stands out from the others'.

    Args:
        weight: A matrix.
        reduction_dim: Dimension along which the deviation is taken.
        zscore: How many deviations (of the deviations) above their mean count as outlier.
        topk: Return the largest ``topk`` instead.
        rdm: Return ``topk`` random indices instead, for comparison.

    >>> weight = torch.ones(8, 100).normal_(generator=torch.Generator().manual_seed(0))
    >>> weight[:, 17] *= 50
    >>> find_outlier_dims(weight).tolist()
    [17]
    """
    if rdm:
        if topk is None:
            raise ArgumentError("rdm=True without topk", expected="how many random dimensions")
        return torch.randint(0, weight.shape[1], size=(topk,), device=weight.device)
    deviation = weight.std(reduction_dim)
    if topk is not None:
        return torch.topk(deviation.abs(), k=topk, dim=0).indices
    return torch.where((deviation - deviation.mean()) / deviation.std() > zscore)[0]


class OutlierTracer:
    """Notes, during the first forward pass, which input dimensions of every linear layer hold outliers."""

    _instance: OutlierTracer | None = None

    def __init__(self) -> None:
        raise RuntimeError("Call get_instance() instead")

    @classmethod
    def get_instance(cls) -> OutlierTracer:
        """The one tracer of this process."""
        if cls._instance is None:
            cls._instance = cls.__new__(cls)
        return cls._instance

    def initialize(self, model: torch.nn.Module) -> None:
        """Watch every ``torch.nn.Linear`` of ``model``."""
        self.last_w = None
        self.current_outlier_dims = None
        self.hvalues: list[int] = []
        self.outliers: list[Tensor] = []
        self.hvalue2outlier_idx: dict[int, Tensor] = {}
        self.initialized = True
        linears = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
        self.hooks = [module.register_forward_pre_hook(outlier_hook) for module in linears]

    def is_initialized(self) -> bool:
        """Whether :meth:`initialize` was called."""
        return getattr(self, "initialized", False)

    def get_hvalue(self, weight: Tensor) -> int:
        """What a weight is known by."""
        return weight.data.untyped_storage().data_ptr()

    def get_outliers(self, weight: Tensor) -> Tensor | None:
        """Outlier dimensions of that weight's input; None where none were noted."""
        if not self.is_initialized():
            logger.warning("OutlierTracer.initialize(model) was not called: no outliers are known")
            return None
        return self.hvalue2outlier_idx.get(self.get_hvalue(weight))


def outlier_hook(module: torch.nn.Module, input: tuple[Tensor, ...]) -> None:  # noqa: A002 - torch's name
    """Note the outlier dimensions of a layer's input, by its weight or, for the first layer, by the input itself."""
    tracer = OutlierTracer.get_instance()
    weight: Any = module.weight
    known = tracer.get_hvalue(weight)
    if known in tracer.hvalue2outlier_idx:
        # A second pass begins: all layers were seen.
        for hook in tracer.hooks:
            hook.remove()
        return
    tracer.outliers.append(find_outlier_dims(weight))
    tracer.hvalues.append(known)
    if len(tracer.outliers) > 1:
        tracer.hvalue2outlier_idx[known] = tracer.outliers[-1]
        return
    merged = input[0].reshape(-1, input[0].shape[-1])
    # There is no weight before the first layer: both the spread and the magnitude of the input decide.
    spread = find_outlier_dims(merged, zscore=3)
    large = torch.where((merged.abs() > 6).any(dim=0))[0]
    tracer.hvalue2outlier_idx[known] = torch.cat([spread, large]).unique()


class OutlierAwareLinear(torch.nn.Linear):
    """Base of layers that treat outlier dimensions of their input apart: override the two methods that raise.

    Args:
        input_features: Length of the input's last dimension.
        output_features: Length of the output's last dimension.
        bias: Whether there is one.
        device: Where the weight is created.
    """

    def __init__(
        self,
        input_features: int,
        output_features: int,
        bias: bool = True,
        device: torch.device | str | int | None = None,
    ) -> None:
        super().__init__(input_features, output_features, bias, device)
        self.outlier_dim: Tensor | None = None
        self.is_quantized = False

    def forward_with_outliers(self, x: Tensor, outlier_idx: Tensor | None) -> Tensor:
        """The product; for subclasses.

        Raises:
            UnsupportedError: Not overridden.
        """
        del x, outlier_idx
        raise UnsupportedError(
            f"{type(self).__name__} has no forward_with_outliers", hint="override forward_with_outliers(x, outlier_idx)"
        )

    def quantize_weight(self, w: Tensor, outlier_idx: Tensor | None) -> Tensor:
        """The weight as it shall be used; for subclasses.

        Raises:
            UnsupportedError: Not overridden.
        """
        del w, outlier_idx
        raise UnsupportedError(
            f"{type(self).__name__} has no quantize_weight", hint="override quantize_weight(w, outlier_idx)"
        )

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Quantize the weight once, then the product that the subclass defines."""
        if self.outlier_dim is None:
            tracer = OutlierTracer.get_instance()
            if not tracer.is_initialized():
                logger.warning("OutlierTracer.initialize(model) was not called: no outliers are known")
            self.outlier_dim = tracer.get_outliers(self.weight)
        if not self.is_quantized:
            self.weight.data.copy_(self.quantize_weight(self.weight, self.outlier_dim))
            self.is_quantized = True
        return self.forward_with_outliers(x, self.outlier_dim)
