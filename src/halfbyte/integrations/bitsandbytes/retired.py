"""Names of bitsandbytes that halfbyte does not carry out: what to use instead, and stand-ins that say so when used.

A stand-in can be imported, so that a script that never calls it runs; called, or made an instance of, it raises.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple, NoReturn

from halfbyte.errors import UnsupportedError

__all__ = ["INTERNAL", "MODULES", "RETIRED", "Retired", "advice_for_module", "stand_in"]


class Retired(NamedTuple):
    """Why a name is not there.

    Attributes:
        use: What does the same, as something to type where there is one.
        gone: Version of bitsandbytes that dropped it; "" where 0.50 still has it.
        kind: ``"function"``, ``"class"`` or ``"value"``.
    """

    use: str
    gone: str = ""
    kind: str = "function"

    @property
    def hint(self) -> str:
        """The replacement as an instruction."""
        return self.use if self.use.startswith("nothing") else f"use {self.use}"


def _group(module: str, gone: str, kind: str = "function", **uses: str) -> dict[str, Retired]:
    return {f"{module}.{name}".lstrip("."): Retired(use, gone, kind) for name, use in uses.items()}


_ROWS = "nothing: int8 weights lie in rows, and are multiplied so"
_PRODUCT = "functional.int8_linear_matmul(A, B)"
_SPARSE = "torch.sparse: outliers are found and multiplied inside functional.int8_mixed_scaled_mm"
_STEP = "functional.optimizer_update_32bit and functional.optimizer_update_8bit_blockwise, which take the name"
_DOCTOR = "`python -m bitsandbytes`, which runs halfbyte's doctor"
_LIBRARY = "nothing: halfbyte has no compiled library; `python -m bitsandbytes` shows what computes here"
_ROWWISE = "functional.int8_vectorwise_quant(A)"

RETIRED: dict[str, Retired] = {
    **_group("", "0.46", mm_cublas="matmul(A, B)", bmm_cublas="torch.bmm(A, B)", matmul_cublas="matmul(A, B)"),
    **_group(
        "functional",
        "0.46",
        arange="torch.arange",
        double_quant="functional.int8_double_quant(A, threshold=...), whose last result are columns, not a COO tensor",
        extract_outliers="weight[:, columns]",
        get_special_format_str=_ROWS,
        get_transform_buffer=_ROWS,
        get_transform_func=_ROWS,
        igemmlt=_PRODUCT,
        mm_dequant="functional.int8_mm_dequant(A, row_stats, col_stats, bias=bias)",
        nvidia_transform=_ROWS,
        pipeline_test="nothing: it tested a kernel",
        transform=_ROWS,
        dequant_min_max="functional.dequantize_blockwise",
        vectorwise_dequant="functional.int8_vectorwise_dequant(A, stats)",
    ),
    **_group(
        "functional",
        "0.47",
        histogram_scatter_add_2d="torch.Tensor.index_put_(..., accumulate=True)",
        vectorwise_mm_dequant="functional.int8_mm_dequant(A, row_stats, col_stats)",
        vectorwise_quant=_ROWWISE,
    ),
    **_group("functional", "0.47", "value", str2optimizer32bit=_STEP, str2optimizer8bit_blockwise=_STEP),
    **_group(
        "functional",
        "0.49",
        get_colrow_absmax="functional.int8_double_quant(A), whose third and fourth result they are",
        get_row_absmax="functional.int8_vectorwise_quant(A)[1]",
    ),
    **_group(
        "functional",
        "0.50",
        coo2csc=_SPARSE,
        coo2csr=_SPARSE,
        coo_zeros=_SPARSE,
        optimizer_update_8bit="functional.optimizer_update_8bit_blockwise: 8-bit states have one scale per block",
        spmm_coo=_SPARSE,
        spmm_coo_very_sparse=_SPARSE,
    ),
    **_group(
        "functional",
        "0.50",
        "class",
        COOSparseTensor=_SPARSE,
        CSCSparseTensor=_SPARSE,
        CSRSparseTensor=_SPARSE,
        Cusparse_Context=_SPARSE,
    ),
    **_group("functional", "0.50", "value", str2optimizer8bit=_STEP),
    **_group("functional", "", "class", CUBLAS_Context="nothing: torch holds the cuBLAS handles"),
    **_group(
        "functional",
        "",
        _convert_weight_packed_for_cpu="nothing: packed weights are multiplied as they are stored, on every device",
        _convert_weight_packed_for_cpu_inverse="nothing: packed weights are never converted",
    ),
    **_group(
        "autograd._functions",
        "0.46",
        get_tile_inds=_ROWS,
        get_inverse_transform_indices=_ROWS,
        undo_layout="nothing: Linear8bitLt.load_state_dict reads the old layouts",
    ),
    **_group("autograd._functions", "0.50", "class", MatMul8bit="matmul(A, B), the function of MatMul8bitLt"),
    **_group("optim.adam", "0.46", "class", AnalysisAdam="optim.Adam8bit; it measured its own quantization errors"),
    **_group(
        "cextension",
        "",
        _find_cuda_libs=_LIBRARY,
        _split_cuda_version=_LIBRARY,
        get_available_cuda_binary_versions=_LIBRARY,
        get_cuda_bnb_library_path=_LIBRARY,
        get_xpu_bnb_library_path=_LIBRARY,
        parse_cuda_version=_LIBRARY,
    ),
    **_group(
        "cextension",
        "",
        "class",
        CudaBNBNativeLibrary=_LIBRARY,
        ErrorHandlerMockBNBNativeLibrary=_LIBRARY,
        XpuBNBNativeLibrary=_LIBRARY,
    ),
    **_group("cextension", "0.43", "class", CUDASetup=_DOCTOR),
}
"""Name below ``bitsandbytes`` -> why it is not there."""

MODULES: dict[str, str] = {
    "backends": "halfbyte.backends: `halfbyte.backends.explain(op, *args)` shows who computes a call",
    "cuda_setup": _DOCTOR,
    "diagnostics": _DOCTOR,
    "research.autograd": "bitsandbytes.research, which has its functions",
    "triton": "the int8 functions of bitsandbytes.functional, which run Triton kernels on GPUs",
}
"""Module below ``bitsandbytes`` (with all below it) -> what to use instead."""

INTERNAL = frozenset({"backends", "diagnostics"})
"""Those of :data:`MODULES` that 0.50 has, for its own use."""


def advice_for_module(module: str) -> str | None:
    """What to use instead of a module that is not there, or of the one above it; None where nothing is known.

    >>> advice_for_module("cuda_setup.main")
    "`python -m bitsandbytes`, which runs halfbyte's doctor"
    """
    parts = module.split(".")
    for length in range(len(parts), 0, -1):
        found = MODULES.get(".".join(parts[:length]))
        if found is not None:
            return found
    return None


@functools.cache
def stand_in(name: str) -> Any:
    """Something to import under a retired name, that raises when it is used; None for a name that is not retired.

    >>> stand_in("functional.igemmlt")(1, 2)
    Traceback (most recent call last):
        ...
    halfbyte.errors.UnsupportedError: bitsandbytes.functional.igemmlt was dropped in bitsandbytes 0.46
    hint: use functional.int8_linear_matmul(A, B)
    """
    entry = RETIRED.get(name)
    if entry is None:
        return None

    def refuse(*_args: object, **_named: object) -> NoReturn:
        gone = f"was dropped in bitsandbytes {entry.gone}" if entry.gone else "has no counterpart in halfbyte"
        raise UnsupportedError(f"bitsandbytes.{name} {gone}", hint=entry.hint)

    short = name.rpartition(".")[2]
    refuse.__name__ = refuse.__qualname__ = short
    refuse.__doc__ = f"Raises: {entry.hint}."
    if entry.kind == "function":
        return refuse
    members = {"__new__": refuse, "__doc__": refuse.__doc__, "__module__": f"bitsandbytes.{name.rpartition('.')[0]}"}
    made = type(short, (), members)
    if entry.kind == "class":
        return made
    return type(short, (dict,), {"__getitem__": refuse, "__doc__": refuse.__doc__})()
