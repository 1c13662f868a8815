"""AF4 and INT4: the two further 4-bit tables that ``functional.get_4bit_type`` knows."""

from halfbyte.formats.codebook import Codebook, register

__all__ = ["AF4", "INT4"]

AF4 = register(
    Codebook(
        name="af4",
        bits=4,
        levels=(
            # Falling: code 0 is the largest, as bitsandbytes lists them.
            1.0,
            0.72424863,
            0.55496234,
            0.42563882,
            0.31675666,
            0.21961274,
            0.12934483,
            0.04273164,
            0.0,
            -0.04934812,
            -0.14982478,
            -0.25607552,
            -0.3736951,
            -0.51243739,
            -0.69441008,
            -1.0,
        ),
        source="Yoshida, NF4 Isn't Information Theoretically Optimal, 2023 (arXiv:2306.06965), block size 64",
    )
)

INT4 = register(
    Codebook(
        name="int4",
        bits=4,
        # Sign bit 3 over magnitudes 0..7, as bitsandbytes' int4 list; its code 8 is a second zero.
        levels=tuple(x / 7 for x in range(8)) + tuple(-x / 7 if x else 0.0 for x in range(8)),
        source="sign and magnitude integers -7 .. 7",
        sign_bit=3,
    )
)
