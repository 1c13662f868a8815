"""Keyword arguments beyond bitsandbytes' present signatures: its former ones, and what it does not offer."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from halfbyte.errors import ArgumentError
from halfbyte.optim.clipping import check_percentile

__all__ = ["Options"]


@dataclass(frozen=True)
class Options:
    """What every optimizer takes as keywords beside its signature.

    Attributes:
        percentile_clipping: bitsandbytes up to 0.49: scale gradients down to this percentile of a parameter's last 100
            gradient norms; 100 does not clip.
        block_wise: bitsandbytes up to 0.49; only True, its states without blocks are gone.
        stochastic_rounding: Round bf16 parameters up or down at random, in proportion, so that updates below half a
            step of bf16 are not lost. Reproducible: the draw depends on the step's number and the element's place.
        capturable: Count steps on the device, so that a step can be captured in a CUDA graph.
    """

    percentile_clipping: int = 100
    block_wise: bool = True
    stochastic_rounding: bool = False
    capturable: bool = False

    @staticmethod
    def of(given: dict[str, Any], owner: str) -> Options:
        """Options from keyword arguments.

        Raises:
            ArgumentError: An unknown name, or a value that cannot be used.

        >>> Options.of({"percentile_clipping": 5}, "Adam").percentile_clipping
        5
        """
        known = {one.name for one in fields(Options)}
        for name in given:
            if name not in known:
                raise ArgumentError(f"{owner} got an unknown argument {name!r}", expected=", ".join(sorted(known)))
        made = Options(**given)
        check_percentile(made.percentile_clipping)
        if not made.block_wise:
            raise ArgumentError(
                f"{owner} with block_wise=False",
                expected="True",
                hint="leave it out: 8-bit states are always blockwise",
            )
        if made.stochastic_rounding and made.capturable:
            raise ArgumentError(
                "stochastic_rounding with capturable", expected="one of them", hint="a graph would repeat one draw"
            )
        return made
