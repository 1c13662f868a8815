"""Whether kernels and torch get in each other's way: each alone, then in turn, on torch's threads and on the pool's.

Usage: python benchmarks/cpu_threads.py [--threads 2] [--out NAME.csv]
"in turn" is one torch product and one of halfbyte's, one after the other; without interference it is their sum.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch.nn.functional import linear

import common
import halfbyte.backends  # noqa: F401  (defines and binds torch.ops.halfbyte)
from halfbyte.backends.cpu import threads

N = K = 4096


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--out", default="cpu_threads.csv")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    dense, x = torch.randn(N, K), torch.randn(1, K)
    packed, absmax = torch.ops.halfbyte.quantize_4bit(dense, 64, "nf4", torch.uint8)

    def ours(_: int) -> object:
        return torch.ops.halfbyte.gemm_4bit(x, packed, [N, K], absmax, 64, "nf4")

    def theirs(_: int) -> object:
        return linear(x, dense)

    def both(i: int) -> object:
        return theirs(i), ours(i)

    def on_pool(case: Callable[[int], object]) -> Callable[[int], object]:
        def run(i: int) -> object:
            threads._forked = True
            try:
                return case(i)
            finally:
                threads._forked = False

        return run

    cases = {
        "torch alone": theirs,
        "halfbyte alone": ours,
        "in turn": both,
        "halfbyte alone, pool": on_pool(ours),
        "in turn, pool": on_pool(both),
    }
    timings = common.interleave(cases, repeats=200, seconds=args.seconds)
    rows: list[dict[str, object]] = []
    for who, t in timings.items():
        print(f"{who}: {t.least * 1e3:.3f} / {t.median * 1e3:.3f} ms")
        figures = {"min_ms": round(t.least * 1e3, 4), "median_ms": round(t.median * 1e3, 4)}
        rows.append({"who": who, **figures, "threads": args.threads})
    print(common.write_csv(args.out, rows))


if __name__ == "__main__":
    main()
