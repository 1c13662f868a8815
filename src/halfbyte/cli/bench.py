"""``halfbyte bench``: how fast 4-bit layers are on this machine; ``halfbyte bench tune``: measure tiles for its GPU."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from halfbyte import _env
from halfbyte.errors import ArgumentError, UnsupportedError

__all__ = ["main"]

SHAPES = ((4096, 4096), (14336, 4096))
"""(out_features, in_features) of the layers that are timed."""

BATCHES = (1, 8, 128)
COLD_BYTES = 100 << 20
"""Layers rotate over at least this many bytes of codes on a GPU, and a third of it on a CPU, so that caches miss."""

MOST_COPIES = 64


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="halfbyte bench",
        description="Time 4-bit layers (NF4) beside unquantized ones on this machine.",
        epilog="exit status: 0 done, 2 wrong command line, or nothing to measure on",
    )
    parser.add_argument("--device", help="cuda, cuda:1, cpu (default: a GPU where there is one)")
    parser.add_argument("--shape", type=_shape, action="append", help="OUTxIN of a layer; may be repeated")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    commands = parser.add_subparsers(dest="command", metavar="tune", title="commands")
    tune = commands.add_parser(
        "tune",
        help="measure the tiles of the GPU kernels and keep the best for this architecture",
        description="Measure every tile of the fused GPU kernels. Later processes use the result; what was measured "
        "before for other shapes and rows stays. All of it takes tens of minutes, a shape with --rows 1 half a minute.",
    )
    tune.add_argument("--shape", type=_shape, action="append", dest="shapes", help="OUTxIN of a weight; repeatable")
    tune.add_argument("--rows", type=_count, action="append", help="of activations; repeatable (default: 1 to 2048)")
    tune.add_argument("--out", type=Path, help="file to write (default: in halfbyte's cache, where it is found again)")
    tune.add_argument("--workers", type=int, default=max(1, min(14, (os.cpu_count() or 2) - 1)), help="that compile")
    return parser


def _shape(text: str) -> tuple[int, int]:
    rows, _, columns = text.partition("x")
    if not (rows.isdecimal() and columns.isdecimal() and int(rows) and int(columns)):
        raise argparse.ArgumentTypeError(f"{text!r}; expected OUTxIN, as 4096x4096")
    return int(rows), int(columns)


def _count(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r}; expected a number of rows")
    return int(text)


def main(argv: Sequence[str]) -> int:
    """Run ``halfbyte bench``; returns 0 done, 2 wrong command line or nothing to measure on."""
    try:
        options = _parser().parse_args(list(argv))
    except SystemExit as stop:  # argparse has printed its message
        return 0 if stop.code in {0, None} else 2
    if options.command == "tune":
        return _tune(options)
    device = _device(options.device)
    with _current(device):  # graphs are captured, and waited for, on the current GPU
        rows = [row for n, k in options.shape or SHAPES for row in _figures(n, k, device)]
    if options.json:
        print(json.dumps(rows, indent=1))
    else:
        _show(rows)
    return 0


def _device(name: str | None) -> Any:
    """The device to measure on.

    Raises:
        ArgumentError: There is none of that name.
    """
    import torch

    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA fails with an AssertionError
        raise ArgumentError(
            f"cannot use device {name!r}: {str(error).splitlines()[0]}", expected="cuda, cuda:N or cpu",
            hint="run: halfbyte doctor",
        ) from None  # fmt: skip
    return device


def _current(device: Any) -> AbstractContextManager[Any]:
    """Makes a GPU the current one."""
    import torch

    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _figures(rows: int, columns: int, device: Any) -> list[dict[str, Any]]:
    """One row of figures for each batch: microseconds of a forward pass, 4-bit and dense."""
    import torch

    from halfbyte.nn import Linear4bit
    from halfbyte.nn.compute_dtype import default_compute_dtype

    gpu = device.type == "cuda"
    dtype = torch.bfloat16 if gpu else default_compute_dtype(device)
    size = rows * columns // 2
    copies = min(MOST_COPIES, max(2, (COLD_BYTES if gpu else COLD_BYTES // 3) // size))
    torch.manual_seed(0)
    weight = torch.randn(rows, columns, dtype=dtype, device=device) * 0.02
    dense = torch.nn.Linear(columns, rows, bias=False, device="meta")
    dense.weight = torch.nn.Parameter(weight, requires_grad=False)
    layers: list[Any] = []
    for _ in range(copies):
        layer = Linear4bit(columns, rows, False, dtype, False, "nf4", device="meta")
        layer.weight = type(layer.weight)(weight.clone(), compress_statistics=False, quant_type="nf4")
        layers.append(layer.to(device))
    dense_copies = [dense]
    for _ in range(max(1, copies // 4)):
        other = torch.nn.Linear(columns, rows, bias=False, device="meta")
        other.weight = torch.nn.Parameter(weight.clone(), requires_grad=False)
        dense_copies.append(other)
    found: list[dict[str, Any]] = []
    with torch.no_grad():
        for batch in BATCHES:
            x = torch.randn(batch, columns, dtype=dtype, device=device)
            four_bit, plain = (_microseconds(some, x, gpu) for some in (layers, dense_copies))
            found.append(
                {
                    "device": str(device),
                    "out_features": rows,
                    "in_features": columns,
                    "rows": batch,
                    "dtype": str(dtype).removeprefix("torch."),
                    "nf4_us": round(four_bit, 1),
                    "dense_us": round(plain, 1),
                    "speedup": round(plain / four_bit, 2),
                }
            )
    return found


def _microseconds(layers: list[Any], x: Any, gpu: bool) -> float:
    """Median microseconds of one forward pass, over the layers in turn; on a GPU replayed as a CUDA graph."""
    import torch

    def turn() -> None:
        for layer in layers:
            layer(x)

    turn()
    replay: Callable[[], None] = turn
    if gpu:
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            turn()
        replay = graph.replay
    taken: list[float] = []
    for _ in range(7):
        if gpu:
            torch.cuda.synchronize()
        start = time.perf_counter()
        replay()
        if gpu:
            torch.cuda.synchronize()
        taken.append((time.perf_counter() - start) / len(layers) * 1e6)
    return sorted(taken)[len(taken) // 2]


def _show(rows: list[dict[str, Any]]) -> None:
    first = rows[0]
    print(f"NF4 layers on {first['device']} against dense {first['dtype']}, microseconds of a forward pass\n")
    print(f"{'weight':>14}  {'rows':>5}  {'NF4':>9}  {'dense':>9}  speedup")
    for row in rows:
        weight = f"{row['out_features']}x{row['in_features']}"
        print(f"{weight:>14}  {row['rows']:>5}  {row['nf4_us']:>9}  {row['dense_us']:>9}  {row['speedup']:>6}x")


def _tune(options: argparse.Namespace) -> int:
    """Measure, write, say where.

    Raises:
        UnsupportedError: There is no GPU that can be tuned.
        ArgumentError: The file cannot be written.
    """
    from halfbyte.backends import gpu_support, registry

    reason = gpu_support.why_not()
    if reason is not None:
        raise UnsupportedError(f"nothing to tune: {reason}", expected="a GPU", hint="run: halfbyte doctor")
    expect, tick, bar = _progress()
    with bar:
        document = registry.tune(options.shapes, options.rows, max(1, options.workers), expect, tick)
    path: Path = options.out or _env.cache_dir() / "tuning" / f"{document['arch']}.json"
    count = len(document["tiles"])
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _add_others(document, path)
        path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise ArgumentError(f"cannot write {path}: {error}", expected="a writable file", hint="--out FILE") from None
    print(f"{count} tiles measured on {document['device']}, written to {path}")
    return 0


def _add_others(document: dict[str, Any], path: Path) -> None:
    """Add what the file at ``path`` holds of the same GPU and the document does not: other shapes, other rows."""
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
        if before["device"] != document["device"]:
            return
        for key, names in (("tiles", ("batch", "n", "k")), ("fused", ("n", "k"))):
            known = {tuple(entry[name] for name in names) for entry in document[key]}
            document[key] += [entry for entry in before[key] if tuple(entry[name] for name in names) not in known]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return  # none, or damaged: it is replaced


def _progress() -> tuple[Callable[[int], None], Callable[[str], None], AbstractContextManager[Any]]:
    """What is told the number of steps, what is told of each, and the bar (rich's where that is installed)."""
    try:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    except ImportError:
        done = 0

        def say(text: str) -> None:
            nonlocal done
            done += 1
            if done % 25 == 0 or text != "compiling":
                print(f"{done}: {text}", file=sys.stderr, flush=True)

        return (lambda total: print(f"{total} steps", file=sys.stderr)), say, nullcontext()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar = Progress(*columns)
    task = bar.add_task("starting", total=None)
    return (
        lambda total: bar.update(task, total=total),
        lambda text: bar.update(task, advance=1, description=text),
        bar,
    )
