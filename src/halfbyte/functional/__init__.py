"""bitsandbytes.functional's names: quantize, dequantize and multiply tensors, without modules."""

from halfbyte.functional.blockwise import dequantize_blockwise, flat_absmax, quantize_blockwise
from halfbyte.functional.four_bit import (
    dequantize_4bit,
    dequantize_fp4,
    dequantize_nf4,
    format_of,
    gemv_4bit,
    kernel_scales,
    quantize_4bit,
    quantize_fp4,
    quantize_nf4,
)
from halfbyte.functional.int8 import (
    C,
    int8_double_quant,
    int8_linear_matmul,
    int8_mixed_scaled_mm,
    int8_mm_dequant,
    int8_scaled_mm,
    int8_vectorwise_dequant,
    int8_vectorwise_quant,
)
from halfbyte.functional.maps import (
    create_dynamic_map,
    create_fp8_map,
    create_linear_map,
    create_normal_map,
    get_4bit_type,
    name2qmap,
)
from halfbyte.functional.optimizer import optimizer_update_8bit_blockwise, optimizer_update_32bit
from halfbyte.quant_state import QuantState, pack_dict_to_tensor, unpack_tensor_to_dict

__all__ = [
    "C",
    "QuantState",
    "create_dynamic_map",
    "create_fp8_map",
    "create_linear_map",
    "create_normal_map",
    "dequantize_4bit",
    "dequantize_blockwise",
    "dequantize_fp4",
    "dequantize_nf4",
    "flat_absmax",
    "format_of",
    "gemv_4bit",
    "get_4bit_type",
    "int8_double_quant",
    "int8_linear_matmul",
    "int8_mixed_scaled_mm",
    "int8_mm_dequant",
    "int8_scaled_mm",
    "int8_vectorwise_dequant",
    "int8_vectorwise_quant",
    "kernel_scales",
    "name2qmap",
    "optimizer_update_8bit_blockwise",
    "optimizer_update_32bit",
    "pack_dict_to_tensor",
    "quantize_4bit",
    "quantize_blockwise",
    "quantize_fp4",
    "quantize_nf4",
    "unpack_tensor_to_dict",
]
