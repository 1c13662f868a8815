"""Quantized modules under bitsandbytes' names."""

from halfbyte.nn.linear_4bit import Linear4bit, LinearFP4, LinearNF4, fix_4bit_weight_quant_state_from_module
from halfbyte.nn.params import Params4bit
from halfbyte.nn.receipt import Receipt, receipt

__all__ = [
    "Linear4bit",
    "LinearFP4",
    "LinearNF4",
    "Params4bit",
    "Receipt",
    "fix_4bit_weight_quant_state_from_module",
    "receipt",
]
