"""The Hugging Face stack around halfbyte, and a real bitsandbytes beside it."""

from __future__ import annotations

from halfbyte.doctor import versions
from halfbyte.doctor.facts.installer import Installer
from halfbyte.doctor.facts.packages import Packages
from halfbyte.doctor.facts.peer import Peer
from halfbyte.doctor.facts.torch_build import TorchBuild
from halfbyte.doctor.facts.transformers import TransformersImport
from halfbyte.doctor.host import Host
from halfbyte.doctor.model import Fix, Result
from halfbyte.doctor.registry import check

__all__: list[str] = []

OLDEST = {"transformers": (5, 0), "accelerate": (1, 2), "peft": (0, 17)}
"""What halfbyte's tests cover."""


@check("HF101", classes=("E2",))
def transformers_version(packages: Packages, installer: Installer) -> Result:
    """transformers is a version that works with 4-bit models.

    What it means: it is new enough, and not one with a known defect there.
    Why it matters: 4.49 fails with "'frozenset' object has no attribute 'discard'"; older ones ask for bitsandbytes.
    How to fix: upgrade transformers.
    """
    version = packages.version("transformers")
    if not version:
        return Result.skipped("transformers is not installed, and not required")
    fix = installer.install("upgrade transformers", "transformers", upgrade=True)
    if versions.number(version) == (4, 49):
        return Result.failed(
            f"transformers {version} cannot load 4-bit models (a defect of 4.49)", fixes=(fix,), classes=("E2",)
        )
    if versions.number(version) < OLDEST["transformers"]:
        tested = ".".join(map(str, OLDEST["transformers"]))
        return Result.warned(
            f"transformers {version} is older than what halfbyte is tested with ({tested})", fixes=(fix,)
        )
    return Result.passed(f"transformers {version}")


@check("HF102", classes=("E8",))
def accelerate_version(packages: Packages, installer: Installer) -> Result:
    """accelerate fits transformers.

    What it means: it is there where transformers is, and new enough to move quantized models.
    Why it matters: transformers then says that bitsandbytes is missing, or that `.to` is not supported.
    How to fix: upgrade accelerate.
    """
    if not packages.version("transformers"):
        return Result.skipped("transformers is not installed")
    version = packages.version("accelerate")
    if not version:
        fix = installer.install("install accelerate", "accelerate>=1.2")
        return Result.warned(
            "accelerate is not installed: transformers cannot load 4-bit models", fixes=(fix,), classes=("E1",)
        )
    if versions.number(version) < OLDEST["accelerate"]:
        fix = installer.install("upgrade accelerate", "accelerate", upgrade=True)
        return Result.warned(f"accelerate {version} is too old for 4-bit models", fixes=(fix,), classes=("E8",))
    return Result.passed(f"accelerate {version}")


@check("HF103", classes=("E10",))
def peft_version(packages: Packages, installer: Installer, peer: Peer) -> Result:
    """peft is new enough to merge adapters into quantized weights.

    What it means: 0.17 or later.
    Why it matters: before 0.14, merging into 8-bit weights of bitsandbytes 0.45 and later goes wrong.
    How to fix: upgrade peft.
    """
    version = packages.version("peft")
    if not version:
        return Result.skipped("peft is not installed, and not required")
    fix = installer.install("upgrade peft", "peft", upgrade=True)
    if versions.number(version) < (0, 14) and versions.number(peer.version or "0.45") >= (0, 45):
        return Result.warned(f"peft {version} merges into 8-bit weights wrongly", fixes=(fix,), classes=("E10",))
    if versions.number(version) < OLDEST["peft"]:
        return Result.warned(f"peft {version} is older than what halfbyte is tested with (0.17)", fixes=(fix,))
    return Result.passed(f"peft {version}")


@check("HF104", classes=("C1", "C2", "C3", "C4", "C10", "D10", "E3"))
def real_bitsandbytes(
    peer: Peer, torch_build: TorchBuild, packages: Packages, installer: Installer, host: Host
) -> Result:
    """A real bitsandbytes beside halfbyte works with this torch, or none is there.

    What it means: which version it is, which binaries it ships, and which of them it would load for this torch.
    Why it matters: halfbyte does not take its place unless told to; where it cannot load, its users get its errors.
    How to fix: a bitsandbytes with a binary for this torch's CUDA version, or a torch for one that it has; or
    uninstall it and use halfbyte in its place.
    """
    if peer.stand_in:
        return Result.passed("halfbyte stands in bitsandbytes' place")
    if not peer.version:
        return Result.passed("no other bitsandbytes here")
    instead = Fix("or let halfbyte take its place", "python -m pip uninstall -y bitsandbytes")
    upgrade = installer.install("upgrade bitsandbytes", "bitsandbytes", upgrade=True)
    found = f"bitsandbytes {peer.version}, binaries: {peer.binaries}"
    old = _too_old(peer)
    missing = bool(torch_build.file) and not peer.pick and not peer.checkout
    if old is None and not missing:
        old = _out_of_step(peer, packages)
    if old is not None:
        name, summary = old
        return Result.warned(summary, found, fixes=(upgrade, instead), classes=(name,))
    if peer.checkout:
        return Result.warned(
            "bitsandbytes is a source checkout without binaries",
            fixes=(Fix("leave its folder", "cd ~"), instead),
            classes=("C3",),
        )
    if not torch_build.file:
        return Result.passed(found)
    if peer.pick:
        alone = "halfbyte takes its place only when told to"
        exact = f"it loads {peer.pick} for torch {torch_build.version} ({torch_build.kind})"
        return Result.passed(f"bitsandbytes {peer.version} is there as well", found, exact, alone)
    return _no_binary(peer, torch_build, installer, host, (found, instead))


