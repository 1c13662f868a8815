"""Proof: what was computed on every device, against float64. One check a step; a wrong number is a failure."""

from __future__ import annotations

from halfbyte.doctor.checks.remedies import blame, class_of, without
from halfbyte.doctor.facts.proofs import DeviceProof, Proofs, StepProof
from halfbyte.doctor.model import Fix, Measurement, Result, Status
from halfbyte.doctor.registry import check

__all__ = ["DIAGNOSED", "judge"]

DIAGNOSED = ("A4", "A12", "B1", "B4", "B6", "B7", "B8", "D1", "D2", "D3", "D6", "E11")
"""Classes that an error of a step may turn out to be."""


def judge(proofs: Proofs, name: str) -> Result:
    """What one step says over all devices."""
    found = [(proof, proof.steps[name]) for proof in proofs.devices if name in proof.steps]
    tried = [(proof, step) for proof, step in found if step.state not in {"skip", "blocked"}]
    if not tried:
        reasons = dict.fromkeys(step.text for _, step in found if step.text)
        blocked = any(step.state == "blocked" for _, step in found)
        return Result(Status.BLOCKED if blocked else Status.SKIP, "; ".join(reasons) or "nothing was computed")
    failed = [(proof, step) for proof, step in tried if not step.ok]
    aside = [f"{proof.label}: not reached, {step.text}" for proof, step in found if step.state == "blocked"]
    if failed:
        return _failed(failed, aside)
    numbers = tuple(each for proof, step in tried for each in _named(proof, step))
    notes = tuple(f"{proof.label}: {note}" for proof, step in tried for note in step.notes)
    return Result.passed(
        f"verified on {', '.join(proof.label for proof, _ in tried)}", *notes, *aside, measurements=numbers
    )


def _named(proof: DeviceProof, step: StepProof) -> list[Measurement]:
    return [
        Measurement(proof.label, each.name, each.value, each.limit, each.unit, each.at_least)
        for each in step.measurements
    ]


def _failed(failed: list[tuple[DeviceProof, StepProof]], aside: list[str]) -> Result:
    lines: list[str] = []
    numbers: list[Measurement] = []
    wrong: list[str] = []
    for proof, step in failed:
        bad = [each for each in _named(proof, step) if not each.ok]
        numbers += bad
        if bad:
            wrong.append(proof.label)
        lines.append(
            f"{proof.label}: {step.text or f'{len(bad)} of {len(step.measurements)} numbers beyond their limit'}"
        )
    culprit = next((step.culprit for _, step in failed if step.culprit), None)
    if culprit is not None:
        lines.append(blame(culprit))
    text = " ".join(step.text for _, step in failed)
    classes = ("B9",) if wrong else class_of(text)
    where = ", ".join(proof.label for proof, _ in failed)
    summary = f"wrong numbers on {where}" if wrong else f"does not run on {where}"
    if any(step.state == "crash" for _, step in failed):
        summary = f"the process died on {where}"
    fixes = [without(culprit)] if culprit else []
    fixes.append(
        Fix("compute with plain torch until this is solved", "export HALFBYTE_BACKEND=reference", safe=True)
        if wrong
        else Fix(
            "see what is behind this", f"halfbyte explain {classes[0]}" if classes else "halfbyte doctor -v --only NUM"
        )
    )
    return Result(Status.FAIL, summary, (*lines, *aside), tuple(fixes), tuple(numbers), classes)


@check("NUM101", steps=("allocate",), requires=("TORCH105",), classes=(*DIAGNOSED, "B9"))
def memory_works(proofs: Proofs) -> Result:
    """Memory on every device keeps what is written.

    What it means: a pattern was copied there and came back the same.
    Why it matters: it is the first thing that needs a working context; an ill driver or a full GPU shows here.
    How to fix: look at the first failing check above; free the GPU of other processes.
    """
    return judge(proofs, "allocate")


@check("NUM102", steps=("torch_op",), requires=("TORCH105",), classes=(*DIAGNOSED, "B9"))
def torch_computes(proofs: Proofs) -> Result:
    """torch multiplies matrices rightly on every device, in fp32, fp16 and bf16.

    What it means: the products agree with float64 within what the dtype can hold.
    Why it matters: a build without code for the GPU fails here, although `is_available()` says True.
    How to fix: install the torch build that has code for this GPU; see TORCH103.
    """
    return judge(proofs, "torch_op")


@check("NUM103", steps=("nf4",), requires=("TORCH109",), classes=(*DIAGNOSED, "B9"))
def nf4_round_trip(proofs: Proofs) -> Result:
    """NF4 quantizes and dequantizes rightly on every device.

    What it means: each code is the nearest level, absmax is exact, each decoded value has one rounding.
    Why it matters: a wrong kernel gives a model that talks nonsense, or a slightly worse one, without any error.
    How to fix: compute with HALFBYTE_BACKEND=reference and report the numbers.
    """
    return judge(proofs, "nf4")


@check("NUM104", steps=("fp4",), requires=("TORCH109",), classes=(*DIAGNOSED, "B9"))
def fp4_round_trip(proofs: Proofs) -> Result:
    """FP4 quantizes and dequantizes rightly on every device.

    What it means: each code is the nearest of FP4's levels, absmax is exact, each decoded value has one rounding.
    Why it matters: FP4 has its own order of codes and its own ties; a kernel that is right for NF4 may be wrong here.
    How to fix: compute with HALFBYTE_BACKEND=reference and report the numbers.
    """
    return judge(proofs, "fp4")


@check("NUM105", steps=("matmul_4bit",), requires=("TORCH109",), classes=(*DIAGNOSED, "B9"))
def matmul(proofs: Proofs) -> Result:
    """4-bit matrix products and their gradients are right on every device.

    What it means: 1, 5 and 33 rows times an NF4 weight agree with float64, in fp32, fp16 and bf16.
    Why it matters: this is what a quantized model spends its time on.
    How to fix: compute with HALFBYTE_BACKEND=reference and report the numbers.
    """
    return judge(proofs, "matmul_4bit")


@check("NUM106", steps=("blockwise_8bit",), requires=("TORCH109",), classes=(*DIAGNOSED, "B9"))
def blockwise(proofs: Proofs) -> Result:
    """8-bit blockwise quantization is right on every device.

    What it means: each code is the nearest of 256 values, absmax is exact, each decoded value has one rounding.
    Why it matters: 8-bit optimizer states and nested absmax go through it.
    How to fix: compute with HALFBYTE_BACKEND=reference and report the numbers.
    """
    return judge(proofs, "blockwise_8bit")


@check("NUM107", steps=("optimizer_8bit",), requires=("TORCH109",), classes=(*DIAGNOSED, "B9"))
def optimizer_step(proofs: Proofs) -> Result:
    """An 8-bit optimizer step changes the parameter by the amount it should.

    What it means: three AdamW steps on a tensor large enough for 8-bit states agree with the rule in float64.
    Why it matters: a step that merely changes something proves nothing.
    How to fix: compute with HALFBYTE_BACKEND=reference and report the numbers.
    """
    return judge(proofs, "optimizer_8bit")


@check("NUM108", steps=("int8",), requires=("TORCH109",), classes=(*DIAGNOSED, "B9"))
def int8_products(proofs: Proofs) -> Result:
    """LLM.int8() products are right on every device.

    What it means: codes are the nearest, integer products are exact, those with outlier columns agree with float64.
    Why it matters: int8 was seen to give gibberish on some GPUs, without an error.
    How to fix: compute with HALFBYTE_BACKEND=reference and report the numbers; or load in 4 bits.
    """
    return judge(proofs, "int8")
