"""Environment variables and files that stand in the way of what is installed."""

from __future__ import annotations

import os
from pathlib import Path

from halfbyte import _env
from halfbyte.doctor.facts.loader import GPU_MASKS, Environment, Loader
from halfbyte.doctor.facts.packages import SHADOWED_OFTEN, Module, Packages
from halfbyte.doctor.host import Host
from halfbyte.doctor.model import Fix, Result
from halfbyte.doctor.registry import check
from halfbyte.errors import ArgumentError

__all__: list[str] = []

SLOW = {
    "CUDA_LAUNCH_BLOCKING": "every kernel waits for the one before",
    "PYTORCH_NO_CUDA_MEMORY_CACHING": "every tensor asks the driver for memory",
    "TRITON_INTERPRET": "Triton kernels run in Python on the CPU",
    "TRITON_ALWAYS_COMPILE": "Triton compiles again on every start",
    "NUMBA_DISABLE_JIT": "numba functions run as plain Python",
}


@check("ENV101", classes=("C12", "E4"))
def no_shadowing_file(host: Host, packages: Packages) -> Result:
    """No file of yours has the name of a package.

    What it means: neither this folder nor PYTHONPATH has a torch.py, a triton/ folder and the like.
    Why it matters: Python imports that file instead of the package, and the error speaks of something else.
    How to fix: rename the file, or run from another folder.
    """
    here = os.path.realpath(host.cwd)
    own = {here} | {
        os.path.realpath(host.cwd / part) for part in host.environ.get("PYTHONPATH", "").split(os.pathsep) if part
    }
    shadows = [
        module
        for name in SHADOWED_OFTEN
        if (module := packages.module(name)) and os.path.realpath(module.entry) in own and _is_foreign(module, packages)
    ]
    on_path = {os.path.realpath(entry) for entry in host.search_path}
    lurking = (
        [] if here in on_path else [path for name in SHADOWED_OFTEN if (path := host.cwd / f"{name}.py").is_file()]
    )
    if shadows:
        return Result.failed(
            f"a file of yours is imported as {', '.join(module.name for module in shadows)}, not the package",
            *(module.path for module in shadows),
            fixes=tuple(_rename(Path(module.path)) for module in shadows),
            classes=("E4",) if shadows[0].name == "bitsandbytes" else ("C12",),
        )
    if lurking:
        return Result.warned(
            "a file here has the name of a package; scripts started from this folder will import it",
            *map(str, lurking),
            fixes=tuple(map(_rename, lurking)),
            classes=("C12",),
        )
    return Result.passed("no file of yours has the name of a package")


def _is_foreign(module: Module, packages: Packages) -> bool:
    """Whether the folder it lies in holds no distribution of that name."""
    if module.stand_in:
        return False
    found = packages.found.get(module.name, ())
    return all(os.path.realpath(each.folder) != os.path.realpath(module.entry) for each in found)


def _rename(path: Path) -> Fix:
    target = path.parent if path.name == "__init__.py" else path
    new = target.with_name(f"my_{target.name}")
    return Fix(f"rename {target.name}", f"mv {target} {new}")


@check("ENV102", classes=("C5", "C6", "C9"))
def library_path(loader: Loader) -> Result:
    """LD_LIBRARY_PATH puts nothing in front of torch's own libraries.

    What it means: no folder in it holds CUDA or C++ libraries that torch brings itself.
    Why it matters: the loader takes those first; an older one ends in "undefined symbol" or "version not found".
    How to fix: unset LD_LIBRARY_PATH, or take that folder out; TORCH105 tells whether it really breaks the import.
    """
    found = [
        each for each in loader.overrides if [name for name in each.libraries if not name.startswith("libcuda.so")]
    ]
    if not loader.overrides:
        return Result.passed("LD_LIBRARY_PATH is not set")
    if not found:
        return Result.passed("LD_LIBRARY_PATH holds none of torch's libraries")
    lines = [f"{each.folder}: {', '.join(each.libraries[:6])}" for each in found]
    cxx = any("libstdc++" in name for each in found for name in each.libraries)
    return Result.warned(
        "LD_LIBRARY_PATH holds libraries that torch brings itself",
        *lines,
        fixes=(Fix("do without it", "unset LD_LIBRARY_PATH"),),
        classes=("C6", "C9") if cxx else ("C6",),
    )


@check("ENV103")
def nothing_preloaded(loader: Loader) -> Result:
    """LD_PRELOAD loads nothing that is missing.

    What it means: each library that it names exists.
    Why it matters: a wrong one prints an error for every process, and may replace memory allocation under torch.
    How to fix: unset LD_PRELOAD.
    """
    if not loader.preload:
        return Result.passed("LD_PRELOAD is not set")
    gone = [path for path in loader.preload if "/" in path and not Path(path).exists()]
    if gone:
        return Result.warned(
            "LD_PRELOAD names files that do not exist", *gone, fixes=(Fix("unset it", "unset LD_PRELOAD"),)
        )
    return Result.passed("LD_PRELOAD is set", *loader.preload)


