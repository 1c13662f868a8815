"""Direct launches: only on Triton versions whose call is known, only of kernels whose constants come last."""

from __future__ import annotations

import inspect
import re

import pytest

pytest.importorskip("triton")

import triton
from triton.runtime.jit import JITFunction

from halfbyte.backends.triton import gemm, launch
from halfbyte.backends.triton.kernels import gemm_portable


@pytest.mark.skipif(
    tuple(int(part) for part in triton.__version__.split(".")[:2]) not in launch.DIRECT_VERSIONS,
    reason="this Triton is launched through its ordinary call",
)
def test_the_installed_triton_calls_compiled_kernels_as_the_launcher_does() -> None:
    source = re.sub(r"\s+", " ", inspect.getsource(JITFunction.run))
    assert (
        "kernel.run(grid_0, grid_1, grid_2, stream, kernel.function, kernel.packed_metadata, launch_metadata, "
        "knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook, *bound_args.values())"
    ) in source


KERNELS = {**gemm.fused_kernels(), "sum": gemm_portable._sum_partial_kernel}


@pytest.mark.parametrize("name", KERNELS)
def test_run_time_parameters_come_before_constants(name: str) -> None:
    constant = [parameter.is_constexpr for parameter in KERNELS[name].params]
    assert constant == sorted(constant)


@pytest.mark.parametrize("name", sorted(gemm.fused_kernels()))
def test_batches_of_one_bucket_share_a_compiled_kernel(name: str) -> None:
    (rows,) = (parameter for parameter in KERNELS[name].params if parameter.name == "M")
    assert rows.do_not_specialize


def test_a_second_call_goes_straight_to_the_compiled_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[object, ...]] = []

    class Compiled:
        function, packed_metadata = "function", "metadata"

        def run(self, *args: object) -> None:
            calls.append(args)

    class Kernel:
        def __getitem__(self, grid: object) -> object:
            return lambda *args, **options: Compiled()  # noqa: ARG005  (what Triton's call takes)

    monkeypatch.setattr(launch, "DIRECT", True)
    launcher = launch.Launcher(Kernel(), (16, True), num_warps=4)
    assert not launcher.compiled()
    launcher.ordinary((2, 1, 1), "a", 7)
    assert launcher.compiled()
    launcher.direct((2, 1, 1), 99, 4096, 7)
    assert calls == [(2, 1, 1, 99, "function", "metadata", None, None, None, 4096, 7, 16, True)]
