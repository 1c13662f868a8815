"""Direct launches: only on Triton versions whose call is known, only of kernels whose constants come last."""

from __future__ import annotations

import inspect
import re

import pytest

pytest.importorskip("triton")

import torch
import triton
from triton.runtime.jit import JITFunction

from halfbyte.backends.triton import gemm, launch
from halfbyte.backends.triton.kernels import dequantize, gemm_portable
from halfbyte.errors import ArgumentError


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


@pytest.mark.skipif(launch._version != (3, 6), reason="only there the launcher goes around CudaLauncher.__call__")
def test_the_installed_triton_starts_kernels_as_the_launcher_does() -> None:
    from triton.backends.nvidia.driver import CudaLauncher

    source = re.sub(r"\s+", " ", inspect.getsource(CudaLauncher.__call__))
    assert (
        "self.launch(gridX, gridY, gridZ, stream, function, self.launch_cooperative_grid, self.launch_pdl, "
        "global_scratch, profile_scratch, *args)"
    ) in source


KERNELS = {
    **gemm.fused_kernels(),
    "sum": gemm_portable._sum_partial_kernel,
    "dequantize": dequantize._dequantize_4bit_kernel,
}


@pytest.mark.parametrize("name", KERNELS)
def test_run_time_parameters_come_before_constants(name: str) -> None:
    constant = [parameter.is_constexpr for parameter in KERNELS[name].params]
    assert constant == sorted(constant)


@pytest.mark.parametrize("name", sorted(gemm.fused_kernels()))
def test_batches_of_one_bucket_share_a_compiled_kernel(name: str) -> None:
    (rows,) = (parameter for parameter in KERNELS[name].params if parameter.name == "M")
    assert rows.do_not_specialize


def compiled_kernel(monkeypatch: pytest.MonkeyPatch) -> tuple[launch.Launcher, list[tuple[object, ...]]]:
    calls: list[tuple[object, ...]] = []

    class Run:
        global_scratch_size = profile_scratch_size = 0
        launch_cooperative_grid, launch_pdl = "cooperative", "pdl"

        def __call__(self, *args: object) -> None:
            calls.append(args)

        def launch(self, *args: object) -> None:
            calls.append(("bare", *args))

    class Compiled:
        function, packed_metadata, run = "function", "metadata", Run()

    class Kernel:
        def __getitem__(self, grid: object) -> object:
            return lambda *args, **options: Compiled()  # noqa: ARG005  (what Triton's call takes)

    monkeypatch.setattr(launch, "DIRECT", True)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 90 + index, raising=False)
    return launch.Launcher(Kernel(), (16, True), num_warps=4), calls


def test_a_second_call_goes_straight_to_the_compiled_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    launcher, calls = compiled_kernel(monkeypatch)
    assert not launcher.compiled()
    launcher.ordinary((2, 1, 1), "a", 7)
    assert launcher.compiled()
    launcher.direct((2, 1, 1), 99, 4096, 7)
    assert calls == [(2, 1, 1, 99, "function", "metadata", None, None, None, 4096, 7, 16, True)]


@pytest.mark.parametrize("version", [(3, 6), (3, 9)])
def test_a_repeated_launch_passes_what_the_ordinary_one_passes(
    monkeypatch: pytest.MonkeyPatch, version: tuple[int, int]
) -> None:
    launcher, calls = compiled_kernel(monkeypatch)
    monkeypatch.setattr(launch, "_version", version)
    packed, absmax, pairs, x = (torch.zeros(64) for _ in range(4))
    fixed = ((2, 3, 1), 1, (1, 8), (packed,), (absmax, None), (pairs,), (7, 8))
    assert launcher.repeated(*fixed) is None
    launcher.ordinary((2, 3, 1), packed, x, absmax, None, x, pairs, 7, 8)
    call = launcher.repeated(*fixed)
    assert call is not None
    out = call(x)
    assert out is not None
    assert (out.shape, out.dtype) == ((1, 8), x.dtype)
    head: tuple[object, ...] = (2, 3, 1, 91, "function", "metadata", None, None, None)
    if version == (3, 6):
        head = ("bare", 2, 3, 1, 91, "function", "cooperative", "pdl", None, None, "metadata", None, None, None)
    pointers = (packed.data_ptr(), x.data_ptr(), absmax.data_ptr(), None, out.data_ptr(), pairs.data_ptr())
    assert calls == [(*head, *pointers, 7, 8, 16, True)]


def test_a_repeated_launch_leaves_misaligned_activations_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    launcher, calls = compiled_kernel(monkeypatch)
    x = torch.zeros(65)
    launcher.ordinary((1, 1, 1), x)
    call = launcher.repeated((1, 1, 1), 0, (1, 8), (), (), (), ())
    assert call is not None
    assert call(x[1:]) is None
    assert calls == []


def test_tensors_that_begin_at_16_bytes_are_aligned_together_only() -> None:
    x = torch.zeros(65)
    assert launch.aligned(x, None, x[4:])
    assert not launch.aligned(x, None, x[1:])


def test_a_tensor_that_no_gpu_reads_is_refused() -> None:
    with pytest.raises(ArgumentError, match=r"of the 4-bit weight is on cpu(.*\n)*.*layer\.to\(device\)"):
        launch.check_devices("weight", "layer", None, torch.zeros(1))
