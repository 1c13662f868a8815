"""Which backend computes which op: registration, selection by priority and declared reasons, and the explanation."""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._C._functorch import peek_interpreter_stack

from halfbyte import _env
from halfbyte.backends import gpu_support
from halfbyte.errors import ArgumentError, UnsupportedError
from halfbyte.ops import bind, defined_ops

__all__ = [
    "Backend",
    "Verdict",
    "backends",
    "explain",
    "implements",
    "kernel",
    "listened",
    "prepare",
    "register",
    "select",
    "transformed",
    "tune",
    "undisturbed",
    "unregister",
    "warmup",
]

ENTRY_POINT_GROUP = "halfbyte.backends"
"""Packages add backends by an entry point of this group: a function without arguments that calls :func:`register`."""

Declines = Callable[..., "str | None"]


@dataclass(frozen=True)
class Backend:
    """One way of computing ops.

    Attributes:
        name: What ``HALFBYTE_BACKEND`` and reports call it.
        devices: Device types it computes on; empty for every device.
        priority: The highest that does not decline computes.
        module: Imported at the first use of a matching device; registers its ops with :func:`implements`.
        why_not: Returns why it cannot serve on this machine at all (a missing package, say), else None.
        why_not_on: Returns why it cannot serve on that device of one of its types, else None.
    """

    name: str
    devices: frozenset[str]
    priority: int
    module: str
    why_not: Callable[[], str | None] = lambda: None
    why_not_on: Callable[[torch.device], str | None] = lambda device: None

    def serves(self, device: str) -> bool:
        """Whether it computes on that device type."""
        return not self.devices or device in self.devices


@dataclass(frozen=True)
class Verdict:
    """Why a backend would or would not compute a call: ``reason`` is None for one that would."""

    backend: str
    reason: str | None


@dataclass(frozen=True)
class _Implementation:
    backend: Backend
    function: Callable[..., Any]
    declines: Declines | None
    prepare: Callable[..., Callable[..., Any] | None] | None = None


_backends: dict[str, Backend] = {}
_implementations: dict[str, dict[str, _Implementation]] = {}
_candidates: dict[tuple[str, torch.device], tuple[_Implementation, ...]] = {}
_loaded: dict[str, str | None] = {}
_told: set[torch.device] = set()
_kernels: dict[str, Callable[..., Any]] = {}
_dispatch_modes: Callable[[], int] = torch._C._len_torch_dispatch_stack  # pyright: ignore[reportPrivateUsage]
_function_modes: Callable[[], int] = torch._C._len_torch_function_stack  # pyright: ignore[reportPrivateUsage]
_transforms: Callable[[], object] = peek_interpreter_stack
_entry_points_read = False


def register(backend: Backend) -> Backend:
    """Add a backend; its ops follow when its module is imported. Returns it.

    Raises:
        ArgumentError: The name is taken.
    """
    if backend.name in _backends:
        raise ArgumentError(f"a backend named {backend.name!r} is registered already", hint="choose another name")
    _backends[backend.name] = backend
    _candidates.clear()
    return backend


def unregister(name: str) -> None:
    """Remove a backend and its ops."""
    _backends.pop(name, None)
    _loaded.pop(name, None)
    for table in _implementations.values():
        table.pop(name, None)
    _candidates.clear()


