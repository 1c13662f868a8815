"""Quantized modules under bitsandbytes' names."""

from halfbyte.nn.int8_params import Int8Params
from halfbyte.nn.linear_4bit import Linear4bit, LinearFP4, LinearNF4, fix_4bit_weight_quant_state_from_module
from halfbyte.nn.linear_8bit import Linear8bitLt
from halfbyte.nn.params import Params4bit
from halfbyte.nn.receipt import Receipt, receipt

__all__ = [
    "Int8Params",
    "Linear4bit",
    "Linear8bitLt",
    "LinearFP4",
    "LinearNF4",
    "Params4bit",
    "Receipt",
    "fix_4bit_weight_quant_state_from_module",
    "receipt",
]
