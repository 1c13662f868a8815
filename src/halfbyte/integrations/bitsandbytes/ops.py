"""``torch.ops.bitsandbytes``: bitsandbytes' schemas, computed by halfbyte's ops.

Nothing of halfbyte is imported until one of them runs: they are defined as soon as both torch and the stand-in for
bitsandbytes are loaded, which may be in the middle of another import. As with bitsandbytes, none has a gradient.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["ENTRY_POINT_GROUP", "OPTIMIZER_OPS", "SCHEMAS", "define", "load_backends"]

ENTRY_POINT_GROUP = "bitsandbytes.backends"
"""Packages add kernels for other devices by an entry point of this group: a function without arguments."""

logger = logging.getLogger("bitsandbytes")

_DEQUANTIZE_4BIT = "Tensor A, Tensor absmax, int blocksize, str quant_type, int[] shape, ScalarType dtype"
_DEQUANTIZE_8BIT = "Tensor A, Tensor absmax, Tensor code, int blocksize, ScalarType dtype"
_GEMV = "Tensor A, Tensor B, int[] shapeB, Tensor absmax, Tensor code, int blocksize"

SCHEMAS: dict[str, str] = {
    "int8_mixed_scaled_mm": "(Tensor A, Tensor CA, Tensor CB, Tensor SCA, Tensor SCB, Tensor? outlier_cols=None, "
    "Tensor? bias=None) -> (Tensor, Tensor?)",
    "int8_scaled_mm": "(Tensor A, Tensor B, Tensor row_stats, Tensor col_stats, Tensor? bias=None, "
    "ScalarType? dtype=None) -> Tensor",
    "int8_linear_matmul": "(Tensor A, Tensor B) -> Tensor",
    "int8_linear_matmul.out": "(Tensor A, Tensor B, Tensor! out) -> ()",
    "int8_vectorwise_quant": "(Tensor A, float threshold=0.0) -> (Tensor, Tensor, Tensor?)",
    "int8_vectorwise_dequant": "(Tensor A, Tensor stats) -> Tensor",
    "int8_mm_dequant": "(Tensor A, Tensor row_stats, Tensor col_stats, ScalarType? dtype=None, Tensor? bias=None) "
    "-> Tensor",
    "int8_double_quant": "(Tensor A, float threshold=0.0) -> (Tensor, Tensor, Tensor, Tensor, Tensor?)",
    "dequantize_4bit": f"({_DEQUANTIZE_4BIT}) -> Tensor",
    "dequantize_4bit.out": f"({_DEQUANTIZE_4BIT}, Tensor! out) -> ()",
    "quantize_4bit": "(Tensor A, int blocksize, str quant_type, ScalarType quant_storage) -> (Tensor, Tensor)",
    "gemm_4bit": "(Tensor A, Tensor B, int[] shapeB, Tensor absmax, int blocksize, str quant_type, Tensor? bias=None, "
    "Tensor? absmax_8bit=None, Tensor? absmax_code=None, Tensor? absmax_offset=None) -> Tensor",
    "dequantize_blockwise": f"({_DEQUANTIZE_8BIT}) -> Tensor",
    "dequantize_blockwise.out": f"({_DEQUANTIZE_8BIT}, Tensor! out) -> ()",
    "quantize_blockwise": "(Tensor A, Tensor code, int blocksize) -> (Tensor, Tensor)",
    "gemv_4bit": f"({_GEMV}) -> Tensor",
    "gemv_4bit.out": f"({_GEMV}, Tensor! out) -> ()",
    "optimizer_update_32bit": "(str optimizer_name, Tensor(a0!) g, Tensor(a1!) p, Tensor(a2!) state1, "
    "Tensor(a3!)? state2, Tensor(a4!)? unorm_vec, float max_unorm, float param_norm, float beta1, float beta2, "
    "float beta3, float alpha, float eps, float weight_decay, int step, float lr, float gnorm_scale, "
    "bool skip_zeros=False) -> ()",
    "optimizer_update_8bit_blockwise": "(str optimizer_name, Tensor(a0!) g, Tensor(a1!) p, Tensor(a2!) state1, "
    "Tensor(a3!)? state2, float beta1, float beta2, float beta3, float alpha, float eps, int step, float lr, "
    "Tensor(a4!) qmap1, Tensor(a5!)? qmap2, Tensor(a6!) absmax1, Tensor(a7!)? absmax2, float weight_decay, "
    "float gnorm_scale, bool skip_zeros=False) -> ()",
}
"""Op, with its overload, -> its schema, as bitsandbytes 0.50.2 has it."""

OPTIMIZER_OPS = ("optimizer_update_32bit", "optimizer_update_8bit_blockwise")

_libraries: list[Any] = []  # an op lives as long as the library object that defined it


def define() -> bool:
    """Define the ops, once. Returns False where somebody (a real bitsandbytes) has defined them before."""
    if _libraries or torch._C._jit_get_schemas_for_operator("bitsandbytes::quantize_4bit"):  # pyright: ignore[reportPrivateUsage]
        return bool(_libraries)
    library = torch.library.Library("bitsandbytes", "DEF")
    _libraries.append(library)
    for name, schema in SCHEMAS.items():
        kernel = _optimizer_step(name) if name in OPTIMIZER_OPS else _kernel(name)
        library.define(name + schema)
        library.impl(name, kernel, "CompositeExplicitAutograd")
        fake = _nothing if "!" in schema else kernel
        torch.library.register_fake(f"bitsandbytes::{name}", fake, lib=library)
    load_backends()
    return True


def load_backends() -> None:
    """Call every entry point of :data:`ENTRY_POINT_GROUP`. One that fails is reported, and left out."""
    from importlib.metadata import entry_points

    for point in entry_points(group=ENTRY_POINT_GROUP):
        try:
            point.load()()
        except Exception as error:  # another package's code: its defect must not take this process down
            logger.warning(
                "backend %s (%s) could not be loaded and is left out: %s: %s",
                point.name,
                point.value,
                type(error).__name__,
                error,
            )


def _kernel(name: str) -> Callable[..., Any]:
    op, _, overload = name.partition(".")

    def call(*args: Any, **kwargs: Any) -> Any:
        importlib.import_module("halfbyte.backends")
        ours = getattr(torch.ops.halfbyte, op)
        if not overload:
            return ours.default(*args, **kwargs)
        *inputs, out = args if "out" not in kwargs else (*args, kwargs.pop("out"))
        return ours.out(*inputs, **kwargs, out=out)

    return call


def _optimizer_step(name: str) -> Callable[..., None]:
    names = [part.strip().split()[-1].partition("=")[0] for part in SCHEMAS[name][1:].rpartition(") ->")[0].split(",")]

    def call(*args: Any, **kwargs: Any) -> None:
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        given.pop("param_norm", None)  # halfbyte computes it where it is needed
        getattr(importlib.import_module("halfbyte.functional"), name)(**given)

    return call


def _nothing(*_args: Any, **_named: Any) -> None:
    return None