def _too_old(peer: Peer) -> tuple[str, str] | None:
    """Class and sentence of a version that no current torch works with."""
    number = versions.number(peer.version, 3)
    if number == (0, 42, 0) and not peer.cuda and not peer.cpu:
        return (
            "C10",
            "bitsandbytes 0.42.0 is what pip takes where no later wheel fits; it has no binary for this platform",
        )
    if number < (0, 43, 0):
        return "C1", f"bitsandbytes {peer.version} looks for CUDA in ways that fail with current installations"
    return None


def _out_of_step(peer: Peer, packages: Packages) -> tuple[str, str] | None:
    """Class and sentence of a version that does not fit another package."""
    number = versions.number(peer.version, 3)
    if number < (0, 45, 2) and versions.number(packages.version("triton") or "0") >= (3, 2):
        return (
            "D10",
            f"bitsandbytes {peer.version} imports triton.ops, which triton {packages.version('triton')} no longer has",
        )
    if number < (0, 50, 0) and versions.number(packages.version("transformers") or "0") >= (5, 0):
        return (
            "E3",
            f"bitsandbytes {peer.version} is older than transformers {packages.version('transformers')} expects",
        )
    return None


def _no_binary(peer: Peer, torch_build: TorchBuild, installer: Installer, host: Host, parts: tuple[str, Fix]) -> Result:
    """It has no binary for this torch: two ways out, or doing without it."""
    found, instead = parts
    fixes: list[Fix] = []
    if peer.forced:
        fixes.append(Fix("let it choose by itself", "unset BNB_CUDA_VERSION"))
    if torch_build.cuda:
        with_binary = versions.bitsandbytes_for(torch_build.cuda)
        if with_binary and versions.number(with_binary, 3) > versions.number(peer.version, 3):
            title = f"install a bitsandbytes that has a binary for CUDA {torch_build.cuda}"
            fixes.append(installer.install(title, f"bitsandbytes>={with_binary}", upgrade=True))
        fixes += _torch_that_it_supports(peer, installer, host)
    elif not torch_build.hip:
        fixes.append(installer.install("install bitsandbytes again", "bitsandbytes", force=True))
    forced = f" (BNB_CUDA_VERSION={peer.forced})" if peer.forced else ""
    return Result.warned(
        f"bitsandbytes {peer.version} has no binary for torch {torch_build.version} ({torch_build.kind}){forced}",
        found,
        fixes=(*fixes, instead),
        classes=("C2", "C4"),
    )


def _torch_that_it_supports(peer: Peer, installer: Installer, host: Host) -> list[Fix]:
    for major in sorted({versions.number(each)[0] for each in peer.cuda}, reverse=True):
        wheel = versions.newest_torch_for(cuda_major=major, python=host.python[:2], machine=host.machine)
        if wheel and versions.bitsandbytes_pick(peer.cuda, wheel.cuda, peer.version):
            title = f"or install a torch for CUDA {wheel.cuda}, which it has a binary for"
            return [installer.install(title, wheel.requirement, index_url=wheel.index_url, force=True)]
    return []


@check("HF105", requires=("HF101", "TORCH105"), classes=("E1", "E4", "G1"))
def quantizer_available(transformers_import: TransformersImport, installer: Installer) -> Result:
    """transformers' 4-bit quantizer would run.

    What it means: a child process has imported it, with halfbyte in bitsandbytes' place, and it raised no objection.
    Why it matters: transformers says "pip install -U bitsandbytes" for any reason that its own check fails; here is
    the real one.
    How to fix: fix what the error names.
    """
    found = transformers_import
    if not found.tried:
        return Result.skipped("transformers is not installed")
    if not found.ok:
        again = installer.install("upgrade transformers", "transformers", upgrade=True)
        classes = ("E4",) if "cannot import name" in found.error else ("E1",)
        return Result.warned("transformers' quantization does not import", found.error, fixes=(again,), classes=classes)
    if found.quantizer:
        fix = installer.install("upgrade the stack", "transformers", upgrade=True)
        return Result.warned("transformers' 4-bit quantizer refuses", found.quantizer, fixes=(fix,), classes=("E1",))
    note = "a BitsAndBytesConfig that names no bnb_4bit_compute_dtype asks for fp32; name bf16 (fp16 on a T4)"
    return Result.passed(
        "transformers' 4-bit quantizer would run", *([note] if "float32" in found.compute_dtype else [])
    )