def implements(
    backend: str,
    op: str,
    declines: Declines | None = None,
    prepare: Callable[..., Callable[..., Any] | None] | None = None,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorate the function with which ``backend`` computes ``op`` (``"gemm_4bit"``, ``"gemm_4bit.out"``).

    Args:
        backend: Name of a registered backend.
        op: Name of a defined op.
        declines: Same arguments as the op; returns why this call is left to the next backend, else None.
        prepare: Takes what stays the same between calls, returns what repeats them, or None; see :func:`prepare`.

    Raises:
        ArgumentError: No such op or backend.
    """
    if op not in defined_ops():
        raise ArgumentError(f"op {op!r} is not defined", expected=f"one of {', '.join(defined_ops())}")
    if backend not in _backends:
        raise ArgumentError(f"backend {backend!r} is not registered", expected=f"one of {', '.join(_backends)}")

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        _implementations.setdefault(op, {})[backend] = _Implementation(_backends[backend], function, declines, prepare)
        _candidates.clear()
        return function

    return decorate


def backends() -> tuple[Backend, ...]:
    """All registered backends, best first."""
    _read_entry_points()
    return tuple(sorted(_backends.values(), key=lambda backend: -backend.priority))


def explain(op: str, *args: Any, **kwargs: Any) -> list[Verdict]:
    """What every backend says of this call, best first; the first whose reason is None computes it."""
    device = _device_of(args, kwargs)
    verdicts: list[Verdict] = []
    for backend in backends():
        reason = _why_not(backend, device)
        implementation = _implementations.get(op, {}).get(backend.name)
        if reason is None and implementation is None:
            reason = f"does not implement {op}"
        if reason is None and implementation is not None and implementation.declines is not None:
            reason = implementation.declines(*args, **kwargs)
        verdicts.append(Verdict(backend.name, reason))
    return verdicts


def prepare(op: str, *args: Any) -> Callable[..., Any] | None:
    """What repeats a call that was made before, on the same tensors, with other numbers.

    Args:
        op: Its name.
        args: Those that the backend's ``prepare`` takes.

    Returns:
        None where the backend that comes first does not offer it, or would leave this call to another.
    """
    for implementation in _candidates.get((op, _device_of(args, {})), ())[:1]:
        if implementation.prepare is not None:
            return implementation.prepare(*args)
    return None


def select(op: str, device: torch.device, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[..., Any]:
    """The function that computes this call.

    Raises:
        UnsupportedError: Every backend declined; the message lists the reasons.
    """
    candidates = _candidates.get((op, device))
    if candidates is None:
        candidates = _find_candidates(op, device)
    for implementation in candidates:
        declines = implementation.declines
        if declines is None or declines(*args, **kwargs) is None:
            return implementation.function
    reasons = "; ".join(f"{v.backend}: {v.reason}" for v in explain(op, *args, **kwargs))
    raise UnsupportedError(f"no backend computes {op} on {device} ({reasons})", hint="run: halfbyte doctor")


def undisturbed(tensor: torch.Tensor) -> bool:
    """Whether an op on ``tensor`` that needs no gradient may skip torch's dispatcher: nothing traces or listens.

    The dispatcher costs a Python op about 9 µs a call, as much as a whole matrix-vector product takes on a GPU.
    """
    return type(tensor) is torch.Tensor and not torch.compiler.is_compiling() and not listened()


def listened() -> bool:
    """Whether a mode, a transform or a tracer wants to hear of every op."""
    return bool(_dispatch_modes() or _function_modes() or transformed())


def transformed() -> bool:
    """Whether a transform of torch.func or a tracer is at work, which knows no autograd Function of ours."""
    return bool(_transforms() is not None or torch._C._get_tracing_state())  # pyright: ignore[reportPrivateUsage]


def kernel(op: str) -> Callable[..., Any]:
    """What torch calls for ``op``: the check of its arguments, then the backend. For callers that are undisturbed."""
    return _kernels[op]


def warmup(
    say: Callable[[str], None],
    dtypes: Sequence[torch.dtype],
    shapes: Sequence[tuple[int, int]] = (),
    experts: Sequence[tuple[int, int, int, int, bool]] = (),
) -> None:
    """Let every backend that can serve here compile ahead: those whose module has a ``warmup`` of these arguments.

    Args:
        say: Takes one line of text for each backend.
        dtypes: Of activations.
        shapes: (out_features, in_features) of the weights; empty for usual ones.
        experts: Of stacked weights: experts, chosen of them, out_features, in_features, whether there is a bias.
    """
    for backend in backends():
        reason = backend.why_not()
        if reason is not None:
            say(f"{backend.name}: {reason}")
            continue
        compile_ahead = getattr(importlib.import_module(backend.module), "warmup", None)
        if compile_ahead is not None:
            compile_ahead(say, dtypes, shapes, experts)


def tune(
    shapes: Sequence[tuple[int, int]] | None,
    batches: Sequence[int] | None,
    workers: int,
    expect: Callable[[int], None],
    tick: Callable[[str], None],
) -> dict[str, Any]:
    """Measure the tiles of the GPU kernels for weights of ``shapes`` (None: those of usual models) on this GPU.

    Args:
        shapes: (out_features, in_features).
        batches: Rows of activations; None for all that have tiles of their own.
        workers: Processes that compile.
        expect: Told the number of steps.
        tick: Told of each.

    Returns:
        The tuning file's document.
    """
    measure = importlib.import_module("halfbyte.backends.triton.tune")
    return measure.tune(shapes or measure.SHAPES, batches or measure.FUSED_BATCHES, workers, expect, tick)


def _find_candidates(op: str, device: torch.device) -> tuple[_Implementation, ...]:
    reasons = {backend: _why_not(backend, device) for backend in backends()}
    usable = [backend for backend, reason in reasons.items() if reason is None]
    _tell_slow(device, reasons)
    table = _implementations.get(op, {})
    found = tuple(table[backend.name] for backend in usable if backend.name in table)
    _candidates[(op, device)] = found
    return found


def _tell_slow(device: torch.device, reasons: dict[Backend, str | None]) -> None:
    """Say once that a device other than the CPU gets no kernels of its own, though the user asked for no backend."""
    made_for_it = {b: reason for b, reason in reasons.items() if b.devices and b.serves(device.type)}
    if device in _told or device.type in ("cpu", "meta") or not made_for_it or _env.get("HALFBYTE_BACKEND"):
        return
    _told.add(device)
    if None not in made_for_it.values():
        why = "; ".join(f"{backend.name}: {reason}" for backend, reason in made_for_it.items())
        warnings.warn(f"quantized layers on {device} compute in plain torch operations, slowly ({why})", stacklevel=2)


def _why_not(backend: Backend, device: torch.device) -> str | None:
    forced = _env.get("HALFBYTE_BACKEND")
    if forced and forced not in _backends:
        raise ArgumentError(
            f"HALFBYTE_BACKEND={forced!r}", expected=f"one of {', '.join(_backends)}", hint="unset HALFBYTE_BACKEND"
        )
    if forced and backend.name != forced:
        return f"HALFBYTE_BACKEND={forced} asks for another"
    if not backend.serves(device.type):
        return f"serves {', '.join(sorted(backend.devices))}, not {device.type}"
    if backend.name not in _loaded:
        reason = backend.why_not()
        if reason is None:
            importlib.import_module(backend.module)
        _loaded[backend.name] = reason
    reason = _loaded[backend.name]
    return backend.why_not_on(device) if reason is None else reason


def _read_entry_points() -> None:
    global _entry_points_read
    if _entry_points_read:
        return
    _entry_points_read = True
    from importlib.metadata import entry_points

    for point in entry_points(group=ENTRY_POINT_GROUP):
        point.load()()


def _device_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.device:
    for value in (*args, *kwargs.values()):
        if isinstance(value, list):  # ops over many tensors start with the list of them
            value = next(iter(value), None)  # pyright: ignore[reportUnknownArgumentType]
        if isinstance(value, torch.Tensor):
            return value.device
    return torch.device("cpu")


def _kernel_for(op: str, check: Callable[..., None]) -> Callable[..., Any]:
    def checked(first: Any, *args: Any, **kwargs: Any) -> Any:
        check(first, *args, **kwargs)
        device = first.device if isinstance(first, torch.Tensor) else _device_of((first,), kwargs)
        return select(op, device, (first, *args), kwargs)(first, *args, **kwargs)

    _kernels[op] = checked
    return checked


def _missing(package: str) -> Callable[[], str | None]:
    return lambda: None if importlib.util.find_spec(package) else f"{package} is not installed"


bind(_kernel_for)
register(Backend("reference", frozenset(), 0, "halfbyte.backends.reference"))
register(
    Backend(
        "triton",
        frozenset({"cuda"}),
        20,
        "halfbyte.backends.triton",
        why_not=gpu_support.why_not,
        why_not_on=gpu_support.why_not_on,
    )
)
register(Backend("cpu", frozenset({"cpu"}), 10, "halfbyte.backends.cpu", why_not=_missing("llvmlite")))
