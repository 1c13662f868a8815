"""Peak memory of ``halfbyte merge`` beside the size of one file of its result and of its largest weight in fp32.

    python benchmarks/merge_memory.py [--out benchmarks/results/merge_memory.csv]

Each row is one fresh process that merges a LoRA adapter on every linear layer into a random Llama. The peak above the
level before the merge is anonymous memory, taken every 2 ms from /proc/self/status. Linux only.

The bound is counted, at the moment when a weight is compared: one file of the result; the weight's exact values, the
change, and both as they are stored, in fp32; the weight as it was read and as it is written, in 16 bits, which are a
fifth copy together; two more that peft needed just before, which glibc may not have given back yet; five parts in
float64 of what is compared; the adapter. Exit code 1 where a peak is above it.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve()
MODEL = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 10, "vocab_size": 16000}
TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "vocab_size": 64}
SHARD_MB = 100
FIELDS = (
    "model",
    "base",
    "to",
    "base_mb",
    "result_mb",
    "file_mb",
    "largest_fp32_mb",
    "bound_mb",
    "peak_anonymous_mb",
    "seconds",
)


def make(folder: Path, sizes: dict[str, int]) -> None:
    """A random base model, that model in 4 bits, and an adapter."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

    import halfbyte

    halfbyte.install_as_bitsandbytes(replace=True)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=16, num_key_value_heads=16))
    model.save_pretrained(folder / "dense", max_shard_size="500MB")
    adapted = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear"))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    adapted.save_pretrained(folder / "adapter")
    del adapted, model
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    four_bit = AutoModelForCausalLM.from_pretrained(folder / "dense", quantization_config=config)
    four_bit.save_pretrained(folder / "nf4")


def measure(folder: Path, base: str, to: str) -> dict[str, object]:
    """Merge once in this process; sizes in MB (10^6 bytes)."""
    from halfbyte.integrations.merging import merge
    from halfbyte.integrations.merging.survival import PART

    def anonymous() -> float:
        lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(lines["RssAnon"].split()[0]) * 1024 / 1e6

    def run(where: Path) -> Any:
        return merge(where / base, where / "adapter", where / f"{base}-{to}", to=to, shard_bytes=SHARD_MB * 10**6)

    run(folder / "tiny")  # what is imported or compiled at the first use is no part of a merge
    start, peak, done = anonymous(), [0.0], threading.Event()

    def sample() -> None:
        while not done.wait(0.002):
            peak[0] = max(peak[0], anonymous() - start)

    sampler = threading.Thread(target=sample)
    sampler.start()
    began = time.perf_counter()
    survival = run(folder)
    seconds = time.perf_counter() - began
    done.set()
    sampler.join()
    adapter = (folder / "adapter" / "adapter_model.safetensors").stat().st_size / 1e6
    largest = 4 * MODEL["hidden_size"] * MODEL["intermediate_size"] / 1e6
    return {
        "model": "llama-0.2B",
        "base": base,
        "to": to,
        "base_mb": round(sum(file.stat().st_size for file in (folder / base).glob("*.safetensors")) / 1e6, 1),
        "result_mb": round(survival.nbytes / 1e6, 1),
        "file_mb": SHARD_MB,
        "largest_fp32_mb": round(largest, 1),
        "bound_mb": round(SHARD_MB + 7 * largest + 5 * 8 * PART / 1e6 + adapter, 1),
        "peak_anonymous_mb": round(peak[0], 1),
        "seconds": round(seconds, 1),
    }


def main() -> int:
    """Measure everything; exit code 1 where a peak is above the bound."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        folder, base, to = arguments.child
        if base == "make":
            make(Path(folder), MODEL)
            make(Path(folder, "tiny"), TINY)
        else:
            print(json.dumps(measure(Path(folder), base, to)))
        return 0
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for base, to in (("make", "-"), ("dense", "bf16"), ("dense", "4bit"), ("nf4", "4bit"), ("nf4", "bf16")):
            command = [sys.executable, str(HERE), "--child", scratch, base, to]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            if base != "make":
                rows.append(json.loads(output.splitlines()[-1]))
                print(rows[-1], flush=True)
    if arguments.out:
        with arguments.out.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, FIELDS)
            writer.writeheader()
            writer.writerows(rows)
    return int(any(row["peak_anonymous_mb"] > row["bound_mb"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
