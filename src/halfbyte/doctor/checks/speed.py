"""Speed: which kernels are used, and at the full level how fast they are."""

from __future__ import annotations

from dataclasses import replace

from halfbyte.doctor.checks.numerics import judge
from halfbyte.doctor.facts.proofs import DeviceProof, Proofs
from halfbyte.doctor.model import Fix, Level, Result, Status
from halfbyte.doctor.registry import check

__all__: list[str] = []

SLOW_COMPILE = 20.0


@check("SPEED101", requires=("TORCH109",), classes=("G1",))
def fast_backend(proofs: Proofs) -> Result:
    """Every device is served by kernels made for it.

    What it means: the backend that computes there is not the reference, which is plain torch operations.
    Why it matters: the reference gives the same numbers, several times slower, and no error tells you.
    How to fix: the reason is printed; install what is missing.
    """
    known = [proof for proof in proofs.chosen if proof.backends]
    if not known:
        return Result.skipped("nothing was computed")
    slow = [proof for proof in known if _serving(proof) == "reference"]
    lines = [f"{proof.label}: {_serving(proof)}" for proof in known]
    reasons = [
        f"{proof.label}: {name} does not serve it: {reason}"
        for proof in slow
        for name, reason in proof.backends
        if reason and not reason.startswith("serves ")
    ]
    if reasons:
        return Result.warned(
            f"plain torch operations are used on {', '.join(proof.label for proof in slow)}",
            *reasons,
            fixes=(Fix("see which part is missing", "halfbyte doctor -v --only TRITON,CPU"),),
        )
    return Result.passed("; ".join(lines))


def _serving(proof: DeviceProof) -> str:
    return next((name for name, reason in proof.backends if not reason), "none")


@check("SPEED102", steps=("triton_kernel",), requires=("TRITON111",), classes=("D13",))
def compile_time(proofs: Proofs) -> Result:
    """Compiling a kernel takes seconds, not minutes.

    What it means: the first call of a small kernel, with an empty cache, took less than 20 s.
    Why it matters: the first use of a model compiles a dozen kernels, and looks as if it hung.
    How to fix: run `halfbyte warmup` once; keep the cache folder between containers.
    """
    first = [
        each
        for proof in proofs.chosen
        if (step := proof.steps.get("triton_kernel"))
        for each in step.measurements
        if each.name == "first call"
    ]
    if not first:
        return Result.skipped("no kernel was compiled")
    slowest = max(first, key=lambda each: each.value)
    if slowest.value > SLOW_COMPILE:
        return Result.warned(
            f"the first kernel took {slowest.value:.0f} s on {slowest.device}",
            fixes=(Fix("compile ahead", "halfbyte warmup"),),
            classes=("D13",),
        )
    return Result(Status.PASS, f"the first kernel took {slowest.value:.1f} s", measurements=tuple(first))


@check("SPEED103", steps=("bandwidth",), requires=("TORCH109",), level=Level.FULL)
def memory_bandwidth(proofs: Proofs) -> Result:
    """The memory bandwidth of every device is known.

    What it means: a large copy was timed.
    Why it matters: generating text at batch 1 reads every weight once a token: bandwidth is the limit.
    How to fix: nothing to fix; compare with the device's data sheet, and look for other processes on it.
    """
    return judge(proofs, "bandwidth")


@check("SPEED104", steps=("speed_4bit",), requires=("TORCH109",), classes=("G1",), level=Level.FULL)
def four_bit_is_fast(proofs: Proofs) -> Result:
    """A 4-bit product at batch 1 is not slower than the same in 16 bits.

    What it means: both were timed on a 4096 x 4096 weight.
    Why it matters: a slow path, fp32 as the compute dtype for example, takes away what 4 bits save.
    How to fix: use bf16 (fp16 before capability 8.0) as compute dtype; see SPEED101 for the backend.
    """
    result = judge(proofs, "speed_4bit")
    if result.status is Status.FAIL:  # slow is a limit, not a defect
        fixes = (Fix("see which kernels are used", "halfbyte doctor -v --only SPEED101"),)
        return replace(
            result,
            status=Status.WARN,
            summary="4-bit products are slower than 16-bit ones",
            fixes=fixes,
            classes=("G1",),
        )
    return result
