"""Kernels under threads, forks and DataLoader workers."""

import os
import threading
from collections.abc import Callable
from textwrap import dedent

import pytest
import torch

from halfbyte.backends.cpu import four_bit, matmul, threads
from halfbyte.errors import ArgumentError
from tests.support.hard_inputs import weights
from tests.support.python import python_code

N, K = 256, 512


def make() -> tuple[torch.Tensor, torch.Tensor]:
    return four_bit.quantize_4bit(weights(N * K), 64, "nf4", torch.uint8)


def multiply(packed: torch.Tensor, absmax: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return matmul.gemm_4bit(x, packed, (N, K), absmax, 64, "nf4")


def test_threads_follow_torch_unless_the_variable_says_otherwise(use_threads: Callable[[int], None]) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert threads.count() == 3
        use_threads(2)
        assert threads.count() == 2
    finally:
        torch.set_num_threads(before)


def test_a_negative_number_of_threads_is_refused(use_threads: Callable[[int], None]) -> None:
    use_threads(-1)
    with pytest.raises(ArgumentError, match="HALFBYTE_NUM_THREADS=-1; expected 0"):
        threads.count()


@pytest.mark.parametrize("count", [1, 2, 3, 8])
@pytest.mark.parametrize("pool", [False, True])
def test_a_product_is_the_same_on_any_number_of_threads_of_either_kind(
    count: int, pool: bool, use_threads: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    packed, absmax = make()
    x = torch.randn(3, K)
    use_threads(1)
    expected = multiply(packed, absmax, x)
    use_threads(count)
    monkeypatch.setattr(threads, "_forked", pool)
    assert torch.equal(multiply(packed, absmax, x), expected)


@pytest.mark.parametrize("pool", [False, True])
def test_python_threads_may_call_at_once(
    pool: bool, use_threads: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    packed, absmax = make()
    inputs = [torch.randn(2, K) for _ in range(8)]
    expected = [multiply(packed, absmax, x) for x in inputs]
    use_threads(2)
    monkeypatch.setattr(threads, "_forked", pool)
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(20):
            if not torch.equal(multiply(packed, absmax, inputs[i]), expected[i]):
                wrong.append(i)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert not any(worker.is_alive() for worker in workers)
    assert wrong == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_child_computes_although_its_parent_had_threads() -> None:
    printed = python_code(
        dedent("""
        import os, torch
        from halfbyte import backends
        from halfbyte.backends.cpu import threads
        torch.set_num_threads(2)
        op = torch.ops.halfbyte
        packed, absmax = op.quantize_4bit(torch.randn(512, 512), 64, "nf4", torch.uint8)
        x = torch.randn(1, 512)
        expected = op.gemm_4bit(x, packed, (512, 512), absmax, 64, "nf4")
        child = os.fork()
        if child == 0:
            same = torch.equal(op.gemm_4bit(x, packed, (512, 512), absmax, 64, "nf4"), expected)
            os._exit(0 if same and threads.source() == "pool" and threads.count() == 2 else 1)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        """)
    )
    assert printed.strip() == "0"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_data_loader_workers_quantize() -> None:
    printed = python_code(
        dedent("""
        import torch
        from halfbyte import backends
        torch.set_num_threads(2)
        quantize = lambda A: torch.ops.halfbyte.quantize_4bit(A, 64, "nf4", torch.uint8)[0]
        data = [torch.randn(4096, generator=torch.Generator().manual_seed(i)) for i in range(8)]
        expected = torch.stack([quantize(A) for A in data])
        class Set(torch.utils.data.Dataset):
            def __len__(self): return 8
            def __getitem__(self, i): return quantize(data[i])
        loader = torch.utils.data.DataLoader(Set(), batch_size=8, num_workers=2, multiprocessing_context="fork")
        print(torch.equal(next(iter(loader)), expected))
        """)
    )
    assert printed.strip() == "True"


def test_torch_owns_the_threads_where_it_runs_on_openmp() -> None:
    if threads._gomp() is None:
        pytest.skip("torch has no OpenMP here")
    assert threads.source() == "openmp"
