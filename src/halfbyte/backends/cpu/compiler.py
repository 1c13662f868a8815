"""IR to machine code to a callable: LLVM through llvmlite, objects kept on disk, loaded into one engine a process."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm

from halfbyte import _env
from halfbyte._version import __version__
from halfbyte.backends.cpu import kernels
from halfbyte.backends.cpu.kernels.level import Level

__all__ = ["TYPED_POINTERS", "assembly", "cache_directory", "function", "object_code"]

LLVM_VERSION: tuple[int, ...] = tuple(llvm.llvm_version_info)
TYPED_POINTERS = LLVM_VERSION[0] < 16
"""LLVM before 16 wants ``float*`` where later versions have ``ptr``."""

_DIGEST_BYTES = 32
_lock = threading.RLock()
_engine: Any = None
_kept: list[Any] = []
"""Loaded objects and the temporary directory: what must live as long as the process."""


@functools.lru_cache(maxsize=1)
def _initialize() -> None:
    if LLVM_VERSION[0] < 20:  # later versions initialize themselves and refuse to be asked
        llvm.initialize()
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()


def _target_machine(level: Level, triple: str) -> Any:
    _initialize()
    target = llvm.Target.from_triple(triple)
    return target.create_target_machine(
        cpu=level.cpu, features=level.features, opt=3, reloc="pic", codemodel="jitdefault", jit=True
    )


def _optimized(text: str, target_machine: Any, triple: str) -> Any:
    module = llvm.parse_assembly(text)
    module.triple = triple
    module.data_layout = str(target_machine.target_data)
    module.verify()
    options = llvm.create_pipeline_tuning_options(2)
    options.loop_vectorization = options.slp_vectorization = options.loop_unrolling = False
    builder = llvm.create_pass_builder(target_machine, options)
    builder.getModulePassManager().run(module, builder)
    return module


def object_code(text: str, level: Level, triple: str = "") -> bytes:
    """Machine code of the IR ``text`` as an object file, for this machine or for ``triple``."""
    triple = triple or llvm.get_default_triple()
    with _lock:
        target_machine = _target_machine(level, triple)
        return target_machine.emit_object(_optimized(text, target_machine, triple))


def assembly(text: str, level: Level, triple: str = "") -> str:
    """The same as assembly text: what tests look into."""
    triple = triple or llvm.get_default_triple()
    with _lock:
        target_machine = _target_machine(level, triple)
        return target_machine.emit_assembly(_optimized(text, target_machine, triple))


def function(name: str, level: Level, write: Callable[[], str]) -> tuple[int, Callable[[int], None]]:
    """Address and callable of a kernel; compiled unless an earlier process left it on disk.

    Args:
        name: Symbol, one for each variant.
        level: Level that it is compiled for.
        write: Returns the IR; called only when nothing usable is on disk.
    """
    global _engine
    with _lock:
        _initialize()
        path = cache_directory() / f"{name}-{_key(level)}.o"
        code = _read(path)
        if code is None:
            code = object_code(write(), level)
            _write(path, code)
        if _engine is None:
            target_machine = _target_machine(level, llvm.get_default_triple())
            _engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), target_machine)
        loaded = llvm.object_file.ObjectFileRef.from_data(code)
        _kept.append(loaded)  # the engine refers to its memory
        _engine.add_object_file(loaded)
        _engine.finalize_object()
        address = int(_engine.get_function_address(name))
        return address, ctypes.CFUNCTYPE(None, ctypes.c_int64)(address)


@functools.lru_cache(maxsize=1)
def _sources_digest() -> str:
    digest = hashlib.sha256()
    for source in sorted(Path(str(kernels.__file__)).parent.glob("*.py")):
        digest.update(source.read_bytes())
    return digest.hexdigest()


def _key(level: Level) -> str:
    """What else the code depends on: our version and sources, LLVM's version, the compiler target."""
    parts = (__version__, _sources_digest(), str(LLVM_VERSION), llvm.get_default_triple(), level.cpu, level.features)
    return hashlib.sha256("|".join(parts).encode()).hexdigest()[:20]


@functools.lru_cache(maxsize=1)
def cache_directory() -> Path:
    """Where objects are kept: a folder of halfbyte's cache directory.

    A directory that cannot be written, or that others could write machine code into, is passed over for a fresh private
    one in the temporary directory, which lasts as long as the process.
    """
    path = _env.cache_dir() / "cpu"
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
        if _is_private(path):
            return path
    except OSError:
        pass  # read-only, or no home: the private directory below serves
    temporary = tempfile.TemporaryDirectory(prefix="halfbyte-cpu-", ignore_cleanup_errors=True)
    _kept.append(temporary)
    return Path(temporary.name)


def _is_private(path: Path) -> bool:
    if not hasattr(os, "getuid"):
        return True
    found = path.stat()
    return found.st_uid == os.getuid() and not found.st_mode & 0o022


def _read(path: Path) -> bytes | None:
    """The object at ``path``, or None if there is none or it was cut short or altered."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    digest, code = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
    return code if hashlib.sha256(code).digest() == digest else None


def _write(path: Path, code: bytes) -> None:
    """Write whole or not at all, so that processes may compile the same kernel at once."""
    with contextlib.suppress(OSError):  # a full disk costs the next process a compilation, nothing else
        handle, name = tempfile.mkstemp(dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(hashlib.sha256(code).digest() + code)
            Path(name).replace(path)
        except OSError:
            Path(name).unlink(missing_ok=True)
            raise
