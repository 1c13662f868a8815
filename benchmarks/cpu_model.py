"""A small model end to end on the CPU: dense bf16 and fp32, halfbyte NF4, bitsandbytes NF4, each in its own process.

Usage: python benchmarks/cpu_model.py MODEL_DIR [--text FILE] [--peer PYTHON] [--threads 1] [--rounds 2]
The processes take turns, --rounds times; figures are the best of a process's repetitions and then of the rounds.
Times are CPU time of the process when --threads is 1 (others on the machine then hardly show), wall time otherwise.
Perplexity is that of the first windows of 512 tokens of --text. ``peak_mb``: greatest resident memory after loading.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

FORMS = ("dense bf16", "dense fp32", "halfbyte bf16", "halfbyte fp32", "bitsandbytes bf16", "bitsandbytes fp32")
PROMPT, NEW, WINDOW = 256, 24, 512


def child(form: str, model_dir: str, text: str, windows: int, threads: int) -> None:
    """Load, measure, print one JSON line."""
    who, kind = form.split()
    if who == "halfbyte":
        import halfbyte

        halfbyte.install_as_bitsandbytes()
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    torch.set_num_threads(threads)
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[kind]
    config = None
    if who != "dense":
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    model = AutoModelForCausalLM.from_pretrained(
        model_dir, dtype=dtype, quantization_config=config, device_map={"": "cpu"}
    ).eval()
    ids = AutoTokenizer.from_pretrained(model_dir)(
        Path(text).read_text(encoding="utf-8"), return_tensors="pt"
    ).input_ids
    clock = time.process_time if threads == 1 else time.perf_counter
    with torch.inference_mode():
        prompt = ids[:, :PROMPT]
        model(prompt)
        prompts: list[float] = []
        for _ in range(3):
            begun = clock()
            cache = model(prompt, use_cache=True).past_key_values
            prompts.append(clock() - begun)
        token, steps = prompt[:, -1:], []
        for _ in range(NEW):
            begun = clock()
            out = model(token, past_key_values=cache, use_cache=True)
            token, cache = out.logits[:, -1:].argmax(-1), out.past_key_values
            steps.append(clock() - begun)
        total, count = 0.0, 0
        for i in range(windows):
            window = ids[0, i * WINDOW : (i + 1) * WINDOW]
            logits = model(window[None]).logits[0, :-1].float()
            total += float(torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum"))
            count += WINDOW - 1
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    weights = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    found = {
        "prompt_ms": round(min(prompts) * 1e3, 1),
        "token_ms": round(min(steps) * 1e3, 2),
        "token_median_ms": round(sorted(steps)[NEW // 2] * 1e3, 2),
        "perplexity": round(float(torch.tensor(total / max(1, count)).exp()), 4) if windows else "",
        "weights_mb": round(weights / 1e6, 1),
        "peak_mb": round(int(peak.split()[1]) / 1e3),
    }
    print("FOUND " + json.dumps(found), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a causal language model")
    parser.add_argument("--text", help="text for prompts and perplexity", required=True)
    parser.add_argument("--peer", help="interpreter that has bitsandbytes; left out: no comparison with it")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--windows", type=int, default=2, help="windows for the perplexity (first round)")
    parser.add_argument("--out", default="cpu_model.csv")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.child, args.model, args.text, args.windows, args.threads)
        return
    import common

    best: dict[str, dict[str, object]] = {}
    for number in range(args.rounds):
        for form in FORMS:
            python = args.peer if form.startswith("bitsandbytes") else sys.executable
            if python is None:
                continue
            words = [python, __file__, args.model, "--text", args.text, "--threads", str(args.threads)]
            words += ["--windows", str(args.windows if number == 0 else 0), "--child", form]
            environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads), "HF_HUB_OFFLINE": "1"}
            done = subprocess.run(words, capture_output=True, text=True, check=False, env=environment)
            line = next((x for x in done.stdout.splitlines() if x.startswith("FOUND ")), None)
            if line is None:
                print(f"{form}: failed\n{done.stderr[-1500:]}", flush=True)
                continue
            found = json.loads(line.removeprefix("FOUND "))
            print(form, found, flush=True)
            known = best.setdefault(form, found)
            for name in ("prompt_ms", "token_ms", "token_median_ms"):
                known[name] = min(known[name], found[name])
    clock = "cpu" if args.threads == 1 else "wall"
    rows = [{"who": form, **found, "threads": args.threads, "clock": clock} for form, found in best.items()]
    print(common.write_csv(args.out, rows))


if __name__ == "__main__":
    main()
