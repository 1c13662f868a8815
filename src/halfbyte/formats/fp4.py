"""FP4: sign, two exponent bits, one mantissa bit; bit 3 is the sign. Magnitudes are twelfths of the block's absmax."""

from halfbyte.formats.codebook import Codebook, register

__all__ = ["FP4"]

_TWELFTHS = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)

FP4 = register(
    Codebook(
        name="fp4",
        bits=4,
        # Code 8 is "minus zero"; checkpoints store +0.0 for it, so the table does too.
        levels=tuple(x / 12 for x in _TWELFTHS) + tuple(-x / 12 if x else 0.0 for x in _TWELFTHS),
        source="bitsandbytes' FP4 data type (bit pattern order of its quant_map)",
        sign_bit=3,
    )
)
