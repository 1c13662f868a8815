"""The CPU levels, best first.

Two families. *Lanes*: a code sits in each 32-bit lane and one permute reads the table (AVX-512), or scalar loads do
(portable). *Planes*: codes stay bytes, a byte shuffle (``vpshufb``, ``tbl``) reads one byte of every value, and
interleaving the byte planes makes the values (AVX2, NEON). The families hand out values in whatever order is cheapest
and say which element each lane holds, so that activations can be put into the same order once a call.
"""

from __future__ import annotations

from halfbyte.backends.cpu.kernels.lanes import LaneLevel
from halfbyte.backends.cpu.kernels.level import CHUNK, Level
from halfbyte.backends.cpu.kernels.planes import PlaneLevel

__all__ = ["CHUNK", "LEVELS", "LaneLevel", "Level", "PlaneLevel"]

_V3 = frozenset({"avx2", "fma", "f16c", "bmi2"})
_V4 = _V3 | {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512cd"}

LEVELS: tuple[Level, ...] = (
    LaneLevel(
        "amx",
        "x86_64",
        "x86-64-v4",
        "+avx512bf16,+amx-tile,+amx-bf16",
        _V4 | {"avx512bf16", "amx-tile", "amx-bf16"},
        16,
        wide_lookup=True,
        matrix=True,
    ),
    LaneLevel(
        "avx512bf16", "x86_64", "x86-64-v4", "+avx512bf16", _V4 | {"avx512bf16"}, 16, dot_bf16=True, wide_lookup=True
    ),
    LaneLevel("avx512", "x86_64", "x86-64-v4", "", _V4, 16, wide_lookup=True),
    PlaneLevel("avx2", "x86_64", "x86-64-v3", "", _V3, 8),
    PlaneLevel("neon", "aarch64", "generic", "+neon", frozenset(), 4),
    LaneLevel("portable", "", "", "", frozenset(), 4, half_native=False, wide_lookup=True),
)
"""Best first."""
