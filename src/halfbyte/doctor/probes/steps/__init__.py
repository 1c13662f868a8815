"""What is proved on a device: one function a step, registered here by name; new features join with one more entry.

A step's module is imported when the step runs, so that one that cannot be imported fails alone.
"""

from __future__ import annotations

from halfbyte.doctor.probes.steps.report import Report, Skip, Step

__all__ = ["STEPS", "Report", "Skip", "Step"]

STEPS: dict[str, Step] = {
    "allocate": Step("basic", "allocate", basic=True),
    "torch_op": Step("basic", "torch_op", basic=True),
    "triton_kernel": Step("compilers", "triton_kernel"),
    "numba_kernel": Step("compilers", "numba_kernel"),
    "nf4": Step("four_bit", "nf4"),
    "fp4": Step("four_bit", "fp4"),
    "matmul_4bit": Step("four_bit", "matmul"),
    "blockwise_8bit": Step("blockwise", "round_trip"),
    "int8": Step("int8", "linear"),
    "optimizer_8bit": Step("optimizer", "adamw_step", apart=True),
    "bandwidth": Step("speed", "bandwidth", full=True),
    "speed_4bit": Step("speed", "four_bit_against_16", full=True),
}
"""In the order they run."""
