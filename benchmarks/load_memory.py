"""Peak memory of ``from_pretrained`` in 4 bits on the CPU, against the size of the model in bf16.

    python benchmarks/load_memory.py [--out benchmarks/results/load_memory.csv] [--peer-python PYTHON]

Each row is one fresh process that loads a random Llama from bf16 safetensors. Two peaks above the level before the
load are taken every 2 ms from /proc/self/status: anonymous memory (what the process must have) and all resident memory
(with the pages of the checkpoint that are mapped, which the system takes back when it needs them). The bound is the
bf16 size of the model plus two of its largest tensors. Linux only.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve()

MODELS = {
    "llama-0.2B": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 10, "vocab_size": 16000},
    "llama-0.8B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 10, "vocab_size": 32000},
}

QUANTIZATIONS = {
    "nf4": {"bnb_4bit_quant_type": "nf4"},
    "nf4 double quant": {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
}

FIELDS = (
    "library",
    "version",
    "model",
    "quantization",
    "bf16_mb",
    "largest_tensor_mb",
    "bound_mb",
    "peak_anonymous_mb",
    "peak_resident_mb",
    "final_anonymous_mb",
    "seconds",
)


def make_model(folder: Path, settings: dict[str, int]) -> None:
    """Write a random bf16 Llama."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    config = LlamaConfig(**settings, num_attention_heads=16, num_key_value_heads=16)
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="500MB")


def measure(folder: Path, warm_up: Path, library: str, settings: dict[str, object]) -> dict[str, object]:
    """Load once in this process; sizes in MB (10^6 bytes)."""
    import os
    import threading
    import time

    if library == "halfbyte":
        import halfbyte

        halfbyte.install_as_bitsandbytes()
    os.environ["HALFBYTE_QUIET"] = "1"
    import bitsandbytes
    import torch
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    def load(path: Path) -> object:
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16, **settings)
        return AutoModelForCausalLM.from_pretrained(path, quantization_config=config)

    load(warm_up)  # what is imported or compiled at the first use is no part of a model
    numels = []
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            names = tensors.keys()
            numels += [torch.Size(tensors.get_slice(name).get_shape()).numel() for name in names]
    start, peak, done = _status(), [0, 0], threading.Event()

    def sample() -> None:
        while not done.wait(0.002):
            peak[:] = [max(old, new - base) for old, new, base in zip(peak, _status(), start, strict=True)]

    sampler = threading.Thread(target=sample)
    sampler.start()
    began = time.perf_counter()
    model = load(folder)
    seconds = time.perf_counter() - began
    done.set()
    sampler.join()
    final = _status()[0] - start[0]
    del model
    size, largest = 2 * sum(numels) / 1e6, 2 * max(numels) / 1e6
    return {
        "version": bitsandbytes.__version__,
        "bf16_mb": round(size, 1),
        "largest_tensor_mb": round(largest, 1),
        "bound_mb": round(size + 2 * largest, 1),
        "peak_anonymous_mb": round(peak[0] / 1000, 1),
        "peak_resident_mb": round(peak[1] / 1000, 1),
        "final_anonymous_mb": round(final / 1000, 1),
        "seconds": round(seconds, 2),
    }


def _status() -> list[int]:
    """Anonymous and resident memory of this process in kB (10^3 bytes)."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return [int(lines[key].split()[0]) * 1024 // 1000 for key in ("RssAnon", "VmRSS")]


def main() -> int:
    """Measure everything; exit code 1 where a peak is above the bound."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--peer-python", help="interpreter with bitsandbytes, to be measured beside halfbyte")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        folder, warm_up, library, quantization = arguments.child
        print(json.dumps(measure(Path(folder), Path(warm_up), library, QUANTIZATIONS[quantization])))
        return 0
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        tiny = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "vocab_size": 64}
        for name, settings in {"tiny": tiny, **MODELS}.items():
            make_model(Path(scratch, name), settings)
        interpreters = {"halfbyte": sys.executable}
        if arguments.peer_python:
            interpreters["bitsandbytes"] = arguments.peer_python
        for model in MODELS:
            for quantization in QUANTIZATIONS:
                for library, interpreter in interpreters.items():
                    words = [Path(scratch, model), Path(scratch, "tiny"), library, quantization]
                    done = subprocess.run(
                        [interpreter, str(HERE), "--child", *map(str, words)],
                        stdout=subprocess.PIPE,
                        text=True,
                        check=True,
                    )
                    measured = json.loads(done.stdout.splitlines()[-1])
                    rows.append({"library": library, "model": model, "quantization": quantization, **measured})
                    print({field: rows[-1][field] for field in FIELDS})
    if arguments.out:
        with arguments.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, FIELDS)
            writer.writeheader()
            writer.writerows(rows)
    return int(any(row["library"] == "halfbyte" and row["peak_anonymous_mb"] > row["bound_mb"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
