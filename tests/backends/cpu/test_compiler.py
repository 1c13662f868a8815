"""Compiled code on disk: found again, never trusted when damaged, never required."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from halfbyte.backends.cpu import call, compiler, host
from halfbyte.backends.cpu.kernels.levels import Level
from tests.support.python import python_code

VARIANT = {"dtype": "f32"}


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache directory of its own for the test."""
    monkeypatch.setenv("HALFBYTE_CACHE_DIR", str(tmp_path / "cache"))
    compiler.cache_directory.cache_clear()
    yield tmp_path / "cache" / "cpu"
    compiler.cache_directory.cache_clear()


def build(name: str, level: Level, written: list[str]) -> None:
    symbol, text = call.write("dequantize_blockwise", level, VARIANT)
    text = text.replace(symbol, name)

    def write() -> str:
        written.append(name)
        return text

    compiler.function(name, level, write)


def test_code_is_written_once_and_found_again(directory: Path) -> None:
    written: list[str] = []
    build("twice", host.levels()[-1], written)
    build("twice", host.levels()[-1], written)
    assert written == ["twice"]
    assert len(list(directory.glob("twice-*.o"))) == 1


@pytest.mark.parametrize("damage", ["cut", "altered", "empty"])
def test_damaged_code_is_compiled_again(directory: Path, damage: str) -> None:
    written: list[str] = []
    name = f"damaged_{damage}"
    build(name, host.levels()[-1], written)
    (path,) = directory.glob(f"{name}-*.o")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes({"cut": content[:-5], "altered": content, "empty": b""}[damage])
    build(name, host.levels()[-1], written)
    assert written == [name, name]


def test_the_file_name_depends_on_the_level(directory: Path) -> None:
    keys = {compiler._key(level) for level in host.levels()}
    assert len(keys) == len({(level.cpu, level.features) for level in host.levels()})


def test_where_nothing_can_be_written_a_private_directory_serves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a directory")
    monkeypatch.setenv("HALFBYTE_CACHE_DIR", str(blocked / "below"))
    compiler.cache_directory.cache_clear()
    try:
        found = compiler.cache_directory()
        assert found.name.startswith("halfbyte-cpu-")
        assert found.stat().st_mode & 0o077 == 0
        written: list[str] = []
        build("private", host.levels()[-1], written)
        assert list(found.glob("private-*.o"))
    finally:
        compiler.cache_directory.cache_clear()


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="no POSIX permissions")
def test_a_directory_that_others_may_write_into_is_not_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu").chmod(0o777)
    monkeypatch.setenv("HALFBYTE_CACHE_DIR", str(tmp_path))
    compiler.cache_directory.cache_clear()
    try:
        assert compiler.cache_directory() != tmp_path / "cpu"
    finally:
        compiler.cache_directory.cache_clear()


def test_importing_halfbyte_loads_no_compiler() -> None:
    printed = python_code(
        "import sys, halfbyte; print([m for m in ('llvmlite', 'numba', 'torch') if m in sys.modules])"
    )
    assert printed.strip() == "[]"


def test_binding_the_ops_compiles_nothing() -> None:
    printed = python_code("import sys; from halfbyte import backends; print('llvmlite' in sys.modules)")
    assert printed.strip() == "False"
