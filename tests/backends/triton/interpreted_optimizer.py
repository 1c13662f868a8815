"""Child of test_optimizer: runs the optimizer kernel on CPU tensors, prints the largest differences by rule as JSON."""

import json
import sys
from contextlib import nullcontext
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "src"))

import torch

import halfbyte.functional as F
from halfbyte.backends.reference import optimizer as reference
from halfbyte.backends.triton import optimizer
from halfbyte.rules import hyper, rule_named, rule_names

optimizer.on_device = lambda _index: nullcontext()
MAPS = {True: F.create_dynamic_map(), False: F.create_dynamic_map(signed=False)}
torch.manual_seed(1)


def fresh(rule, dtype, blocksize):
    signed, sizes = rule_named(rule).signed, (1300, 1, 700)
    params = [torch.linspace(-2, 2, n).to(dtype) for n in sizes]
    fp32 = [torch.zeros(n) for n in sizes for _ in signed]
    codes = [torch.zeros(n, dtype=torch.uint8) for n in sizes for _ in signed]
    absmax = [torch.zeros(-(-n // blocksize)) for n in sizes for _ in signed]
    return params, [p.clone() for p in params], fp32, codes, absmax


def steps(module, rule, dtype, blocksize, seed, skip, known=MAPS):
    params, others, fp32, codes, absmax = fresh(rule, dtype, blocksize)
    maps = [known[one] for one in rule_named(rule).signed]
    generator = torch.Generator().manual_seed(3)
    for t in range(1, 5):
        grads = [
            (torch.randn(p.numel(), generator=generator) * torch.logspace(-2, 2, p.numel())).to(dtype) for p in params
        ]
        for g in grads:
            g[::17] = 0.0
        if t == 3:
            grads[0][40], grads[0][900] = float("nan"), float("inf")
        h = torch.tensor(
            hyper(
                lr=1e-2,
                beta1=0.9,
                beta2=0.99,
                beta3=0.999,
                alpha=2.0,
                eps=1e-8,
                weight_decay=0.1,
                step=t,
                grad_scale=0.5,
            )
        )
        module.optimizer_step_32bit(params, grads, fp32, h, rule, skip, seed)
        module.optimizer_step_8bit(others, grads, codes, absmax, maps, h, blocksize, rule, skip, seed)
    return params + others + fp32 + codes + absmax


def difference(rule, *arguments):
    worst = 0.0
    for ours, theirs in zip(steps(optimizer, rule, *arguments), steps(reference, rule, *arguments), strict=True):
        apart = (ours.double() - theirs.double()).abs()
        worst = max(worst, float(apart.max()))
    return worst


found = {rule: difference(rule, torch.float32, 256, -1, False) for rule in rule_names()}
found["fp16"] = difference("adam", torch.float16, 256, -1, False)
found["blocks of 2048"] = difference("ademamix", torch.float32, 2048, -1, False)
# bf16 with random rounding only: the interpreter truncates where a GPU rounds to nearest.
found["random"] = difference("lion", torch.bfloat16, 256, 99, False)
line = torch.linspace(-1.0, 1.0, 256)
found["another map"] = difference("adam", torch.float32, 256, -1, False, {True: line, False: line})
found["skip zeros"] = difference("adam", torch.float16, 256, -1, True)
print(json.dumps(found))
