"""Every level that this machine runs, and any number of threads."""

from collections.abc import Callable, Iterator

import pytest

from halfbyte.backends.cpu import host, threads
from halfbyte.backends.cpu.kernels.levels import Level


@pytest.fixture(params=[found.name for found in host.levels()])
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Level]:
    """The CPU backend capped to one level after another."""
    monkeypatch.setenv("HALFBYTE_CPU_FEATURES", request.param)
    host.level.cache_clear()
    yield host.level()
    monkeypatch.undo()
    host.level.cache_clear()


@pytest.fixture
def use_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """``use_threads(3)``: kernels run on three threads until the test ends."""

    def use(count: int) -> None:
        monkeypatch.setenv("HALFBYTE_NUM_THREADS", str(count))
        threads._override.cache_clear()

    yield use
    monkeypatch.undo()
    threads._override.cache_clear()
