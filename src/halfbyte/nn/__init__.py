"""Quantized modules under bitsandbytes' names."""

from halfbyte.nn.embedding import Embedding, StableEmbedding
from halfbyte.nn.embedding_4bit import Embedding4bit, EmbeddingFP4, EmbeddingNF4
from halfbyte.nn.embedding_8bit import Embedding8bit
from halfbyte.nn.int8_params import Int8Params
from halfbyte.nn.linear_4bit import Linear4bit, LinearFP4, LinearNF4, fix_4bit_weight_quant_state_from_module
from halfbyte.nn.linear_8bit import Linear8bitLt
from halfbyte.nn.outliers import OutlierAwareLinear
from halfbyte.nn.params import Params4bit
from halfbyte.nn.receipt import Receipt, receipt

__all__ = [
    "Embedding",
    "Embedding4bit",
    "Embedding8bit",
    "EmbeddingFP4",
    "EmbeddingNF4",
    "Int8Params",
    "Linear4bit",
    "Linear8bitLt",
    "LinearFP4",
    "LinearNF4",
    "OutlierAwareLinear",
    "Params4bit",
    "Receipt",
    "StableEmbedding",
    "fix_4bit_weight_quant_state_from_module",
    "receipt",
]