@check("ENV104", classes=("A3",))
def gpus_not_hidden(environment: Environment) -> Result:
    """No variable hides every GPU.

    What it means: CUDA_VISIBLE_DEVICES and its AMD relatives are unset or name GPUs by number.
    Why it matters: an empty value or -1 hides all GPUs, and torch says nothing.
    How to fix: unset the variable; in code, set it before torch is imported.
    """
    for name in GPU_MASKS:
        value = environment.get(name)
        if value is not None and value.strip() in {"", "-1", "NoDevFiles"}:
            return Result.warned(
                f"{name} hides every GPU",
                f"{name}={value!r}",
                fixes=(Fix("show the GPUs again", f"unset {name}"),),
                classes=("A3",),
            )
    shown = [f"{name}={value}" for name in GPU_MASKS if (value := environment.get(name)) is not None]
    return Result.passed("no GPU is hidden" if not shown else "some GPUs are chosen", *shown)


@check("ENV105")
def own_variables(host: Host) -> Result:
    """halfbyte's own variables have values that it understands.

    What it means: each HALFBYTE_* variable that is set is known, and parses.
    Why it matters: a typing error would be ignored, or stop the first call.
    How to fix: unset or correct the variable; the documentation lists them.
    """
    known = {variable.name: variable for variable in _env.VARIABLES}
    unknown = [name for name in host.environ if name.startswith("HALFBYTE_") and name not in known]
    wrong: list[str] = []
    for name in known:
        try:
            _env.parse(name, host.environ.get(name, ""))
        except ArgumentError as error:
            wrong.append(error.message)
    if wrong:
        fixes = tuple(Fix("unset it", f"unset {line.split('=')[0]}") for line in wrong)
        return Result.failed("a variable of halfbyte has a value that it does not understand", *wrong, fixes=fixes)
    if unknown:
        return Result.warned(
            f"unknown variable: {', '.join(unknown)}", fixes=tuple(Fix("unset it", f"unset {name}") for name in unknown)
        )
    forced = host.environ.get("HALFBYTE_BACKEND")
    if forced:
        return Result.warned(
            f"HALFBYTE_BACKEND={forced} forces one backend, also where another is faster",
            fixes=(Fix("let halfbyte choose", "unset HALFBYTE_BACKEND"),),
        )
    return Result.passed("halfbyte's variables are unset or fine")


@check("ENV106")
def no_slow_switches(environment: Environment) -> Result:
    """No debugging switch slows everything down.

    What it means: CUDA_LAUNCH_BLOCKING, TRITON_INTERPRET and the like are not set.
    Why it matters: they are left over from a debugging session and cost a factor of 2 to 1000.
    How to fix: unset them.
    """
    found = [
        (name, value, why) for name, why in SLOW.items() if (value := environment.get(name)) not in {None, "", "0"}
    ]
    if found:
        return Result.warned(
            f"slowed down by {', '.join(name for name, _, _ in found)}",
            *(f"{name}={value}: {why}" for name, value, why in found),
            fixes=tuple(Fix("unset it", f"unset {name}") for name, _, _ in found),
        )
    return Result.passed("no debugging switch is set")


@check("ENV107", classes=("C7",))
def cuda_runtimes(loader: Loader) -> Result:
    """CUDA toolkits outside torch are known.

    What it means: torch brings its own CUDA libraries; others lie beside it and are not used.
    Why it matters: it does not; duplicates are harmless unless LD_LIBRARY_PATH names them, see ENV102.
    How to fix: nothing to do.
    """
    if loader.runtimes:
        return Result.passed("other CUDA toolkits are installed; torch uses its own", *loader.runtimes)
    return Result.passed("no CUDA toolkit outside torch, and none is needed")


@check("ENV108", classes=("C3",))
def not_in_a_checkout(packages: Packages) -> Result:
    """The working folder is not another library's source checkout.

    What it means: `import bitsandbytes` does not take an uncompiled checkout from here.
    Why it matters: a checkout has no binaries: "libbitsandbytes_cpu.so: cannot open shared object file".
    How to fix: run from another folder.
    """
    module = packages.module("bitsandbytes")
    if module and (Path(module.entry) / "csrc").is_dir():
        return Result.warned(
            "bitsandbytes would be imported from an uncompiled source checkout",
            module.path,
            fixes=(Fix("run from another folder", "cd ~"),),
            classes=("C3",),
        )
    return Result.passed("not inside a source checkout of bitsandbytes")
